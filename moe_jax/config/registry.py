"""Families of interchangeable dataclasses, of which a configuration picks one by name."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

NAME = "name"
"""The field by which a configuration picks the member."""


class Registry(Mapping[str, type]):
    """The members of one family, by the name that a configuration gives.

    A member is a frozen dataclass: at once the configuration of the thing and the thing. It enters
    itself with `@REGISTRY.register("its_name")` when its module is imported, wherever that module
    lives. Where a dataclass has a field of the family's base class, `parse` picks the member by the
    field `name` of the given mapping.
    """

    def __init__(self, kind: str):
        """An empty registry.

        Args:
          kind: what its members are called in messages, for example `router`.
        """
        self.kind = kind
        self._members: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorates a frozen dataclass, which `name` stands for from then on.

        Raises:
          ValueError: the name is taken.
        """

        def enter(cls: T) -> T:
            if name in self._members:
                taken_by = self._members[name]
                raise ValueError(
                    f"the {self.kind} name {name!r} is taken by "
                    f"{taken_by.__module__}.{taken_by.__qualname__}; register another"
                )
            self._members[name] = cls
            return cls

        return enter

    def name_of(self, member: Any) -> str:
        """The name under which the class of `member` is registered."""
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


def family_of(cls: Any) -> Registry | None:
    """The registry whose base class `cls` is, if it is one.

    A family's base class names its registry in a class attribute `registry`; members inherit it,
    but stand for themselves alone.
    """
    registry = vars(cls).get("registry") if isinstance(cls, type) else None
    return registry if isinstance(registry, Registry) else None


def to_plain(value: Any) -> Any:
    """`value` as nested dicts, lists and scalars, from which `parse` makes an equal value.

    Dataclasses become dicts of their fields; members of a family also get their `name`.
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
