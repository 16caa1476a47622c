"""Names of the Linen variable collections."""

PARAMS = "params"
"""The frozen base parameters."""
ADAPTERS = "adapters"
"""Every trainable leaf."""
ROUTER = "router"
"""Routing statistics that the layers sow."""
CACHE = "cache"
"""What decoding remembers of the tokens before; see `moe_jax.layers.kv_cache`."""
CACHE_UPDATES = "cache_updates"
"""What a call adds to the cache, or puts in the place of what is there."""
ROUTING = "routing"
"""Every token's routing, which the layers sow only if asked for it."""


# FIXME docstring of the merged layers.kept_names:
# """The names by which rematerialisation policies know what may be kept for the backward pass."""


NARROW_PRODUCT = "narrow_product"
"""A frozen projection's product as wide as the model, or narrower: those of attention."""

WIDE_PRODUCT = "wide_product"
"""A projection's product as wide as the FFN: frozen, or as MixLoRA's first slot has it."""

ATTENTION = "attention"
"""The result and the log-sum-exps of attention in blocks. Where they are kept, the backward pass
computes the scores once and not twice."""

CODES = "codes"
"""A low-rank pair's codes and a router's decision, a few numbers a token."""

DORA_NORMS = "dora_norms"
"""The lengths of adapted weights' columns; none depends on the tokens."""
