"""The commands in README and docs; run as a script, executes those that work offline on a CPU.

    python tests/documented_commands.py        # ten minutes on two cores
    python tests/documented_commands.py export # those that contain a text

They run in a temporary folder that has what the text assumes: the demo's base in place of the
models, small files of rows, and short runs. `NOT_RUN` says why each other one is left out.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("[!_]*/*.md"))),
    "docs/getting_started.md",
    "docs/extending.md",
)
PROGRAM = re.compile(
    r"(\$ )?(moe-jax|python|pip|make|uv|docker|sbatch|gcloud|vllm|llama-server|scripts/\S+"
    r"|\.venv/\S+)\s"
)

# The first pattern that a command contains says why it is not run here, and what does run it.
NOT_RUN = {
    r"^pip install (-e|-c|.?moe-jax)": "installs: scripts/check_wheel.sh does",
    r"^uv pip": "installs: `make demo` does where uv is there",
    r"^(make|\.venv/)": "a target of the Makefile: CI runs each",
    r"^(docker|gcloud|sbatch)": "needs a daemon, TPUs or a cluster",
    r"^scripts/run_on_hosts": "needs hosts that share a folder",
    r"--distributed": "several processes: tests/processes",
    r"^(vllm|llama-server|pip install gguf)|convert_\w+_to_gguf|sglang": "programs of others",
    r"arc_easy,boolq": "needs the hub: tests/evaluation evaluates these tasks on files",
    r"--compile-for": "needs the extra cuda13 or tpu: tests/compiled",
    r"llama7b_\w+\.py( --workdir \S+)?$|llama3_2_1b|smollm2_tasks": "needs a base of the hub",
    r"benchmarks/": "a benchmark: tests/benchmarks",
    r"moe-jax demo$|^make compare": "scripts/check_wheel.sh and tests/demo",
}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Command(NamedTuple):
    """A command of a page, on one line, without a comment at its end."""

    page: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((why for p, why in NOT_RUN.items() if re.search(p, self.text)), None)


def documented() -> list[Command]:
    """The commands of all pages, each once."""
    found = (Command(page, text) for page in PAGES for text in _commands(ROOT / page))
    return list({command.text: command for command in found}.values())


def _commands(page: Path) -> list[str]:
    """Commands in indented blocks and in blocks of the languages that show a shell."""
    language: str | None = None
    commands, begun = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if fence := re.match(r"\s*(?:```|:::)(\S*)", line):
            language = None if language is not None else fence[1]
            continue
        if language not in (None, "bash", "console") or not (language or line.startswith("    ")):
            continue
        text = begun + line.strip()
        begun = f"{text[:-1].strip()} " if text.endswith("\\") else ""
        if not begun and PROGRAM.match(f"{text} "):
            commands.append(" ".join(re.sub(r"\s#.*", "", text).removeprefix("$ ").split()))
    return commands


def run(command: Command, folder: Path) -> tuple[int, float, str]:
    """Exit status, seconds and last line of a command in `folder`."""
    text = command.text.replace(BASE, "models/llama")
    words = shlex.split(text)
    words[:1] = {
        "moe-jax": [sys.executable, "-m", "moe_jax"],
        "python": [sys.executable],
    }.get(words[0], words[:1])
    trains = re.search(r"moe-jax train|train\.py", text) and "--plan" not in text
    words += ["--set", "training.steps=40"] * bool(trains)
    start = time.monotonic()
    with subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "serve" in words and "http://" in line:
                process.send_signal(signal.SIGTERM)
    status = 0 if "serve" in words and process.returncode == 143 else process.returncode
    last = [line.strip() for line in lines if line.strip()][-1:] or [""]
    return status, time.monotonic() - start, last[0] if status == 0 else "".join(lines[-12:])


def prepare(folder: Path) -> None:
    """Writes the models, rows and runs that the pages assume."""
    for name in ("configs", "moe_jax", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").unlink()
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "models").mkdir()
    for name in ("llama", "llama-chat"):
        (folder / "models" / name).symlink_to(ROOT / "moe_jax" / "demo" / "base")
    facts = [(f"{a} + {b} is", f"{a + b}.") for a in range(8) for b in range(8)]
    rows = {
        "train": [{"instruction": q, "output": a} for q, a in facts],
        "pairs": [{"prompt": q, "chosen": f" {a}", "rejected": " 99."} for q, a in facts],
        "questions": [{"prompt": q} for q, _ in facts[:3]],
        "quiz": [{"question": q, "choices": [a, "99."], "answer": 0} for q, a in facts[:8]],
    }
    (folder / "data").mkdir()
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        for file in (folder / f"{name}.jsonl", folder / "data" / f"{name}.jsonl"):
            file.write_text(text)
    shutil.copy(folder / "train.jsonl", folder / "data" / "mine.jsonl")
    shutil.copy(folder / "train.jsonl", folder / "data" / "questions.jsonl")
    (folder / "data" / "stories.txt").write_text("The sky is blue.\nHot is not cold.\n")
    (folder / "quiz.txt").write_text("{question}\n")
    for name, method in (("mine", ""), ("lora", " --method lora")):
        train = f"moe-jax train --base models/llama --data train.jsonl --workdir runs/{name}"
        status, _, last = run(Command("", f"{train}{method}"), folder)
        if status:
            sys.exit(f"the run {name} failed: {last}")
    for name in ("a", "b", "mix"):
        (folder / "runs" / name).symlink_to("mine")
    config = (folder / "runs" / "mine" / "config.py").read_text()
    (folder / "configs" / "mine.py").write_text(config)


def main(wanted: str) -> int:
    """Runs the commands that contain `wanted`, and returns how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = [command for command in documented() if wanted in command.text]
        prepare(folder)
        for command in commands:
            if command.reason is not None:
                print(
                    f"not run  {command.page}: {command.text}\n         {command.reason}",
                    flush=True,
                )
                continue
            status, seconds, last = run(command, folder)
            failed += status != 0
            word = "ok      " if status == 0 else f"FAILED {status}"
            print(
                f"{word} {command.page}: {command.text}\n         {seconds:.0f} s: {last}",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
