"""Looking inside: what the routers of an adapter do with texts, and what a base checkpoint is."""
