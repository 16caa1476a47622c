"""A frozen projection with the deltas of the adapters that target it."""

from collections.abc import Mapping

import flax.linen as nn
import jax

from moe_jax.adapters.method import AdapterContext, Finish, FrozenProjection
from moe_jax.adapters.rows import Segment, take_rows, update_rows
from moe_jax.adapters.tree import module_name
from moe_jax.layers.frozen import FrozenLinear


class AdaptedLinear(FrozenLinear):
    """The frozen product of all rows, once; then each adapter changes its own rows.

    Attributes:
      segments: which rows belong to which adapter; see `moe_jax.adapters.rows`.

    The module's own name (`q_proj`) is the target that the adapters are asked for.
    """

    segments: tuple[Segment, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        product: jax.Array,
        contexts: Mapping[str, AdapterContext],
        *,
        deterministic: bool = True,
        finish: Mapping[str, Finish] | None = None,
    ) -> jax.Array:
        """The adapted projection, with its bias.

        Args:
          x: the input, [B, S, in].
          product: what `product` made of it, [B, S, out].
          contexts: by adapter.
          deterministic: no dropout and no jitter.
          finish: by adapter, what its `mlp_adapter` left to be done to the product.
        """
        updates = dict(finish or {})
        for segment in self.segments:
            adapter = segment.method.projection_adapter(str(self.name), self.axes)
            if adapter is not None:
                updates[segment.name] = self._update(segment, adapter, x, contexts, deterministic)
        y = update_rows(self.segments, product, updates)
        return y if self.bias is None else y + self.bias

    def _update(
        self,
        segment: Segment,
        adapter: nn.Module,
        x: jax.Array,
        contexts: Mapping[str, AdapterContext],
        deterministic: bool,
    ) -> Finish:
        module = adapter.clone(parent=self, name=module_name(segment.name))
        rows, context = take_rows(segment, x), contexts[segment.name]

        def update(product: jax.Array) -> jax.Array:
            frozen = FrozenProjection(product, self.kernel)
            return module(rows, frozen, context, deterministic=deterministic)

        return update
