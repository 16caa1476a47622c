"""Ranks that follow from a size: `method.rank` as `match:NAME` or `parameters:N`.

The rank depends on the base. Until it is known, a configuration has a `MatchedMethod` in place of
the method; `moe_jax.loaded.rank_match` replaces it.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moe_jax.config.parse import ROOT, Registry, parse_member, suggest, to_plain
from moe_jax.errors import ConfigError

_RANK, _ALPHA = "rank", "alpha"
_OF_ADAPTER, _OF_NUMBER = "match:", "parameters:"


class MatchedMethod(Mapping[str, Any]):
    """Plain fields of a method whose rank is still to be chosen; written as they were given.

    Attributes:
      adapter: name of the adapter whose number of parameters is matched; None with `parameters`.
      parameters: number of parameters that is matched; None with `adapter`.
      classification, new_tokens: see `AdapterMethod`.
    """

    def __init__(self, methods: Registry, fields: Mapping[str, Any], path: str):
        """Checks all fields but the rank.

        Args:
          methods: adapter methods.
          fields: fields of the method; the rank is text.
          path: path of the method in the configuration, for messages.

        Raises:
          ConfigError: a field is invalid.
        """
        self._methods, self._given, self._path = methods, dict(fields), path
        rank = fields[_RANK]
        adapter = rank.removeprefix(_OF_ADAPTER) if rank.startswith(_OF_ADAPTER) else None
        count = rank.removeprefix(_OF_NUMBER).replace(",", "").replace("_", "")
        is_count = re.fullmatch(r"\d{1,18}", count) is not None and int(count) > 0
        is_number = rank.startswith(_OF_NUMBER) and is_count
        if not adapter and not is_number:
            raise ConfigError(
                f"{path}.{_RANK}: expected a number, 'match:NAME' with the name of another adapter "
                f"or 'parameters:N', got {rank!r}"
            )
        self.adapter = adapter
        self.parameters = int(count) if is_number else None
        smallest = self.with_rank(1)
        given = {name: fields[name] for name in (_RANK, _ALPHA) if name in fields}
        self._plain = {**to_plain(smallest), **given}
        self.classification, self.new_tokens = smallest.classification, smallest.new_tokens
        self.check_expert_groups = smallest.check_expert_groups

    def with_rank(self, rank: int) -> Any:
        """The method with this rank."""
        return parse_method({**self._given, _RANK: rank}, self._methods, self._path)

    def matching(self, adapter: str) -> "MatchedMethod":
        """The same method matched to another adapter."""
        fields = {**self._given, _RANK: f"{_OF_ADAPTER}{adapter}"}
        return MatchedMethod(self._methods, fields, self._path)

    def __getitem__(self, name: str) -> Any:
        return self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def parse_method(method: Any, methods: Registry, path: str) -> Any:
    """Creates the method of an adapter.

    Besides numbers, `rank` may be `match:NAME` or `parameters:N`, and `alpha` a multiple of the
    rank, such as `2*rank`.

    Args:
      method: fields of the method, or the method itself.
      methods: adapter methods.
      path: path of the method in the configuration, for messages.

    Returns:
      The method; a `MatchedMethod` if its rank depends on the base.

    Raises:
      ConfigError: a field is invalid.
    """
    if isinstance(method, Mapping):
        rank, alpha = method.get(_RANK), method.get(_ALPHA)
        if isinstance(rank, str):
            return MatchedMethod(methods, method, path)
        if isinstance(alpha, str):
            factor = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *\* *rank", alpha)
            if factor is None:
                raise ConfigError(
                    f"{path}.{_ALPHA}: expected a number or a multiple of the rank, such as "
                    f"'2*rank', got {alpha!r}"
                )
            # The check of the rank's type is that of `parse_member`.
            multiple = 1.0
            if isinstance(rank, int) and abs(rank) < 2**63:
                multiple = float(factor[1]) * rank
            method = {**method, _ALPHA: multiple}
    return parse_member(methods, method, path)


def check_matches(
    adapters: Mapping[str, Any], unswept: Mapping[str, Any], left_out: Collection[str]
) -> dict[str, Any]:
    """Requires that each matched adapter is in the run and that no adapters match each other.

    A match with the template of a sweep becomes one with the first adapter of the sweep.

    Args:
      adapters: fields of the adapters of the run by name, their methods parsed.
      unswept: the same before the sweep replaced its template.
      left_out: adapters of the configuration that `train_only` leaves out.

    Raises:
      ConfigError: an adapter matches one that is unknown or left out, itself, one that matches it,
        or a template whose method is swept.
    """
    checked = dict(adapters)
    for name, fields in adapters.items():
        target = _target(fields)
        if target is not None and target not in adapters:
            field = f"{ROOT}.adapters.{name}.method.{_RANK}"
            if target in left_out:
                raise ConfigError(
                    f"{field}: {_OF_ADAPTER}{target} is the size of an adapter that "
                    f"{ROOT}.train_only leaves out; add {target!r} to train_only, or give a number"
                )
            member = _member(target, adapters, unswept, field)
            checked[name] = {**fields, "method": fields["method"].matching(member)}
    for name, fields in checked.items():
        chain, target = [name], _target(fields)
        while target is not None and target not in chain:
            chain.append(target)
            target = _target(checked[target])
        if target == name:
            circle = " matches ".join(map(repr, [*chain, name]))
            raise ConfigError(
                f"{ROOT}.adapters.{name}.method.{_RANK}: {circle}; give one of them a number"
            )
    return checked


def _target(fields: Any) -> str | None:
    """Name of the adapter that an adapter's rank matches."""
    method = fields.get("method") if isinstance(fields, Mapping) else None
    return method.adapter if isinstance(method, MatchedMethod) else None


def _member(
    template: str, adapters: Mapping[str, Any], unswept: Mapping[str, Any], field: str
) -> str:
    """First adapter of the sweep over `template`, if all of them have the same method."""
    if template not in unswept:
        hint = suggest(template, adapters)
        raise ConfigError(f"{field}: this run has no adapter {template!r}; {hint}")
    members = [name for name in adapters if name not in unswept]
    methods = [to_plain(adapters[name]["method"]) for name in members]
    if any(method != methods[0] for method in methods):
        raise ConfigError(
            f"{field}: the sweep over {template!r} changes its method; name one of its adapters, "
            f"such as {members[0]!r}"
        )
    return members[0]
