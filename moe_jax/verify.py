"""`python -m moe_jax.verify`, the same as `moe-jax verify`."""

import sys

from moe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]], own_process=True))
