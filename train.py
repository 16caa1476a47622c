"""Trains adapters on a frozen Llama; the same as `moe-jax train`.

    python train.py --config configs/tiny_mixlora.py
    python train.py --config configs/tiny_mixlora.py --config.training.steps=50
    python train.py --config configs/llama7b_mixlora.py --plan --devices 8

The same command again resumes where the run stopped. `--help` describes all flags.
"""

import sys

from moe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], own_process=True))
