"""`moe-jax show`."""

import argparse
import math
from pathlib import Path

from moe_jax.commands import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """Say what an adapter's folder holds: method, size, training, and the base it belongs to."""
    parser.add_argument(
        "folder", type=Path, help="an adapter, as in WORKDIR/adapters/NAME, or a hub id"
    )
    return _run


def _run(arguments: argparse.Namespace) -> None:
    from moe_jax.checkpoints.adapter_files import read_description
    from moe_jax.checkpoints.training_record import read_record
    from moe_jax.hf.base_model import resolve_adapter
    from moe_jax.inspection.base_description import leaf_modules, module_lines

    folder = resolve_adapter(arguments.folder)
    description, record = read_description(folder), read_record(folder)
    size = sum(math.prod(spec.shape) for spec in description.leaves.values())
    print(f"method   {description.method['name']}")
    for field, value in description.method.items():
        if field != "name":
            print(f"         {field} = {value}")
    print(f"size     {size:,} parameters in {len(description.leaves)} leaves")
    for line in module_lines(leaf_modules(description.leaves)):
        print(f"       {line}")
    print(f"trained  {description.step} steps, moe_jax {description.package_version}")
    if record is not None:
        optimizer = record.optimizer
        rate = optimizer.get("learning_rate")
        print(f"         {optimizer.get('name')}, learning rate {rate}, ", end="")
        print(f"{record.batch_size} rows a step, seed {record.seed}")
        if record.start_from is not None:
            print(f"         began from {record.start_from}")
        for use, sets in (("train", record.train), ("validation", record.validation)):
            for name, data in sets.items():
                print(f"data     {use} {name}: {data.rows:,} rows of {data.path or data.task}")
        losses = {"training": record.training_loss, **record.validation_losses}
        known = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
        if known:
            print(f"loss     {', '.join(known)}")
        for kind, measured in (
            ("metrics", record.validation_metrics),
            ("tasks", record.accuracies),
        ):
            for name, own in measured.items():
                values = [f"{k} {v:.4f}" for k, v in own.items() if v is not None]
                print(f"{kind:9}{name}: {', '.join(values)}")
    print(f"base     {description.base.path}")
    print(f"         fingerprint {description.base.fingerprint[:16]}")
