"""A tiny Llama and data of the project's own: what the demo, the tests and the notebooks share."""
