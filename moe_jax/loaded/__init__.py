"""Base models and adapters that are loaded for use.

- `adapter_base`: opens the base model of an adapter and checks that they match.
- `inference_model`: builds the model, and loads parameters and adapters onto the devices.
- `run_adapters`, `rank_match`: adapters of runs that have not finished, and their ranks.
- `adapter_measurement`: compares logits and measures expert loads on text.

It serves inference, evaluation, inspection, surgery and export. Training builds its model in
`moe_jax.training.step`. Files are read in `moe_jax.hf` and `moe_jax.checkpoints`.
"""
