"""Names of the Linen variable collections."""

PARAMS = "params"
"""The frozen base parameters."""
ADAPTERS = "adapters"
"""Every trainable leaf."""
ROUTER = "router"
"""Routing statistics that the layers sow."""
