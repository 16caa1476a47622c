"""`moe-jax show`."""

import argparse
import math
from pathlib import Path

from moe_jax.checkpoints.adapter_files import read_description
from moe_jax.commands import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """Say what an adapter's folder holds: method, size, and the base it belongs to."""
    parser.add_argument("folder", type=Path, help="an adapter, as in WORKDIR/adapters/NAME")
    return _run


def _run(arguments: argparse.Namespace) -> None:
    description = read_description(arguments.folder)
    size = sum(math.prod(spec.shape) for spec in description.leaves.values())
    print(f"method   {description.method['name']}")
    for field, value in description.method.items():
        if field != "name":
            print(f"         {field} = {value}")
    print(f"size     {size:,} parameters in {len(description.leaves)} leaves")
    print(f"trained  {description.step} steps, moe_jax {description.package_version}")
    print(f"base     {description.base.path}")
    print(f"         fingerprint {description.base.fingerprint[:16]}")
