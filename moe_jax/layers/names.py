"""Names of Linen collections and modules, and of the arrays that rematerialization may keep."""

PARAMS = "params"
"""Collection of the frozen base parameters."""

ADAPTERS = "adapters"
"""Collection of all trainable leaves."""

ROUTER = "router"
"""Collection of the routing statistics that the layers sow."""

ROUTING = "routing"
"""Collection of each token's routing, sown only if it is mutable."""

CACHE = "cache"
"""Collection of keys, values and counts of earlier tokens; see `moe_jax.layers.kv_cache`."""

CACHE_UPDATES = "cache_updates"
"""Collection of the entries that a decoding step adds to the cache or replaces in it."""

NARROW_PRODUCT = "narrow_product"
"""Product of a frozen projection whose output is not as wide as the FFN (attention, down), with the
deltas of the adapters."""

WIDE_PRODUCT = "wide_product"
"""Product of a frozen projection whose output is as wide as the FFN (gate, up), with the deltas of
the adapters."""

ATTENTION = "attention"
"""Output and log-sum-exps of blocked attention. If kept, the backward pass computes the scores once
instead of twice."""

LOW_RANK = "low_rank"
"""Low-rank activations of adapters and decisions of routers: a few numbers for each token."""

DORA_NORMS = "dora_norms"
"""Column norms of DoRA's adapted weights, which do not depend on the tokens."""

MODULE_PREFIX = "adapter_"
"""Prefix of the names of adapters' Linen modules: `adapter_x` is a module of the adapter `x`."""
