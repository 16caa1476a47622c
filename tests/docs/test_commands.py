"""The commands in README and docs parse, and name targets, files, modules and extras that exist.

`tests/documented_commands.py` executes those that work offline.
"""

import re
import shlex
import tomllib

import pytest
from documented_commands import NOT_RUN, ROOT, documented

from moe_jax import cli

COMMANDS = documented()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def starting(*programs):
    found = [c for c in COMMANDS if c.text.split()[0] in programs]
    return pytest.mark.parametrize("command", found, ids=lambda command: command.text)


def test_commands_are_found():
    assert len(COMMANDS) > 40
    # Every reason is that of a command.
    unused = [p for p in NOT_RUN if not any(re.search(p, c.text) for c in COMMANDS)]
    assert not unused


@starting("moe-jax")
def test_flags_are_known(command, monkeypatch):
    parse(shlex.split(command.text)[1:], monkeypatch)


@starting("python")
def test_scripts_take_their_flags(command, monkeypatch):
    words = shlex.split(command.text)[1:]
    if words[0] == "train.py":
        parse(["train", *words[1:]], monkeypatch)
    elif words[0] == "-m":
        assert words[1] == "sglang.launch_server"
    elif not words[0].startswith("convert_"):  # llama.cpp's
        source = (ROOT / words[0]).read_text()
        assert [word for word in words if word.startswith("--") and word not in source] == []


@starting("make")
def test_targets_exist(command):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{command.text.split()[1]}:", makefile, re.MULTILINE)


@starting("pip", "uv", "docker", "sbatch", "scripts/run_on_hosts.sh")
def test_extras_and_files_exist(command):
    extras = re.findall(r"\[([\w,-]+)\]|--extra (\S+)", command.text)
    assert {name for pair in extras for name in pair if name} <= set(EXTRAS)
    for file in re.findall(r"scripts/\S+|docker/\S+|constraints\.txt", command.text):
        assert (ROOT / file).exists()


def test_a_wrong_flag_is_seen(monkeypatch):
    with pytest.raises(SystemExit):
        parse(["export", "--adaptor", "runs/mine"], monkeypatch)


def parse(arguments, monkeypatch):
    """Parses the arguments of `moe-jax`, without running the command."""
    parsed = []

    def only_parse(add):
        def add_and_stop(parser):
            add(parser)
            return parsed.append

        return add_and_stop

    commands = {name: only_parse(add) for name, add in cli.COMMANDS.items()}
    monkeypatch.setattr(cli, "COMMANDS", commands)
    assert cli.main(arguments) == 0
