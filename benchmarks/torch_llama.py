"""transformers' Llama with weights of ours; needs torch, transformers and numpy, and no jax."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

_TARGETS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")


class ArrayFolder(Mapping[str, np.ndarray]):
    """Arrays of a folder of `NAME.npy`, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __getitem__(self, name: str) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob("*.npy"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def torch_llama(
    fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, device: str
) -> Any:
    """A transformers model that computes what ours does.

    Args:
      fields: of its `config.json`.
      arrays: our leaves, by their path with dots; bfloat16 ones may come as int16 of the same bits.
      dtype: of the weights.
      device: where they go.
    """
    config = LlamaConfig(**fields, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    _copy(model.model.embed_tokens, arrays["embed_tokens.embedding"])
    _copy(model.model.norm, arrays["norm.scale"])
    if not config.tie_word_embeddings:
        _copy(model.lm_head, arrays["lm_head.kernel"].T)
    for name in _NORMS:
        for layer, scale in zip(model.model.layers, arrays[f"layers.{name}.scale"], strict=True):
            _copy(getattr(layer, name), scale)
    for block, name in target_modules():
        kernels = arrays[f"layers.{block}.{name}.kernel"]
        for layer, kernel in zip(model.model.layers, kernels, strict=True):
            _copy(getattr(getattr(layer, block), name), kernel.T)
    return model


def copy_pairs(model: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets the A and B of a peft LoRA on all seven projections to ours.

    Args:
      model: around a model of `torch_llama`.
      arrays: our leaves `adapter.layers.BLOCK.PROJECTION.lora_A` and `lora_B`.
    """
    for block, name in target_modules():
        for leaf in ("lora_A", "lora_B"):
            stack = arrays[f"adapter.layers.{block}.{name}.{leaf}"]
            for layer, weight in zip(model.base_model.model.model.layers, stack, strict=True):
                _copy(getattr(getattr(getattr(layer, block), name), leaf)["default"], weight.T)


def target_modules() -> Iterator[tuple[str, str]]:
    """The seven projections, each with the block that it stands in."""
    for block, names in _TARGETS.items():
        for name in names:
            yield block, name


def _copy(module: Any, weight: np.ndarray) -> None:
    bits = np.ascontiguousarray(weight)
    if bits.dtype.name == "bfloat16":
        bits = bits.view(np.int16)
    tensor = torch.from_numpy(bits.copy())
    if tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    with torch.no_grad():
        assert module.weight.shape == tensor.shape, (module, tensor.shape)
        module.weight.copy_(tensor)
