"""Strict parser: accepted values, refusals, and the path in its messages."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from moe_jax.config.parse import FieldError, field_prefix, located, parse, require, suggest
from moe_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float
    kind: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        require(self.rate > 0, "rate", "must be positive")


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    inner: Inner
    flag: bool = False
    name: str = "default"
    limit: float | None = 1.0
    sizes: tuple[int, ...] = ()
    groups: dict[str, Inner] = field(default_factory=dict)
    free: Any = None


MINIMAL = {"count": 3, "inner": {"rate": 0.5}}


def test_defaults_fill_what_is_left_out():
    expected = Outer(
        count=3,
        inner=Inner(rate=0.5, kind="linear"),
        flag=False,
        name="default",
        limit=1.0,
        sizes=(),
        groups={},
        free=None,
    )
    assert parse(Outer, MINIMAL) == expected


def test_only_lossless_conversions_are_made():
    parsed = parse(
        Outer,
        {
            "count": 3,
            "inner": {"rate": 2},
            "limit": 7,
            "sizes": [4, 8],
            "groups": {"a": {"rate": 1, "kind": "cosine"}},
        },
    )
    assert type(parsed.inner.rate) is float and parsed.inner.rate == 2.0
    assert type(parsed.limit) is float and parsed.limit == 7.0
    assert parsed.sizes == (4, 8)
    assert parsed.groups == {"a": Inner(rate=1.0, kind="cosine")}


def test_one_value_or_a_tuple_of_several():
    hint = str | tuple[str, ...]
    assert parse(hint, "a") == "a"
    assert parse(hint, ["a", "b"]) == parse(hint, ("a", "b")) == ("a", "b")
    for value, words in ((5, "config: expected str"), (["a", 5], r"config\[1\]: expected str")):
        with pytest.raises(ConfigError, match=words):
            parse(hint, value)


def test_none_is_accepted_for_optional_fields():
    parsed = parse(Outer, {**MINIMAL, "limit": None, "free": None})
    assert parsed.limit is None and parsed.free is None


@pytest.mark.parametrize("value", [1, "text", [1, 2], {"a": None}])
def test_a_field_of_any_type_is_passed_through(value):
    assert parse(Outer, {**MINIMAL, "free": value}).free == value


REFUSED = {
    "unknown_field": ({"cuont": 3, "inner": {"rate": 1.0}}, "config.cuont", "'count'"),
    "unknown_inner_field": ({"count": 3, "inner": {"rat": 1.0}}, "config.inner.rat", "'rate'"),
    "far_from_all_fields": ({**MINIMAL, "zzzzzz": 1}, "config.zzzzzz", "known: count, flag, free"),
    "missing_field": ({"inner": {"rate": 1.0}}, "config.count", "required"),
    "missing_inner_field": ({"count": 1, "inner": {}}, "config.inner.rate", "required"),
    "text_for_int": ({**MINIMAL, "count": "3"}, "config.count", "expected int, got str ('3')"),
    "float_for_int": ({**MINIMAL, "count": 3.0}, "config.count", "expected int, got float (3.0)"),
    "bool_for_int": ({**MINIMAL, "count": True}, "config.count", "expected int, got bool (True)"),
    "bool_for_float": ({**MINIMAL, "inner": {"rate": True}}, "config.inner.rate", "expected float"),
    "bool_for_optional": ({**MINIMAL, "limit": False}, "config.limit", "expected float, got bool"),
    "int_for_bool": ({**MINIMAL, "flag": 1}, "config.flag", "expected bool, got int (1)"),
    "none_for_int": ({**MINIMAL, "count": None}, "config.count", "expected int, got None"),
    "none_for_group": ({**MINIMAL, "inner": None}, "config.inner", "a group of fields, got None"),
    "value_for_group": ({**MINIMAL, "inner": 3}, "config.inner", "a group of fields, got int (3)"),
    "text_for_tuple": ({**MINIMAL, "sizes": "4"}, "config.sizes", "expected a tuple, got str"),
    "none_for_tuple": ({**MINIMAL, "sizes": None}, "config.sizes", "expected a tuple, got None"),
    "wrong_item": ({**MINIMAL, "sizes": [1, 2.5]}, "config.sizes[1]", "expected int, got float"),
    "wrong_in_dict": ({**MINIMAL, "groups": {"a": {"rate": "x"}}}, "config.groups.a.rate", "float"),
    "list_for_dict": ({**MINIMAL, "groups": []}, "config.groups", "expected a group of fields"),
    "number_for_name": ({**MINIMAL, "groups": {7: {"rate": 1.0}}}, "config.groups", "int (7)"),
    "huge_int": ({**MINIMAL, "count": 10**400}, "config.count", "expected a number of 64 bits"),
    "huge_int_for_float": ({**MINIMAL, "limit": 10**5000}, "config.limit", "of 64 bits, got int"),
    "array_for_int": ({**MINIMAL, "count": np.arange(3)}, "config.count", "int, got ndarray"),
    "array_for_literal": (
        {**MINIMAL, "inner": {"rate": 1.0, "kind": np.arange(3)}},
        "config.inner.kind",
        "array([0, 1, 2]) is not one of 'linear', 'cosine'",
    ),
    "array_for_any": ({**MINIMAL, "free": [np.arange(3)]}, "config.free[0]", "or a group, got nd"),
    "number_for_field": ({**MINIMAL, 3: 1}, "config.3", "unknown field; known: count, flag"),
    "number_for_key_of_any": ({**MINIMAL, "free": {3: 1}}, "config.free", "names as keys, got int"),
    "near_literal": (
        {**MINIMAL, "inner": {"rate": 1.0, "kind": "cosin"}},
        "config.inner.kind",
        "'cosin' is not one of 'linear', 'cosine' (did you mean 'cosine'?)",
    ),
    "wrong_literal_type": (
        {**MINIMAL, "inner": {"rate": 1.0, "kind": 1}},
        "config.inner.kind",
        "1 is not one of 'linear', 'cosine'",
    ),
    "own_check": ({**MINIMAL, "inner": {"rate": 0.0}}, "config.inner.rate", "must be positive"),
    "own_check_in_dict": (
        {**MINIMAL, "groups": {"a": {"rate": -1.0}}},
        "config.groups.a.rate",
        "must be positive",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_field_and_the_reason_in_one_line(case):
    raw, field_path, reason = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        parse(Outer, raw)
    message = str(error.value)
    assert message.startswith(f"{field_path}: ")
    assert reason in message
    assert "\n" not in message


def test_a_path_may_be_given():
    with pytest.raises(ConfigError, match=r"^somewhere\.rate: must be positive$"):
        parse(Inner, {"rate": -1}, "somewhere")


def test_require():
    require(True, "rank", "must be positive")
    with pytest.raises(FieldError) as error:
        require(False, "rank", "must be positive")
    assert (error.value.field, error.value.reason) == ("rank", "must be positive")


def test_checks_outside_of_parsing_name_the_path_of_the_field():
    with pytest.raises(ConfigError) as error, located("config.adapters.a"), field_prefix("router"):
        require(False, "top_k", "must be positive")
    assert str(error.value) == "config.adapters.a.router.top_k: must be positive"
    # An outer context does not add its path again.
    assert not isinstance(error.value, FieldError)
    with pytest.raises(ConfigError, match=r"^config\.a: no$"), located("above"), located("config"):
        require(False, "a", "no")


def test_other_errors_pass_through():
    with located("config"), field_prefix("router"):
        require(True, "top_k", "must be positive")
    for error in (ConfigError("config.rank: refused"), ValueError("other")):
        with pytest.raises(type(error)) as raised, located("above"), field_prefix("router"):
            raise error
        assert raised.value is error


def test_nested_check_names_the_nested_field():
    @dataclass(frozen=True, kw_only=True)
    class Whole:
        inner: Inner

        def __post_init__(self):
            with field_prefix("inner"):
                require(self.inner.rate < 1, "rate", "must be below 1")

    with pytest.raises(ConfigError, match=r"^config\.x\.inner\.rate: must be below 1$"):
        parse(Whole, {"inner": {"rate": 2.0}}, "config.x")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("lorra", ["lora", "mixlora"], "did you mean 'lora'?"),
        ("dora", ["b", "a"], "known: a, b"),
        ("anything", [], "none are known here"),
    ],
)
def test_suggest(name, known, hint):
    assert suggest(name, known) == hint


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_must_be_finite(value):
    with pytest.raises(ConfigError, match=r"^config\.limit: expected a finite number, got"):
        parse(Outer, {**MINIMAL, "limit": value})
