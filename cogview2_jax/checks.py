"""Checks of settings: each raises ValueError, in one line that names the field and its value."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    flag: str | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with its range and its help; the command line makes an option of it.

    Numbers must be finite, at least `least`, above `above`, at most `most` and below `below`;
    strings one of `choices`. None is allowed if it is the default. `flag` is the option's name if
    it differs from the field's.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    about = {"help": help, "limits": given, "choices": tuple(choices)}
    return field(default=default, metadata=about | {"flag": flag, "metavar": metavar})


def check_settings(config: Any) -> None:
    """Check the `setting` fields of a dataclass. Raises ValueError for the first wrong one."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if "help" not in each.metadata or (value is None and each.default is None):
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if wanted := _wanted(one, each):
                raise ValueError(f"{each.name} must be {wanted}: got {one!r}")


_INSIDE = {
    "least": operator.ge,
    "above": operator.gt,
    "most": operator.le,
    "below": operator.lt,
}


def _wanted(value: Any, about: dataclasses.Field) -> str | None:
    """A description of the values that a field may have, or None if its value is one of them."""
    choices, limits = about.metadata["choices"], about.metadata["limits"]
    if choices:
        return None if value in choices else f"one of {', '.join(choices)}"
    if isinstance(about.default, bool):
        return None if isinstance(value, bool) else "True or False"
    if not limits:
        return None
    whole = "int" in str(about.type)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return "a whole number" if whole else "a number"
    inside = (_INSIDE[name](value, limit) for name, limit in limits.items())
    if math.isfinite(as_float(value)) and all(inside):
        return None
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    if len(limits) == 2:
        words |= {"least": "from", "most": "to", "below": "to below"}
    return " ".join(f"{words[name]} {limit}" for name, limit in limits.items())


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless it is so."""
    if not condition:
        raise ValueError(message)


def require_counts(config: Any, **least: int) -> None:
    """Raises ValueError unless these fields are whole numbers, or tuples of them at any depth, of
    at least so much each.
    """

    def check(name: str, value: Any, smallest: int) -> None:
        if isinstance(value, tuple):
            for number, part in enumerate(value):
                check(f"{name}[{number}]", part, smallest)
        else:
            check_count(name, value, smallest)

    for name, smallest in least.items():
        check(name, getattr(config, name), smallest)


def require_grid(name: str, value: Any, *, odd: bool = False) -> None:
    """Raises ValueError unless `value` is (rows, columns), whole numbers from 1 on."""
    require(
        isinstance(value, tuple) and len(value) == 2,
        f"{name} must be (rows, columns): got {value!r}",
    )
    for number, side in enumerate(value):
        check_count(f"{name}[{number}]", side)
        require(not odd or side % 2 == 1, f"{name} must have odd sides: got {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number: got {value!r}")
    require(int(value) >= least, f"{name} must be at least {least}: got {value}")
    return int(value)


def check_temperature(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError unless it is finite and not negative; 0 is greedy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number: got {value!r}")
    number = as_float(value)
    require(0 <= number < math.inf, f"{name} must be finite and at least 0 (greedy): got {value}")
    return number


def as_float(value: Any) -> float:
    """A real number as a float; inf for whole numbers that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
