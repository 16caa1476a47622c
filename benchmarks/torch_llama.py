"""Llama of transformers with weights of this package. Needs torch, transformers and numpy."""

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
    """Mapping of the arrays `NAME.npy` of a folder, each read on access."""

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
    """Builds a transformers model that is equivalent to the package's model.

    Args:
      fields: fields of its `config.json`.
      arrays: leaves by dotted path; bfloat16 leaves may be int16 arrays of the same bits.
      dtype: dtype of the weights.
      device: device of the weights.
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
    """Copies A and B of all seven projections to a peft LoRA.

    Args:
      model: peft model of a model of `torch_llama`.
      arrays: leaves `adapter.layers.BLOCK.PROJECTION.lora_A` and `lora_B`.
    """
    for block, name in target_modules():
        for leaf in ("lora_A", "lora_B"):
            stack = arrays[f"adapter.layers.{block}.{name}.{leaf}"]
            for layer, weight in zip(model.base_model.model.model.layers, stack, strict=True):
                _copy(getattr(getattr(getattr(layer, block), name), leaf)["default"], weight.T)


def target_modules() -> Iterator[tuple[str, str]]:
    """Yields the seven projections, as pairs of module and projection name."""
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
