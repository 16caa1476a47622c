"""Checkpoints of this package, written with Orbax.

- `adapter_files`: folder of one trained adapter, with `training_record` beside its weights.
- `store`: training states for resuming: adapters, optimizer, data position and metadata.
- `leaves`, `restored_tree`, `late_errors`: named leaves, checksums and strict reads of their trees.

The base model is never saved: a fingerprint identifies it. Base models are read in `moe_jax.hf`,
adapters in other tools' formats in `moe_jax.exchange`.
"""
