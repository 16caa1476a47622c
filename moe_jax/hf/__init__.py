"""Base models in the format of Hugging Face.

- `base_model`: locates a base model in a folder or on the hub, and fingerprints it.
- `config`, `fields`, `rope`: read `config.json` into a `ModelConfig`.
- `wrapper`: the language model inside a model that also reads images.
- `families`: one file for each model family, with its fields and its key table.
- `key_table`, `shards`, `load`: read safetensors into a sharded parameter tree, and back.

Adapters in other tools' formats, and uploads to the hub, are in `moe_jax.exchange`; adapters and
training states of this package are in `moe_jax.checkpoints`.
"""
