"""Strict parsing of nested mappings into frozen dataclasses, chosen by name from registries.

Types are checked, unknown fields are refused with the nearest known name, and every message has the
full path of the field (`config.adapters.default.rank`). The only conversions are lossless: `int` to
`float` and `list` to `tuple`.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from moe_jax.errors import ConfigError
from moe_jax.terminal import describe_value, value_text

T = TypeVar("T", bound=type)

ROOT = "config"
"""First part of the path of every field."""

NONE_ADVICE = "none_advice"
"""Key of a dataclass field's `metadata`: advice for a message where None is a likely mistake."""

NAME = "name"
"""Field that names the member of a registry."""


class Registry(Mapping[str, type]):
    """Interchangeable dataclasses by name, for example all routers.

    A member is a frozen dataclass, which is both the configuration of an object and the object. It
    is registered with `@REGISTRY.register("its_name")` when its module is imported, also from
    outside of this package. Where a dataclass has a field of the members' base class, `parse`
    chooses the member by the field `name` of the given mapping.
    """

    def __init__(self, kind: str):
        """Creates an empty registry.

        Args:
          kind: noun for a member in messages, for example `router`.
        """
        self.kind = kind
        self._members: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers a frozen dataclass under `name`.

        Raises:
          ValueError: the name is taken.
        """

        def add(cls: T) -> T:
            if name in self._members:
                taken_by = self._members[name]
                raise ValueError(
                    f"the {self.kind} name {name!r} is taken by "
                    f"{taken_by.__module__}.{taken_by.__qualname__}; register another"
                )
            self._members[name] = cls
            return cls

        return add

    def name_of(self, member: Any) -> str:
        """Name under which the class of `member` is registered."""
        for name, cls in self._members.items():
            if type(member) is cls:
                return name
        raise ValueError(f"{type(member).__qualname__} is not a registered {self.kind}")

    def __getitem__(self, name: str) -> type:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def registry_of(cls: Any) -> Registry | None:
    """Registry of the members derived from `cls`; None if `cls` is not such a base class.

    The base class names its registry in a class attribute `registry`. Members inherit it, but are
    no base classes themselves.
    """
    registry = vars(cls).get("registry") if isinstance(cls, type) else None
    return registry if isinstance(registry, Registry) else None


def to_plain(value: Any) -> Any:
    """Converts `value` to nested dicts, lists and scalars, which `parse` converts back.

    Dataclasses become dicts of their fields; members of a registry also get their `name`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: to_plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
        registry = getattr(value, "registry", None)
        return {NAME: registry.name_of(value), **fields} if registry is not None else fields
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def suggest(name: Any, known: Iterable[str]) -> str:
    """Hint for an unknown name: the nearest known name, or else the list of all known names."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none are known here"


def parse(hint: Any, value: Any, path: str = ROOT) -> Any:
    """Checks `value` against the type `hint` and converts it to that type.

    Args:
      hint: a dataclass, the base class of a registry's members (see `Registry`), a builtin scalar,
        `Literal`, `X | None`, `tuple[X, ...]`, `X | tuple[X, ...]` or `dict[str, X]`. In a `dict`
        of members, the key is the default of a member's `name`.
      value: plain Python data: mappings, lists, tuples and scalars.
      path: path of the value in the configuration, for messages.

    Raises:
      ConfigError: an unknown or missing field, a wrong type, or a value that a dataclass's
        `__post_init__` refused.
    """
    registry = registry_of(hint)
    if registry is not None:
        return parse_member(registry, value, path)
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            choices = ", ".join(repr(choice) for choice in args)
            hint_text = ""
            if isinstance(value, str):
                near = difflib.get_close_matches(value, [a for a in args if isinstance(a, str)], 1)
                hint_text = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{path}: {value_text(value)} is not one of {choices}{hint_text}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        if len(inner) > 1:  # one value, or a tuple of several
            is_tuple = isinstance(value, list | tuple)
            inner = [a for a in inner if (typing.get_origin(a) is tuple) == is_tuple]
        return parse(inner[0], value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a tuple, got {describe_value(value)}")
        return tuple(parse(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping):
        mapping = _as_mapping(value, path)
        for key in mapping:
            if not isinstance(key, str):
                raise ConfigError(f"{path}: expected names as keys, got {describe_value(key)}")
        if registry_of(args[1]) is not None:
            mapping = {
                key: {NAME: key, **item} if isinstance(item, Mapping) else item
                for key, item in mapping.items()
            }
        return {key: parse(args[1], item, f"{path}.{key}") for key, item in mapping.items()}
    return _parse_scalar(hint, value, path)


def parse_member(registry: Registry, value: Any, path: str) -> Any:
    """Creates the member of a registry that the field `name` of `value` names.

    Raises:
      ConfigError: as in `parse`; also for an unknown or missing name.
    """
    if type(value) in registry.values():
        return value  # made in Python, and checked by its own `__post_init__`
    fields = dict(_as_mapping(value, path))
    if NAME not in fields:
        raise ConfigError(
            f"{path}.{NAME}: this field is required and was not given; {suggest('', registry)}"
        )
    name = fields.pop(NAME)
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(
            f"{path}.{NAME}: unknown {registry.kind} {value_text(name)}; {suggest(name, registry)}"
        )
    return _parse_dataclass(registry[name], fields, path)


def _parse_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return _plain(value, path)
    if hint in (int, float):
        _require_number_in_range(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {describe_value(value)}")
    return value


def _require_number_in_range(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: expected a finite number, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: expected a number of 64 bits, got {describe_value(value)}")


def _plain(value: Any, path: str) -> Any:
    """Checks a field of any type, which must have a form in JSON or be a parsed dataclass."""
    if isinstance(value, dict):
        return parse(dict[str, Any], value, path)
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, int | float):
        _require_number_in_range(value, path)
    elif not isinstance(value, str | Mapping | None) and not dataclasses.is_dataclass(value):
        raise ConfigError(
            f"{path}: expected text, a number, a list or a group, got {describe_value(value)}"
        )
    return value


_type_hints = functools.cache(typing.get_type_hints)


def _parse_dataclass(cls: Any, value: Any, path: str) -> Any:
    mapping = _as_mapping(value, path)
    hints = _type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in mapping:
        if name not in fields:
            raise ConfigError(f"{path}.{name}: unknown field; {suggest(name, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in mapping
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: this field is required and was not given")
    kwargs = {}
    for name, item in mapping.items():
        try:
            kwargs[name] = parse(hints[name], item, f"{path}.{name}")
        except ConfigError as error:
            if item is None and NONE_ADVICE in fields[name].metadata:
                raise ConfigError(f"{error}; {fields[name].metadata[NONE_ADVICE]}") from None
            raise
    with located(path):
        return cls(**kwargs)


def _as_mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a group of fields, got {describe_value(value)}")
    return value


class FieldError(ConfigError):
    """Invalid field, raised by a dataclass's `__post_init__`; `parse` adds the dataclass's path."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def require(condition: bool, field: str, reason: str) -> None:
    """Raises a `FieldError` for a dataclass's `field` unless `condition` holds."""
    if not condition:
        raise FieldError(field, reason)


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
    """Turns a `FieldError` raised within this context into a `ConfigError` with the full path."""
    try:
        yield
    except FieldError as error:
        raise ConfigError(f"{path}.{error.field}: {error.reason}") from None


@contextlib.contextmanager
def field_prefix(field: str) -> Iterator[None]:
    """Prefixes the field of a `FieldError` raised within this context with `field`."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"{field}.{error.field}", error.reason) from None
