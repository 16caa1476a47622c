"""A frozen projection with the deltas of the adapters that target it."""

import flax.linen as nn
import jax

from moe_jax.adapters.segments import Segment, update_rows
from moe_jax.adapters.sites import module_name
from moe_jax.layers.projection import FrozenLinear


class AdaptedLinear(FrozenLinear):
    """The frozen product of all rows, once; then each adapter changes its own rows.

    Attributes:
      segments: which rows belong to which adapter; see `moe_jax.adapters.segments`.

    The module's own name (`q_proj`) is the target that the adapters are asked for.
    """

    segments: tuple[Segment, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        y = self.project(x)
        for segment in self.segments:
            adapter = segment.method.projection_adapter(str(self.name), self.axes)
            if adapter is not None:
                adapter = adapter.clone(parent=self, name=module_name(segment.name))
                rows = x[segment.start : segment.stop]
                y = update_rows(
                    segment, y, lambda y, x=rows, f=adapter: f(x, y, deterministic=deterministic)
                )
        return y
