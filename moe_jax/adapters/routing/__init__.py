"""Routers: strategies, their statistics, and auxiliary losses.

A new routing strategy is a frozen dataclass derived from `Router` and decorated with
`@ROUTERS.register("its_name")`, in a file that this package imports. A new
auxiliary loss is the same with `RouterLoss` and `ROUTER_LOSSES`, in `losses.py`.
"""

from moe_jax.adapters.routing import losses as _losses  # noqa: F401  registers the losses
from moe_jax.adapters.routing.router import ROUTERS as ROUTERS
from moe_jax.adapters.routing.strategies import SoftRouter as SoftRouter
from moe_jax.adapters.routing.strategies import TopKRouter as TopKRouter
from moe_jax.adapters.routing.strategies import TopPRouter as TopPRouter
from moe_jax.adapters.routing.switch import SwitchRouter as SwitchRouter
