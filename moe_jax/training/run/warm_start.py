"""Adapters that a run begins from, instead of fresh ones."""

import fnmatch
from pathlib import Path
from typing import Any

from moe_jax.adapters.method import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter, read_description
from moe_jax.checkpoints.leaves import leaf_specs, require_same_leaves
from moe_jax.config.parse import parse_member, to_plain
from moe_jax.config.run import RunConfig
from moe_jax.errors import CheckpointError, ConfigError, named
from moe_jax.hf.fingerprint import BaseIdentity
from moe_jax.training.run.workdir import flat_fields
from moe_jax.training.step.program import Program

MAY_DIFFER = (
    "classification.init_std",
    "classification.metrics",
    "dropout",
    "expert_lora.dropout",
    "ffn_dropout",
    "init",
    "losses*",
    "router.init_std",
    "router.jitter_noise",
)
"""Fields of a method that only training reads: none changes what given weights compute."""


def require_starts(config: RunConfig, base: BaseIdentity) -> None:
    """Refuses what the adapters cannot begin from; reads no weights.

    Raises:
      ConfigError: a folder holds no adapter, or one of another base or method; names the field.
    """
    for name, adapter in config.adapters.items():
        if adapter.start_from is None:
            continue
        folder = Path(adapter.start_from).expanduser()
        field = f"config.adapters.{name}.start_from"
        with named(field):
            description = read_description(folder)
            if description.base.fingerprint != base.fingerprint:
                raise CheckpointError(
                    f"{folder} was trained on the base {description.base.path}, and the weights in "
                    f"{base.path} differ from it; give that base, or another adapter"
                )
            try:
                saved = parse_member(METHODS, description.method, "method")
            except ConfigError as error:
                raise CheckpointError(f"{folder}: {error}") from None
            _require_same_method(to_plain(saved), to_plain(adapter.method), folder)


def load_starts(program: Program) -> dict[str, Any]:
    """The weights of the adapters that do not begin fresh, by name, on the program's mesh.

    Raises:
      CheckpointError: a folder is damaged, or its weights are not those of its method.
    """
    starts = {}
    for name, adapter in program.config.adapters.items():
        if adapter.start_from is None:
            continue
        folder = Path(adapter.start_from).expanduser()
        with named(f"config.adapters.{name}.start_from"):
            leaves = leaf_specs(program.abstract_state.adapters[name])
            require_same_leaves(read_description(folder).leaves, leaves, str(folder))
            starts[name] = load_adapter(folder, program.state_shardings.adapters[name]).tree
    return starts


def _require_same_method(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    before, now, absent = flat_fields(saved), flat_fields(wanted), object()
    for field in ("name", *sorted(before.keys() | now.keys())):
        if any(fnmatch.fnmatchcase(field, pattern) for pattern in MAY_DIFFER):
            continue
        former, given = before.get(field, absent), now.get(field, absent)
        if former != given:
            shown = ["absent" if value is absent else repr(value) for value in (former, given)]
            raise ConfigError(
                f"{folder} has method.{field} {shown[0]}, and the configuration {shown[1]}; give "
                "the adapter's own method, which `moe-jax show` prints"
            )
