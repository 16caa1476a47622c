"""Text of others on the terminal: shown, cut, and never executed."""

import io

import numpy as np
import pytest

from moe_jax.cli import main
from moe_jax.commands.generate_output import AnswerPrinter
from moe_jax.errors import ConfigError, report
from moe_jax.inference.text_generator import Answer
from moe_jax.terminal import describe_value, print_shown, shortened, shown

TITLE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\tcells\nand a line", "two\tcells\nand a line"),
        ("naïve 漢字 👩‍🔬", "naïve 漢字 👩‍🔬"),  # with a joiner, which is no control character
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\rb\x08\x7f", r"a\rb\x08\x7f"),
        ("\x9b2J", r"\x9b2J"),  # the sequence in one character
        ("\u202eexe.txt", r"\u202eexe.txt"),
        ("\ud800", r"\ud800"),
    ],
)
def test_controls_are_escapes(text, expected):
    assert shown(text) == expected


def test_a_stream_that_cannot_encode_a_character():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_shown("é", end="", file=stream)
    assert stream.buffer.getvalue() == rb"\xe9"


def test_a_long_message_keeps_its_ends(capsys):
    message = f"config.x: got {'v' * 5000}; give a number"
    assert report(ConfigError(message)) == 2
    line = capsys.readouterr().err
    assert len(line) <= 1010 and line.count("\n") == 1
    assert line.startswith("error: config.x: got vvv") and line.endswith("; give a number\n")
    assert shortened("short") == "short"


class Odd:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        (3, "int (3)"),
        (np.arange(4).reshape(2, 2), "ndarray (array([[0, 1], [2, 3]]))"),
        ("x" * 99, f"str ('{'x' * 56}...)"),
        (10**5000, "int (ValueError when shown)"),
        (Odd(), "Odd (RuntimeError when shown)"),
    ],
    ids=["none", "int", "array", "long", "huge", "odd"],  # pytest cannot print them either
)
def test_values_in_messages(value, expected):
    assert describe_value(value) == expected


def test_names_of_files_and_flags(tmp_path, capsys):
    assert main(["show", str(tmp_path / TITLE)]) == 2
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path), "--" + TITLE])
    err = capsys.readouterr().err
    assert "\x1b" not in err and err.count(r"\x1b]0;title\x07") == 2


def test_generated_text(capsys):
    printer = AnswerPrinter([("1", TITLE)], samples=1)
    printer.add([Answer(0, 0, f"red {TITLE}\r\n", 3, "stop")])
    assert capsys.readouterr().out == "[1] \\x1b]0;title\\x07\nred \\x1b]0;title\\x07\\r\n\n\n"
