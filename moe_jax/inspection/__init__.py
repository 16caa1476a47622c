"""Inspection of the routing of texts through an adapter, and of base checkpoints."""
