"""What changes from one step to the next."""

from typing import Any

import flax.struct
import jax

from moe_jax.training.loss_scale import LossScale


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to go on, besides the frozen base and the data's state.

    Attributes:
      step: int32 [], optimiser steps done (skipped ones included).
      adapters: `{name: tree}`, float32.
      opt_state: state of `build_optimizer`'s transform.
      loss_scale: `{name: LossScale}`; empty unless computing in float16.
    """

    step: jax.Array
    adapters: dict[str, Any]
    opt_state: Any
    loss_scale: dict[str, LossScale]
