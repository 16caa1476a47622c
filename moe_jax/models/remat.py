"""Rematerialization policies: the arrays of a decoder layer that are kept for its backward pass."""

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.layers.names import ATTENTION, DORA_NORMS, LOW_RANK, NARROW_PRODUCT, WIDE_PRODUCT

_POLICIES = jax.checkpoint_policies

_SMALL = (DORA_NORMS, LOW_RANK, ATTENTION)


def _keep(*names: str, dots: bool = False) -> Callable[..., Any]:
    """Keeps arrays with one of these names, and with `dots` all products with weights."""
    named = _POLICIES.save_only_these_names(*names)
    if dots:
        named = _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, named)
    # cuDNN's attention keeps its output and log-sum-exps too, which jax does not name.
    return _POLICIES.save_from_both_policies(
        named, lambda primitive, *_, **__: "dot_product_attention_fwd" in primitive.name
    )


REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "dots": _keep(*_SMALL, dots=True),
    "frozen": _keep(*_SMALL, NARROW_PRODUCT, WIDE_PRODUCT),
    "narrow": _keep(*_SMALL, NARROW_PRODUCT),
    "full": _POLICIES.save_only_these_names(DORA_NORMS),
}
"""Policy of each value of `ComputeConfig.remat` but `none`, which keeps everything."""
