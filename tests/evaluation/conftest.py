"""Fixtures: a tiny base with a tokenizer, an adapter of it, and the data of every task."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation.families import FAMILIES
from hf_models import save_tiny_llama

import moe_jax
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer
from moe_jax.evaluation.model_evaluation import EvaluationOptions, evaluate

CONTEXT = 512
METHOD = moe_jax.LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))


class Setting(NamedTuple):
    """Inputs of evaluations; `reference` and `reference_adapted` are models of transformers."""

    base: Path
    adapter: Path
    data: Path
    tokenizer: Any
    reference: Any
    reference_adapted: Any


@pytest.fixture(scope="session")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("evaluation")
    texts = [prompt for family in FAMILIES.values() for prompt, *_ in family.expected]
    # Letters are tokens with the blank before them; of `true` and `false` each is several.
    letters = [f"Answer: {letter}" for letter in "ABCDE"] * 20
    tokenizer = train_tokenizer([*texts, *letters], vocab_size=440)
    base = folder / "base"
    reference = save_tiny_llama(
        base, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, num_hidden_layers=2
    )
    save_tokenizer(tokenizer, base)

    model = moe_jax.AdaptedModel(moe_jax.load_base(base), {"tuned": METHOD})
    tree = jax.tree.map(np.asarray, model.adapters["tuned"])
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), tree)
    model.adapters["tuned"] = tree
    model.save("tuned", folder / "tuned")

    write_data(folder / "tasks")
    adapted = _merged(reference, tree, METHOD.alpha / METHOD.rank)
    return Setting(base, folder / "tuned", folder / "tasks", tokenizer, reference, adapted)


def _merged(model, tree, scale):
    """`model` with W + scale * B A instead of every adapted W."""
    model = copy.deepcopy(model)
    for index, layer in enumerate(model.model.layers):
        for block, projection in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            pair = tree["layers"][block][projection]
            delta = scale * pair["lora_A"][index] @ pair["lora_B"][index]
            with torch.no_grad():
                getattr(getattr(layer, block), projection).weight += torch.tensor(delta.T)
    return model


def evaluate_with(base, tasks, adapters=None, *, with_base=False, output=None, **options):
    """`evaluate` with the fields of its options as keywords."""
    options = EvaluationOptions(**options)
    return evaluate(base, tasks, adapters, with_base=with_base, output=output, options=options)


def write_data(folder: Path) -> None:
    """Writes the rows of every task in the format of their hub data sets."""
    for task, family in FAMILIES.items():
        for name, rows in family.files.items():
            write_rows(folder / task / name, rows)


def write_rows(file: Path, rows: list) -> str:
    """Writes rows in the format of the file extension and returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
