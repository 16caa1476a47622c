"""`python -m moe_jax` is the `moe-jax` command."""

import sys

from moe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
