"""What is kept of a decoder layer for its backward pass; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.layers.kept_names import (
    ATTENTION,
    CODES,
    DORA_NORMS,
    NARROW_PRODUCT,
    WIDE_PRODUCT,
)

_POLICIES = jax.checkpoint_policies

_SMALL = (DORA_NORMS, CODES, ATTENTION)

REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable,
        _POLICIES.save_only_these_names(DORA_NORMS),
    ),
    "frozen": _POLICIES.save_only_these_names(*_SMALL, NARROW_PRODUCT, WIDE_PRODUCT),
    "narrow": _POLICIES.save_only_these_names(*_SMALL, NARROW_PRODUCT),
    "full": _POLICIES.save_only_these_names(DORA_NORMS),
}
"""By `ComputeConfig.remat`; `none` is no policy, and keeps everything."""
