"""A random base, its tokenizer and rows of random words, as files that a run reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sizes import hf_fields, model_of
from moe_jax.adapters import METHODS
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer, write_checkpoint

VOCAB_SIZE = 512
WORDS = tuple(f"word{i}" for i in range(200))
BASE, ROWS = "base", "rows.jsonl"


def write_tokenizer(folder: Path) -> Any:
    """Writes a small byte-level tokenizer and returns it."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, vocab_size=VOCAB_SIZE)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def write_base(folder: Path, size: str) -> None:
    """A checkpoint of the named size, in float32, with a tokenizer."""
    fields = hf_fields(model_of(size, VOCAB_SIZE))
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_checkpoint(folder, seed=0, **fields, **ends)


def write_rows(file: Path, count: int) -> None:
    """Prompts, and completions of 5 to 60 words."""
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(count))
    lines = (json.dumps({"prompt": "say:", "completion": f" {text}"}) + "\n" for text in texts)
    with file.open("w") as stream:
        stream.writelines(lines)


def run_config(
    folder: Path, adapters: int, rows: int, data: Mapping[str, Any], **groups: Any
) -> RunConfig:
    """MixLoRA, 8 experts of rank 8, top-2, on what lies in `folder`.

    Args:
      folder: with `BASE` and `ROWS`.
      adapters: how many train at once.
      rows: of each, in a step.
      data: fields of the data besides the source.
      groups: further groups of the configuration.
    """
    source = {"path": str(folder / ROWS), "schema": "completion"}
    method = {
        "name": "mixlora",
        "num_experts": 8,
        "router": {"name": "top_k", "top_k": 2},
        "rank": 8,
        "alpha": 16.0,
        "target_modules": TARGET_MODULES,
    }
    adapter = {
        "method": method,
        "data": {"train": {"rows": source}, **data},
        "optimizer": {"learning_rate": 1e-4},
        "batch_size": rows,
    }
    raw = {
        "base": {"path": str(folder / BASE), "param_dtype": "float32"},
        "compute": {"dtype": "float32"},
        "adapters": {f"adapter{i}": adapter for i in range(adapters)},
        **groups,
    }
    return parse_run_config(raw, METHODS)
