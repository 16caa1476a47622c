"""Routing strategies, one a file; importing this package enters all of them in `ROUTERS`."""

from moe_jax.adapters.router import ROUTERS as ROUTERS
from moe_jax.adapters.routers.soft import SoftRouter as SoftRouter
from moe_jax.adapters.routers.switch import SwitchRouter as SwitchRouter
from moe_jax.adapters.routers.top_k import TopKRouter as TopKRouter
from moe_jax.adapters.routers.top_p import TopPRouter as TopPRouter
