"""Templates are filled verbatim, and their mistakes are reported before any row is read."""

import pytest

from moe_jax.data.prompt_template import FOLDER, load_prompt_template
from moe_jax.errors import DataError


def test_package_template_with_and_without_input():
    template = load_prompt_template("instruction")
    assert template.fill("Say {x}.", "{instruction}", "row 1") == (
        "Carry out the task below, using the material that comes with it.\n\n"
        "## Task\nSay {x}.\n\n## Material\n{instruction}\n\n## Answer\n"
    )
    assert template.fill("Go.", "", "row 1") == (
        "Carry out the task below.\n\n## Task\nGo.\n\n## Answer\n"
    )


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.txt")))
def test_every_template_of_the_package_serves_both_kinds_of_row(name):
    template = load_prompt_template(name)
    assert "DO" in template.fill("DO", "", "row 1")
    assert {"DO", "THIS"} <= set(template.fill("DO", "THIS", "row 1").split())


def test_text_is_verbatim_and_double_braces_are_literal(write):
    template = load_prompt_template(write("mine.txt", 'A {{"k"}}: {instruction}'))
    assert template.fill("x", "", "row 1") == 'A {"k"}: x'


def test_template_without_input_placeholder_refuses_a_row_with_input(write):
    template = load_prompt_template(write("mine.txt", "{instruction}\n"))
    with pytest.raises(DataError, match=r"^d\.json: row 3: has an input, and .*mine\.txt"):
        template.fill("x", "y", "d.json: row 3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{instruction} {inputs}", "unknown placeholder {inputs}; did you mean 'input'"),
        ("{instruction!r}", "unknown placeholder {instruction}"),
        ("{}", "unknown placeholder {}"),
        ("{instruction} {", "write a literal brace twice"),
        ("nothing", "has no place for {instruction}"),
        ("{instruction}\n--- without input ---\nnothing", "has no place for {instruction}"),
        ("{instruction}\n--- without input ---\n{instruction}{input}", "uses {input} after"),
        (b"\xff", "cannot be read as text"),
    ],
)
def test_mistakes_name_the_file(write, content, message):
    path = write("mine.txt", content)
    with pytest.raises(DataError) as caught:
        load_prompt_template(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_unknown_template_suggests_the_nearest_one():
    with pytest.raises(DataError, match=r"'instructions': .* did you mean 'instruction'"):
        load_prompt_template("instructions")
