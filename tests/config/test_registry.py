"""Registries, with members defined here."""

import abc
import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from moe_jax.config.parse import Registry, parse, parse_member, registry_of, require, to_plain
from moe_jax.errors import ConfigError

SHAPES = Registry("shape")


@dataclass(frozen=True, kw_only=True)
class Shape(abc.ABC):
    registry: ClassVar[Registry] = SHAPES

    colour: str = "red"

    @abc.abstractmethod
    def area(self) -> float: ...


@SHAPES.register("square")
@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float

    def __post_init__(self):
        require(self.side > 0, "side", "must be positive")

    def area(self) -> float:
        return self.side**2


@SHAPES.register("framed")
@dataclass(frozen=True, kw_only=True)
class Framed(Shape):
    """A member with a field of the base class."""

    inside: Shape
    border: tuple[float, ...] = (1.0, 2.0)

    def area(self) -> float:
        return self.inside.area() + sum(self.border)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    main: Shape
    others: dict[str, Shape] = field(default_factory=dict)
    maybe: Shape | None = None


def test_a_registry_is_a_mapping_of_its_members():
    assert dict(SHAPES) == {"square": Square, "framed": Framed}
    assert len(SHAPES) == 2 and "square" in SHAPES and "circle" not in SHAPES
    assert SHAPES.name_of(Square(side=1.0)) == "square"


def test_no_name_is_registered_twice():
    with pytest.raises(ValueError, match=r"the shape name 'square' is taken by .*\.Square"):
        SHAPES.register("square")(Framed)
    assert SHAPES["square"] is Square


def test_unregistered_classes_have_no_name():
    class Rounded(Square):
        pass

    with pytest.raises(ValueError, match="Rounded is not a registered shape"):
        SHAPES.name_of(Rounded(side=1.0))


def test_only_the_base_class_names_the_registry():
    assert registry_of(Shape) is SHAPES
    assert registry_of(Square) is None and registry_of(int) is None and registry_of(None) is None


def test_name_chooses_the_member_wherever_the_base_class_is_the_type():
    raw = {
        "main": {"name": "framed", "inside": {"name": "square", "side": 2}, "colour": "blue"},
        "others": {"a": {"name": "square", "side": 3.0}},
        "maybe": {"name": "square", "side": 1.0},
    }
    drawing = parse(Drawing, raw)
    assert drawing == Drawing(
        main=Framed(inside=Square(side=2.0), colour="blue"),
        others={"a": Square(side=3.0)},
        maybe=Square(side=1.0),
    )
    assert drawing.main.area() == 4.0 + 3.0
    assert parse(Drawing, {**raw, "maybe": None}).maybe is None


def test_key_of_a_dict_is_the_default_name():
    raw = {"square": {"side": 2.0}, "big": {"name": "square", "side": 9.0}}
    parsed = parse(Drawing, {"main": {"name": "square", "side": 1.0}, "others": raw})
    assert parsed.others == {"square": Square(side=2.0), "big": Square(side=9.0)}


def test_members_made_in_python_pass_through():
    square = Square(side=2.0)
    assert parse(Drawing, {"main": square, "others": {"a": square}}).others["a"] is square
    assert parse_member(SHAPES, square, "config") is square


SQUARE = {"name": "square", "side": 1.0}
REFUSED = {
    "unknown": ({"name": "sqare"}, "config.main.name: unknown shape 'sqare'; did you mean 'squ"),
    "far_from_all": ({"name": "xyz"}, "config.main.name: unknown shape 'xyz'; known: framed, squ"),
    "no_text": ({"name": 3}, "config.main.name: unknown shape 3; known: framed, square"),
    "no_name_at_all": ({"name": ["square"]}, "config.main.name: unknown shape ['square']; "),
    "missing": ({"side": 1.0}, "config.main.name: this field is required and was not given; known"),
    "no_group": ("square", "config.main: expected a group of fields, got str ('square')"),
    "another_members_field": ({**SQUARE, "border": []}, "config.main.border: unknown field; "),
    "own_check": ({**SQUARE, "side": 0}, "config.main.side: must be positive"),
    "own_check_within": (
        {"name": "framed", "inside": {**SQUARE, "side": 0}},
        "config.main.inside.side: must be positive",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    raw, message = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        parse(Drawing, {"main": raw})
    assert str(error.value).startswith(message)


def test_an_unknown_key_of_a_dict_suggests_too():
    with pytest.raises(ConfigError, match=r"^config\.others\.sqare\.name: .* mean 'square'\?"):
        parse(Drawing, {"main": SQUARE, "others": {"sqare": {"side": 1.0}}})


def test_empty_registry():
    with pytest.raises(ConfigError, match="unknown thing 'a'; none are known here"):
        parse_member(Registry("thing"), {"name": "a"}, "config")


def test_plain_data_and_back():
    drawing = Drawing(
        main=Framed(inside=Square(side=2.0), border=(0.5,)), others={"big": Square(side=3.0)}
    )
    plain = to_plain(drawing)
    assert plain == {
        "main": {
            "name": "framed",
            "colour": "red",
            "inside": {"name": "square", "colour": "red", "side": 2.0},
            "border": [0.5],
        },
        "others": {"big": {"name": "square", "colour": "red", "side": 3.0}},
        "maybe": None,
    }
    assert parse(Drawing, json.loads(json.dumps(plain))) == drawing
