"""Trains adapters on a frozen Llama.

    python train.py --config configs/tiny_mixlora.py --workdir runs/tiny
    python train.py --config configs/tiny_mixlora.py --workdir runs/tiny --config.training.steps=50

The same command again resumes where the run stopped. `--plan` compiles the step without weights and
prints the memory it needs, on simulated devices:

    python train.py --config configs/llama7b_mixlora.py --plan --devices 8

Exit status: 0 done, 2 invalid input (one line on stderr), 130 and 143 interrupted by Ctrl-C or
SIGTERM, with the state saved.
"""

import sys

from absl import flags

from moe_jax.commands import train

flags.adopt_module_key_flags(train)  # for --help

if __name__ == "__main__":
    sys.exit(train.main(sys.argv))
