"""MixLoRA on the demo's tiny Llama and data; a few minutes on two CPU cores.

    moe-jax demo --only-data
    python train.py --config configs/tiny_mixlora.py --workdir demo_output/run

`make demo` is both in one, and compares the result with the frozen base. The fields are in
`moe_jax/demo/tiny_mixlora.py`, which is part of the package.
"""

from moe_jax.demo.tiny_mixlora import TASKS, get_config, source

__all__ = ["TASKS", "get_config", "source"]
