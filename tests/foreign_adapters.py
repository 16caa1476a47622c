"""Adapters with large random weights, and their logits in other libraries."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from mixlora import MixLoraModelForCausalLM
from peft import PeftModel
from transformers import LlamaForCausalLM

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves, nested_dict
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse_member
from moe_jax.hf.base_model import BaseIdentity
from moe_jax.loaded.adapter_base import expected_leaves

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]

PAIR = {"rank": 4, "alpha": 8.0, "target_modules": ATTENTION + FFN}
LORA = {"name": "lora", **PAIR}
MIXLORA = {"name": "mixlora", **PAIR, "num_experts": 4, "router": {"name": "top_k", "top_k": 2}}
TOP_P = {"name": "top_p", "top_p": 0.7, "renormalise": False}
SWITCH = {"name": "switch", "capacity": 5, "overflow": "input"}
LORAMOE = {"name": "loramoe", **PAIR, "num_experts": 3}
MOLA = {"name": "mola", **PAIR, "num_experts": [3], "router": {"name": "top_k", "top_k": 2}}


def random_adapter(
    method: dict[str, Any], model: ModelConfig, base: str = "some/base", *, spread: float = 0.2
) -> SavedAdapter:
    """An adapter with distinct nonzero weights.

    Args:
      method: as in a configuration.
      model: the base's architecture.
      base: what the adapter says its base is.
      spread: standard deviation of the weights.
    """
    parsed = parse_member(METHODS, method, "method")
    rng = np.random.default_rng(0)
    leaves = {}
    for path, spec in expected_leaves(model, parsed).items():
        name = path.rpartition("/")[2]
        # A magnitude is about as long as a column of a random projection.
        center = 1.0 if name == "magnitude" else 0.0
        leaves[path] = (center + spread * rng.standard_normal(spec.shape)).astype(spec.dtype)
    tree = jax.tree.map(jax.numpy.asarray, nested_dict(leaves))
    return SavedAdapter(parsed, tree, model, BaseIdentity(base, "0" * 64), 7)


def require_same_bits(actual: SavedAdapter, expected: SavedAdapter) -> None:
    """Requires all leaves of two adapters to have the same bits."""
    leaves, references = named_leaves(actual.tree), named_leaves(expected.tree)
    assert leaves.keys() == references.keys()
    for path, leaf in references.items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path, strict=True)


def mixlora_logits(folder: Path, tokens: np.ndarray, **kwargs: Any) -> np.ndarray:
    """Logits of the mixlora package with the adapter in `folder`."""
    model, _ = MixLoraModelForCausalLM.from_pretrained(str(folder), **kwargs)
    return _logits(model.eval(), tokens)


def peft_logits(
    base: LlamaForCausalLM, folder: Path, tokens: np.ndarray, **kwargs: Any
) -> np.ndarray:
    """Logits of PEFT with the adapter in `folder` on a base, which is restored afterwards."""
    model = PeftModel.from_pretrained(base, str(folder), **kwargs)
    logits = _logits(model.eval(), tokens)
    model.unload()
    return logits


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()
