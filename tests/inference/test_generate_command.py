"""`moe-jax generate` with scripted answers: output, files, conversations and errors."""

import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest
from inference.scripted import ScriptedGenerator
from inference.tokenizers_to_try import DEMO_BASE, byte_level
from safetensors.numpy import load_file, save_file

import moe_jax
from moe_jax.cli import main
from moe_jax.config.classification import ClassificationConfig
from moe_jax.inference import api as sessions

TOKENIZER = byte_level()
LORA = moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
CLASSES = ClassificationConfig(labels=("no", "yes"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the demo base, a classifier, and two of a missing and of another base."""
    folder = tmp_path_factory.mktemp("adapters")
    methods = {"one": LORA, "judge": dataclasses.replace(LORA, classification=CLASSES)}
    model = moe_jax.AdaptedModel(moe_jax.load_base(DEMO_BASE), methods)
    model.save("judge", folder / "judge")
    for name in ("one", "two"):
        model.save("one", folder / name)
    description = json.loads((folder / "one" / "adapter.json").read_text())
    for name, change in (("moved", {"path": "/gone"}), ("other", {"fingerprint": "0" * 64})):
        model.save("one", folder / name)
        changed = {**description, "digest": None, "base": {**description["base"], **change}}
        (folder / name / "adapter.json").write_text(json.dumps(changed))
    return folder


def answer(request):
    """Tokens that name the adapter, the sample and the prompt."""
    prompt = TOKENIZER.decode(list(request.tokens), skip_special_tokens=True)
    text = f"{request.adapter or 'base'} {request.sample} to {prompt.split()[-1]}"
    return [*TOKENIZER(text, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]


@pytest.fixture
def scripted(monkeypatch):
    generator = ScriptedGenerator(answer)
    monkeypatch.setattr(sessions, "TokenGenerator", lambda *_, **__: generator)
    monkeypatch.setattr(sessions, "load_params", lambda *_: None)
    return generator


def generate(*arguments):
    return main(["generate", *map(str, arguments)])


def test_a_single_answer_has_no_heading(scripted, adapters, capsys):
    assert generate("--base", DEMO_BASE, "--prompt", "hello") == 0
    assert capsys.readouterr().out == " base 0 to hello\n"
    # The base that the adapter remembers.
    assert generate("--adapter", adapters / "one", "--prompt", "hello", "--stop", "to ") == 0
    assert capsys.readouterr().out == " one 0 \n"


def test_tensors_beside_the_model_are_named(scripted, tmp_path, capsys):
    folder = shutil.copytree(DEMO_BASE, tmp_path / "base")
    heads = {name: np.ones(3, np.float32) for name in ("v_head.bias", "v_head.weight")}
    save_file(load_file(folder / "model.safetensors") | heads, folder / "model.safetensors")
    assert generate("--base", folder, "--prompt", "hello") == 0
    captured = capsys.readouterr()
    assert captured.out == " base 0 to hello\n"
    assert captured.err == (
        f"not read from {folder}, as no part of the model: v_head (2 tensors)\n"
    )


def test_several_prompts_adapters_and_samples_in_order(scripted, adapters, capsys):
    flags = ["--adapter", adapters / "two", "--adapter", f"a={adapters / 'one'}", "--with-base"]
    flags += ["--prompt", "long and longer", "--prompt", "short", "--temperature", 1]
    assert generate(*flags, "--samples", 2, "--batch-size", 5) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[prompt 1, base, sample 1] long and longer\n base 0 to longer\n\n")
    assert re.findall(r"^ (.*)$", shown, re.MULTILINE) == [
        f"{name} {sample} to {word}"
        for word in ("longer", "short")
        for name in ("base", "two", "a")
        for sample in (0, 1)
    ]
    assert max(map(len, scripted.batches)) == 5


ROWS = [
    {"prompt": "first", "id": "x7"},
    {"prompt": "second", "adapter": "one"},
    {"messages": [{"role": "user", "content": "third"}], "adapter": None},
]


def test_prompts_and_answers_in_files(scripted, adapters, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--adapter", adapters / "one", "--adapter", adapters / "two"]
    output = tmp_path / "new" / "out.jsonl"
    flags += ["--prompts", tmp_path / "in.jsonl", "--output", output, "--batch-size", 2]
    assert generate(*flags) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 of 4 answers\n4 of 4 answers\nwrote " in captured.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    text = "one 0 to first"
    first = {"index": 0, "id": "x7", "prompt": "first", "adapter": "one", "sample": 0}
    first |= {"text": f" {text}", "tokens": len(answer_of(text)) + 1, "finish": "stop"}
    assert rows[0] == first
    assert [(row["index"], row["adapter"], row["text"]) for row in rows[1:]] == [
        (0, "two", " two 0 to first"),
        (1, "one", " one 0 to second"),
        (2, None, " base 0 to assistant:"),
    ]
    assert list(output.parent.iterdir()) == [output]
    assert generate(*flags) == 2
    assert "exists already" in capsys.readouterr().err


def answer_of(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def test_an_interrupt_keeps_earlier_batches(scripted, tmp_path, capsys, monkeypatch):
    (tmp_path / "in.txt").write_text("one\n\ntwo words\n")

    def script(request):
        if len(scripted.batches) == 2:
            raise KeyboardInterrupt
        return answer(request)

    scripted.script = script
    output = tmp_path / "out.jsonl"
    flags = ["--base", DEMO_BASE, "--prompts", tmp_path / "in.txt", "--output", output]
    with pytest.raises(SystemExit, match="130"):
        generate(*flags, "--batch-size", 1)
    assert "stopped; 1 of 2 answers are in" in capsys.readouterr().err
    assert [json.loads(line)["prompt"] for line in output.open()] == ["two words"]


def test_a_failure_before_the_first_answer_leaves_no_file(scripted, tmp_path):
    def fails(request):
        raise moe_jax.UserError("no")

    scripted.script = fails
    output = tmp_path / "out.jsonl"
    assert generate("--base", DEMO_BASE, "--prompt", "a", "--output", output) == 2
    assert list(tmp_path.iterdir()) == []


def talk(monkeypatch, capsys, lines, *flags):
    """Types the lines; returns the lines of stdout, and stderr."""
    typed = iter(lines)

    def read(prompt=""):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert generate("--base", DEMO_BASE, "--interactive", *flags) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_a_conversation(scripted, adapters, monkeypatch, capsys):
    seen = []

    def script(request):
        seen.append(TOKENIZER.decode(list(request.tokens), skip_special_tokens=True))
        return answer(request)

    scripted.script = script
    lines = ["hi", "  ", "and?", "/adapter two", "so", "/adapter twoo", "/reset", "new"]
    lines += [KeyboardInterrupt(), "/adapter base", "x", "/halp"]
    flags = ["--chat", "--system", "Be.", "--adapter", f"two={adapters / 'two'}", "--with-base"]
    out, err = talk(monkeypatch, capsys, lines, *flags)
    opening = "system: Be.\nuser: hi\nassistant: "
    assert seen[0] == opening
    assert seen[1].replace(" ", "") == f"{opening}base0toassistant:user:and?\nassistant:".replace(
        " ", ""
    )
    assert seen[3] == "system: Be.\nuser: new\nassistant: "
    assert [line.split()[0] for line in out if line] == ["base", "base", "two", "two", "base"]
    for words in (
        "adapter: two",
        "twoo: did you mean 'two'?",
        "conversation cleared",
        "Ctrl-D ends",
        "/help",
    ):
        assert words in err


def test_an_empty_line_continues(scripted, monkeypatch, capsys):
    out, err = talk(monkeypatch, capsys, ["", "once", "", "/reset", ""], "--max-new-tokens", "2")
    assert len([line for line in out if line]) == 2
    assert [len(batch) for batch in scripted.batches] == [1, 1]
    first, second = (batch[0] for batch in scripted.batches)
    assert second.tokens[: len(first.tokens)] == first.tokens
    assert len(second.tokens) > len(first.tokens)
    assert (first.number, second.number) == (0, 1)
    assert err.count("(stopped at --max-new-tokens 2; an empty line continues)") == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(scripted, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)

    def script(request):
        yield from answer_of("one two")
        signal.raise_signal(signal.SIGINT)
        yield from answer_of("three")
        raise AssertionError("it went on")

    stream = scripted.stream

    def lazily(requests, sampling, **options):
        if len(scripted.batches):
            yield from stream(requests, sampling, **options)
            return
        scripted.batches.append(requests)
        yield from ([token] for token in script(requests[0]))

    scripted.stream = lazily
    out, _ = talk(monkeypatch, capsys, ["first", "second"])
    assert len(out[0]) < len(" one two three") and out[0].startswith(" one two")
    assert out[1] == " base 0 to second"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_that_fills_the_context(scripted, monkeypatch, capsys):
    long = "a b " * 150
    out, err = talk(monkeypatch, capsys, [long, "hi"], "--chat")
    assert "and the context of 256 has no room for an answer; /reset clears it" in err
    assert out[0] == " base 0 to assistant:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt, --prompts, --interactive; got none of them"),
        (["--prompt", "a", "--interactive"], "got --prompt and --interactive"),
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "a", "--prompt", " "], "--prompt 2: is empty"),
        (["--prompt", "a " * 300], r"--prompt: has \d+ tokens, but the context holds 256"),
        (["--prompt", "a", "--max-new-tokens", "255"], "at most 25[0-9] new tokens"),
        (["--prompt", "a", "--top-p", "0.5"], "--top-p: has no effect with temperature 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: must be 0 "),
        (["--prompt", "a", "--samples", "2"], "--samples: with temperature 0 all 2 would be"),
        (["--prompt", "a", "--stop", ""], "--stop: a stop string is empty"),
        (["--prompt", "a", "--system", "b"], "--system: .* give --chat too"),
        (
            ["--prompt", "a", "--chat", "--template", "bare"],
            "--template: .* it or --chat, not both",
        ),
        (["--prompt", "a", "--template", "qestion"], "did you mean 'question'"),
        (
            ["--prompt", "a", "--template", "none"],
            "error: --template: leave it out for none: the text is then given as it is",
        ),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size: must be positive"),
        (["--prompt", "a", "--output", "x.txt"], "--output x.txt: must end in .jsonl"),
        (["--interactive", "--samples", "2", "--temperature", "1"], "--interactive: cannot be"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--prompts", "a.xml"], "a.xml: unknown kind of file; known: .json"),
        (["--prompt", "a", "--adapter", "base=x"], "'base' is the base's name"),
        (["--prompt", "a", "--mesh", "data=99"], "data=99 .* needs 99 devices"),
    ],
)
def test_errors_are_one_line(scripted, capsys, arguments, message):
    assert generate("--base", DEMO_BASE, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert scripted.batches == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moved", "--base: the base of adapter 'moved': /gone: no such folder"),
        ("other", "adapter 'other': was trained on the base .*, and the weights in .* differ"),
        ("missing", "missing: no adapter here"),
        ("judge", "adapter 'judge': is a classifier .* cannot generate text"),
    ],
)
def test_invalid_adapters(scripted, adapters, capsys, name, message):
    assert generate("--prompt", "a", "--adapter", adapters / name) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_relative_path_of_the_base(scripted, adapters, tmp_path, capsys):
    shutil.copytree(adapters / "moved", tmp_path / "moved")
    file = tmp_path / "moved" / "adapter.json"
    file.write_text(file.read_text().replace('"/gone"', '"models/old/llama"'))
    assert generate("--prompt", "a", "--adapter", tmp_path / "moved") == 2
    error = capsys.readouterr().err
    assert "the base of adapter 'moved': models/old/llama: no such folder" in error
    assert "relative to the folder in which the adapter was trained: give the base with" in error
    assert generate("--prompt", "a", "--adapter", adapters / "moved") == 2
    assert "relative" not in capsys.readouterr().err


def test_a_classifier_is_rejected_only_if_it_is_asked(scripted, adapters, tmp_path, capsys):
    flags = ["--adapter", adapters / "one", "--adapter", adapters / "judge"]
    assert generate("--interactive", *flags) == 2
    assert "adapter 'judge': is a classifier" in capsys.readouterr().err
    assert scripted.batches == []
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a", "adapter": "one"}))
    assert generate("--prompts", tmp_path / "in.jsonl", *flags) == 0


def test_adapters_of_several_bases_and_no_base(scripted, adapters, capsys):
    flags = ["--adapter", adapters / "one", "--adapter", adapters / "other"]
    assert generate("--prompt", "a", *flags) == 2
    assert "which differ; give adapters of one base" in capsys.readouterr().err
    assert generate("--prompt", "a") == 2
    assert "--base: give a folder or hub id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "a"}, "line 1: unknown column 'promt'; did you mean 'prompt'"),
        ({"prompt": 3}, "line 1: column 'prompt' must be text, got 3"),
        ({}, "must have either the column 'prompt' or the column 'messages'"),
        ({"prompt": "a", "adapter": "twoo"}, "line 1: adapter 'twoo': is not loaded"),
        ({"messages": []}, "line 1: a conversation must be a list of messages"),
        (1, "line 1: a row must be an object"),
        ([1], "row 1: a row must be an object"),
    ],
)
def test_invalid_rows(scripted, tmp_path, capsys, row, message):
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    assert generate("--base", DEMO_BASE, "--prompts", tmp_path / "in.jsonl") == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--min-p", "(default: 128)", "Ctrl-C stops an answer", "`messages`", "finish"):
        assert words in shown
