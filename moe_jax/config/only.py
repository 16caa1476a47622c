"""Some of the adapters that a configuration file describes."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.parse import ROOT, suggest
from moe_jax.errors import ConfigError

ONLY = "only"
"""The field of a configuration that names them."""


def only_named(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the adapters that its field `only` names, and without that field.

    A file can so describe adapters that are trained beside another one on demand: `only="lora"`
    trains that one alone, `only=("mixlora", "lora")` both, and `only=None` all that there are.

    Args:
      raw: nested mappings, as `parse_run_config` takes them.

    Raises:
      ConfigError: there is no adapter of a given name, or none is named.
    """
    raw = {**raw}
    names, adapters = raw.pop(ONLY, None), raw.get("adapters")
    if names is None or not isinstance(adapters, Mapping):
        return raw
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(f"{ROOT}.{ONLY}: expected names of adapters, or None, got {names!r}")
    for name in names:
        if name not in adapters:
            raise ConfigError(
                f"{ROOT}.{ONLY}: there is no adapter {name!r}; {suggest(str(name), adapters)}"
            )
    raw["adapters"] = {name: adapter for name, adapter in adapters.items() if name in names}
    return raw
