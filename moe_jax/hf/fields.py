"""The fields of a Hugging Face `config.json`, each checked when it is read."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.parse import parse
from moe_jax.errors import CheckpointError


class HFFields:
    """A group of fields, and what a missing one means.

    The raw file is read, not transformers' view of it: transformers 5 and the versions before it
    state some things differently, and each fills in what a file leaves out.

    Attributes:
      mapping: the fields, as read from JSON.
      where: the file, and the group in it, for messages.
      seen: the keys that were asked for.
    """

    def __init__(self, mapping: Mapping[str, Any], where: str, defaults: Mapping[str, Any]):
        """The fields of `mapping`.

        Args:
          mapping: see the class.
          where: see the class.
          defaults: by key, what leaving the field out means.
        """
        self.mapping, self.where, self._defaults = mapping, where, defaults
        self.seen: set[str] = set()

    def error(self, key: str, reason: str) -> CheckpointError:
        """The error that refuses the field `key`, to be raised."""
        return CheckpointError(f"{self.where}: {key}: {reason}")

    def optional(self, key: str, kind: Any) -> Any:
        """The field, checked to be of type `kind`; None where it is missing or null."""
        self.seen.add(key)
        value = self.mapping.get(key)
        return None if value is None else parse(kind, value, f"{self.where}: {key}")

    def get(self, key: str, kind: Any) -> Any:
        """The field; its default where it is missing or null, an error where it has none."""
        value = self.optional(key, kind)
        if value is not None:
            return value
        if key not in self._defaults:
            raise self.error(key, "this field is required and was not given")
        return self._defaults[key]

    def has_default(self, key: str) -> bool:
        """Whether leaving the field out means something."""
        return key in self._defaults

    def nullable(self, key: str, kind: Any) -> Any:
        """The field, where null means that there is no such thing, and missing the default."""
        if key in self.mapping:
            return self.optional(key, kind)
        return self.get(key, kind)

    def group(self, key: str) -> Mapping[str, Any]:
        """A group of fields, nulls left out; empty where it is missing or null."""
        value = self.mapping.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected a group of fields, got {type(value).__name__}")
        return {name: item for name, item in value.items() if item is not None}
