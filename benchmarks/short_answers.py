"""Preference training of an instruction model towards short answers, and what it costs.

    python benchmarks/short_answers.py --base models/SmolLM2-135M-Instruct --data alpaca.json

The preference set is made from instruction data: the first sentence of an answer is preferred to
its first three. DPO trains a MixLoRA on it. Before and after, the script measures the length of
generated answers, the accuracy of the rewards on held-out pairs, and the cross-entropy of held-out
answers in full, which shows what is lost of the model.

`--data` is a JSON list of objects with `instruction`, `input` and `output`. The outputs and the run
are written to `--output`.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import moe_jax
from benchmarks.report import machine, say
from moe_jax.data.batch import TokenSequence, pad_rows
from moe_jax.data.encoding import encode_examples, make_examples
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.training.records.metric_lines import read_metrics
from moe_jax.training.step.loss import row_losses

LENGTH = 128
"""Largest number of tokens of a row."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a model on short answers.")
    parser.add_argument("--base", required=True, help="folder of an instruction model")
    parser.add_argument("--data", type=Path, required=True, help="instruction rows, a JSON list")
    parser.add_argument("--output", type=Path, default=Path("short_answers"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step, two a pair")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--held-out", type=int, default=16, help="held-out pairs, and texts")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts to answer")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer at most")
    arguments = parser.parse_args()
    say(json.dumps(machine()))
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    held_out = arguments.held_out
    pairs, texts = preference_set(json.loads(arguments.data.read_text()), held_out)
    write(folder / "held_out.jsonl", pairs[:held_out])
    write(folder / "train.jsonl", pairs[held_out:])
    say(f"{len(pairs) - held_out} pairs to train on, {held_out} held out")
    moe_jax.train(config(arguments), folder / "run")
    report(arguments, pairs[: arguments.prompts], texts, folder / "run")


def preference_set(
    rows: list[dict[str, str]], held_out: int
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Pairs of a first sentence and three sentences; and further rows as conversations."""
    pairs, texts = [], []
    for row in rows:
        paragraph = row["output"].partition("\n")[0]
        sentences = re.findall(r"[^.!?]+[.!?]+(?=\s|$)", paragraph)
        prompt = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}]
        short, long = (" ".join(map(str.strip, sentences[:count])) for count in (1, 3))
        if len(prompt[0]["content"]) > 200 or len(short) < 15 or len(long) > 350:
            continue
        if len(long) > len(short):
            answers = {
                name: [{"role": "assistant", "content": text}]
                for name, text in (("chosen", short), ("rejected", long))
            }
            pairs.append({"prompt": prompt, **answers})
        elif len(texts) < held_out:
            texts.append([*prompt, {"role": "assistant", "content": row["output"]}])
    return pairs, texts


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.output
    return {
        "base": {"path": arguments.base, "param_dtype": "float32"},
        "compute": {"dtype": "float32"},
        "adapters": {
            "short": {
                "method": {
                    "name": "mixlora",
                    "rank": 8,
                    "alpha": 16.0,
                    "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
                    "num_experts": 4,
                    "router": {"name": "top_k", "top_k": 2},
                    "losses": {"load_balance": {"coefficient": 0.01}},
                },
                # A short run sees few of the pairs.
                "preference": {
                    "name": "dpo",
                    "beta": arguments.beta,
                    "reference_log_probs": "step",
                },
                "data": {
                    "train": {"pairs": {"path": str(folder / "train.jsonl")}},
                    "validation": {"held_out": {"path": str(folder / "held_out.jsonl")}},
                    "max_length": LENGTH,
                },
                "optimizer": {
                    "learning_rate": arguments.learning_rate,
                    "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
                },
                "batch_size": arguments.batch_size,
            }
        },
        "training": {"steps": arguments.steps, "log_every": 2},
    }


def report(
    arguments: argparse.Namespace,
    pairs: list[dict[str, Any]],
    texts: list[Any],
    run: Path,
) -> None:
    """Prints lengths, rewards and cross-entropy before and after training."""
    base = moe_jax.load_base(arguments.base)
    saved = moe_jax.load_adapter(run / "adapters" / "short")
    model = moe_jax.AdaptedModel(base, {"short": saved.method})
    model.adapters["short"] = saved.tree
    measured = read_metrics(run / "metrics.jsonl")
    prefix = "validation/short/held_out/"
    for line in measured:
        found = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        if found:
            names = ("loss", "reward_accuracy", "reward_margin", "reference_kl")
            values = "  ".join(f"{name} {found[name]:.4f}" for name in names)
            say(f"held-out pairs, step {line['step']}: {values}")
    prompts = [pair["prompt"] for pair in pairs]
    for name in (None, "short"):
        answers = moe_jax.generate(
            model, prompts, name, max_new_tokens=arguments.new_tokens, chat=True
        )
        words = [len(answer.split()) for answer in answers]
        title = name or "base"
        say(f"{title}: {statistics.fmean(words):.1f} words an answer, {sorted(words)}")
        say(f"{title}: {answers[0]!r}")
        say(
            f"{title}: {cross_entropy(model, name, arguments.base, texts):.4f} nats a token of text"
        )


def cross_entropy(
    model: moe_jax.AdaptedModel, adapter: str | None, base: str, texts: list[list[dict[str, str]]]
) -> float:
    """Mean cross-entropy of the answers of conversations, in nats a token."""
    tokenizer = load_tokenizer(Path(base))
    rows = []
    for number, messages in enumerate(texts):
        fields = dict.fromkeys(("system", "tools", "documents", "chat_template_kwargs"), "")
        row = {"messages": json.dumps(messages), "where": f"text {number + 1}", **fields}
        (encoded,) = encode_examples(
            make_examples(row, "chat", None, tokenizer), tokenizer, train_on_prompt=False
        )
        tokens, mask = (np.asarray(part[:LENGTH]) for part in encoded)
        rows.append(TokenSequence(tokens.astype(np.int32), mask, expert_group=0))
    total = count = 0.0
    for start in range(0, len(rows), 8):
        batch = pad_rows(rows[start : start + 8], 8, [LENGTH])
        losses, counts = row_losses(model(batch.tokens, adapter, batch.segment_ids), batch)
        total, count = total + float(losses.sum()), count + float(counts.sum())
    return total / count


if __name__ == "__main__":
    main()
