"""Generated inputs of a training run: a random base, its tokenizer and rows of random words."""

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
    """Writes a float32 checkpoint of a named size, with a tokenizer."""
    fields = hf_fields(model_of(size, VOCAB_SIZE))
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    write_checkpoint(folder, seed=0, **fields, **ends)


def write_rows(file: Path, count: int) -> None:
    """Writes rows of a prompt and a completion of 5 to 60 words."""
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(count))
    lines = (json.dumps({"prompt": "say:", "completion": f" {text}"}) + "\n" for text in texts)
    with file.open("w") as stream:
        stream.writelines(lines)


def run_config(
    folder: Path, adapters: int, rows: int, data: Mapping[str, Any], **groups: Any
) -> RunConfig:
    """Configures a run of MixLoRA adapters with 8 experts of rank 8 and top-2 routing.

    Args:
      folder: folder with `BASE` and `ROWS`.
      adapters: number of adapters.
      rows: number of rows of each adapter in a step.
      data: data fields except the source.
      groups: other groups of the configuration.
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
