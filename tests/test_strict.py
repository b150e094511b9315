"""JSON by annotation: what is read, the message of what is not, and the way back."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from notus.errors import UserError
from notus.strict import (
    Count,
    Fraction,
    Invalid,
    Positive,
    Text,
    keys_of,
    parse,
    parse_part,
    plain,
    read_json,
)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    size: Count
    spokes: tuple[Count, ...] | Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class Brake:
    force: Fraction = 0.5


@dataclass(frozen=True, kw_only=True)
class Bicycle:
    wheels: tuple[Wheel, Wheel]
    brake: Brake
    owner: Text | None = None
    lights: bool = False
    weights: dict[str, Positive] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict, metadata={"other_keys_such_as": ("bell",)})


TREE = {
    "wheels": [{"size": 26}, {"size": 28, "spokes": [3, 4]}],
    "owner": "Ada",
    "weights": {"frame": 2},
    "basket": {"depth": [1]},
}


def test_an_object_becomes_a_dataclass_and_back() -> None:
    bicycle = parse(TREE, Bicycle)
    assert bicycle == Bicycle(
        wheels=(Wheel(size=26), Wheel(size=28, spokes=(3, 4))),
        brake=Brake(),
        owner="Ada",
        weights={"frame": 2.0},
        extras={"basket": {"depth": [1]}},
    )
    assert type(bicycle.weights["frame"]) is float
    tree = plain(bicycle)
    assert tree == {
        "wheels": [{"size": 26, "spokes": "none"}, {"size": 28, "spokes": [3, 4]}],
        "brake": {"force": 0.5},
        "owner": "Ada",
        "lights": False,
        "weights": {"frame": 2.0},
        "basket": {"depth": [1]},
    }
    assert parse(tree, Bicycle) == bicycle


@pytest.mark.parametrize(
    ("value", "annotation", "problem"),
    [
        (True, int, "found true, expected an integer"),
        (1.0, int, "found 1.0, expected an integer"),
        (1, bool, "found 1, expected true or false"),
        (1, Literal["auto", True], 'found 1, expected "auto" or true'),
        (None, str, "found null, expected a string"),
        (10**400, float, "found 1000000"),
        (float("nan"), float, "found NaN, expected a finite number"),
        ({"a": [float("-inf")]}, dict[str, Any], "a.0: found -Infinity, expected a finite number"),
        ({"a": ["x\0"]}, dict[str, Any], "a.0: found 'x\\x00', expected text without NUL and lone"),
        (0, Positive, "found 0.0, expected a number above 0"),
        ([], tuple[int, ...], "found [], expected a list of one or more values, each an integer"),
        ([1], tuple[int, int], "found [1], expected a list of 2 values, each an integer"),
        ([1, "x"], tuple[int, ...], '1: found "x", expected an integer'),
        ({"a": 0}, dict[str, Count], "a: found 0, expected an integer of at least 1"),
        ("x", int | None, 'found "x", expected an integer or null'),
        (3, Wheel, "found 3, expected an object with the keys size, spokes"),
    ],
)
def test_values_that_do_not_fit(value: Any, annotation: Any, problem: str) -> None:
    with pytest.raises(UserError) as error:
        parse(value, annotation)
    assert str(error.value).startswith(problem)
    with pytest.raises(Invalid) as error:
        parse(value, annotation, "top")
    assert str(error.value).startswith(("top: ", "top."))
    assert str(error.value).startswith(f"{error.value.key}: ")


def test_keys_that_do_not_fit() -> None:
    def problem(change: dict[str, Any]) -> str:
        with pytest.raises(Invalid) as error:
            parse(TREE | change, Bicycle, "bike")
        return str(error.value)

    small = {"size": 26}
    assert problem({"wheels": [small, {}]}).startswith("bike.wheels.1.size: missing, expected an i")
    unknown = problem({"wheels": [small, {"sise": 3}]})
    assert unknown == "bike.wheels.1.sise: unknown key; nearest valid key: bike.wheels.0.size"
    elsewhere = problem({"brake": {"spoke": 3}})
    assert elsewhere == "bike.brake.spoke: unknown key; nearest valid key: bike.wheels.0.spokes"
    assert problem({"brake": {"zz": 3}}).endswith("unknown key; valid keys here: bike.brake.force")
    twice = read_json('{"owner": 1, "lights": true, "owner": 2}')
    assert problem(twice) == "bike.owner: occurs twice in one object, expected once"


def test_keyword_only_parameters_of_a_function() -> None:
    def ride(
        bicycle: Bicycle, *, speed: Positive, uphill: bool = False, load: Fraction = 1
    ) -> None:
        raise AssertionError("must not be called")

    assert list(keys_of(ride)) == ["speed", "uphill", "load"]
    given = parse({"uphill": True, "speed": 3}, ride, "ride")
    assert given == {"speed": 3.0, "uphill": True, "load": 1}
    assert list(given) == ["speed", "uphill", "load"]
    with pytest.raises(Invalid, match=r"^ride.mix.2.speed: found 0.0, expected a number above 0$"):
        parse({"speed": 0}, ride, "ride.mix.2")
    with pytest.raises(Invalid, match=r"^ride.speed: missing, expected a number above 0$"):
        parse({}, ride, "ride")
    nearest = r"^ride.mix.2.sped: unknown key; nearest valid key: ride.mix.2.speed$"
    with pytest.raises(Invalid, match=nearest):
        parse({"sped": 1}, ride, "ride.mix.2")


def test_a_dataclass_among_other_keys() -> None:
    assert parse_part({"force": 1, "colour": "red"}, Brake, "a file") == Brake(force=1.0)
    with pytest.raises(
        UserError, match="^a file: force: found 2.0, expected a number from 0 to 1$"
    ):
        parse_part({"force": 2.0}, Brake, "a file")


def test_integers_too_long_to_be_read_are_floats() -> None:
    assert read_json("[1, -9223372036854775808]") == [1, float(-(2**63))]
    assert read_json("1" * 5000) == float("inf")
