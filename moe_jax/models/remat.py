"""What is kept of a decoder layer for its backward pass; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.layers.names import (
    ATTENTION,
    CODES,
    DORA_NORMS,
    NARROW_PRODUCT,
    WIDE_PRODUCT,
)

_POLICIES = jax.checkpoint_policies

_SMALL = (DORA_NORMS, CODES, ATTENTION)


def _keep(*names: str, dots: bool = False) -> Callable[..., Any]:
    """Keeps what has one of these names, and with `dots` all products with weights."""
    named = _POLICIES.save_only_these_names(*names)
    if dots:
        named = _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, named)
    # cuDNN's attention keeps its result and log-sum-exps too, which jax does not name.
    return _POLICIES.save_from_both_policies(
        named, lambda primitive, *_, **__: "dot_product_attention_fwd" in primitive.name
    )


REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "dots": _keep(*_SMALL, dots=True),
    "frozen": _keep(*_SMALL, NARROW_PRODUCT, WIDE_PRODUCT),
    "narrow": _keep(*_SMALL, NARROW_PRODUCT),
    "full": _POLICIES.save_only_these_names(DORA_NORMS),
}
"""By `ComputeConfig.remat`; `none` is no policy, and keeps everything."""

_KEEP_ALL_PRODUCTS = ("none", "dots")


def recomputes_experts(remat: str) -> bool:
    """Whether the experts' hidden activations are computed again: see `AdapterContext`."""
    return remat not in _KEEP_ALL_PRODUCTS
