"""A complete run that takes seconds: base, tokenizer, data and a configuration file."""

import json
from pathlib import Path

from moe_jax.demo.checkpoint import write_checkpoint
from moe_jax.demo.tokenizer import save_tokenizer, train_tokenizer

CONFIG = """
from pathlib import Path

HERE = Path(__file__).parent

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def source(name):
    return dict(path=str(HERE / f"{name}.jsonl"), schema="completion")


def adapter(rows, **method):
    return dict(
        method=dict(rank=4, alpha=8.0, target_modules=TARGETS, dropout=0.05, **method),
        data=dict(
            train={"words": source(rows)},
            validation={"held_out": source("held_out")},
            max_length=24,
            buckets=(16,),
            sort_window=2,
        ),
        optimizer=dict(
            learning_rate=5e-3, schedule=dict(kind="cosine", warmup_steps=2), weight_decay=0.01
        ),
        batch_size=8,
    )


def get_config():
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32"),
        adapters=dict(
            default=adapter(
                "train",
                name="mixlora",
                num_experts=4,
                top_k=2,
                jitter_noise=0.1,
                losses=dict(load_balance=dict(coefficient=0.01)),
            )
        ),
        training=dict(steps=30, log_every=4, eval_every=10, seed=3),
        checkpoints=dict(every=5, keep=2),
    )
"""

WORDS = "the a red blue small old fox dog bird tree river hill sees finds likes leaves".split()


def write_inputs(folder: Path) -> Path:
    """Writes everything below `folder` and returns the configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, vocab_size=300)
    write_checkpoint(
        folder / "base",
        seed=0,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=300,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_tokenizer(tokenizer, folder / "base")
    for name, count, start in (("train", 100, 0), ("held_out", 11, 1000), ("other", 60, 2000)):
        rows = [_row(start + i) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "config.py"
    config.write_text(CONFIG)
    return config


def _row(i: int) -> dict[str, str]:
    words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(2 + i % 5)]
    return {"prompt": " ".join(words) + " ->", "completion": " " + " ".join(words[::-1])}
