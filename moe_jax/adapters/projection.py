"""A frozen projection with the deltas of the adapters that target it."""

from collections.abc import Mapping

import flax.linen as nn
import jax

from moe_jax.adapters.method import AdapterContext, FrozenProjection, windows_of
from moe_jax.adapters.rows import AdapterRows, replace_rows, take_rows
from moe_jax.layers.frozen import FrozenLinear


class AdaptedLinear(FrozenLinear):
    """A frozen projection with the adapters that target it.

    The frozen product is computed once for all rows; each adapter changes its own rows of it.

    The module's own name, for example `q_proj`, is the target that adapters are looked up by.

    Attributes:
      adapter_rows: rows of each adapter; see `moe_jax.adapters.rows`.
    """

    adapter_rows: tuple[AdapterRows, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        contexts: Mapping[str, AdapterContext],
        *,
        product: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The adapted projection with its bias, [B, S, out].

        Args:
          x: input, [B, S, in].
          contexts: context of each adapter.
          product: `self.product(x)`, possibly already updated by adapters of the FFN; computed if
            None.
          deterministic: turns dropout and jitter off.
        """
        product = self.product(x) if product is None else product
        # Where only sums with deltas are kept, no delta is computed again.
        keeps_sums = all(rows.method.is_additive for rows in self.adapter_rows)
        product = product if keeps_sums else self.kept(product)
        adapted = {}
        for rows in self.adapter_rows:
            adapter = rows.method.projection_adapter(str(self.name), self.axes)
            if adapter is None:
                continue
            module = adapter.clone(parent=self, name=rows.module_name)
            context = contexts[rows.name]
            frozen = FrozenProjection(take_rows(rows, product, context.window), self.kernel)
            own = take_rows(rows, x, context.window)
            adapted[rows.name] = module(own, frozen, context, deterministic=deterministic)
        y = replace_rows(self.adapter_rows, product, adapted, windows_of(contexts))
        y = self.kept(y) if keeps_sums else y
        return y if self.bias is None else y + self.bias[None, None]
