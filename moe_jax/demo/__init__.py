"""The demo: a tiny Llama with its data, which tests and notebooks use too."""
