"""Routing strategies, one a file; importing this package enters all of them in `ROUTERS`."""

from moe_jax.adapters.routing.router import ROUTERS as ROUTERS
from moe_jax.adapters.routing.strategies import SoftRouter as SoftRouter
from moe_jax.adapters.routing.strategies import TopKRouter as TopKRouter
from moe_jax.adapters.routing.strategies import TopPRouter as TopPRouter
from moe_jax.adapters.routing.switch import SwitchRouter as SwitchRouter
