"""Checks of options: each returns the value, or raises with the option's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")


def check_whole(option: str, value: Any, minimum: int = 1) -> int:
    """Return a whole number from `minimum` up."""
    if type(value) is not int:
        raise TypeError(f"{option}={value!r}; a whole number is needed.")
    if value < minimum:
        raise ValueError(f"{option}={value}; it must be {minimum} or more.")
    return value


def check_odd(option: str, value: Any) -> int:
    """Return an odd kernel size."""
    check_whole(option, value)
    if value % 2 == 0:
        raise ValueError(f"{option}={value}; it must be odd, to have a centre.")
    return value


def check_share(option: str, value: Any) -> float:
    """Return a number in [0, 1), such as a dropout rate."""
    _check_number(option, value, "a number from 0 up to 1")
    if not 0 <= value < 1:
        raise ValueError(f"{option}={value}; it must be at least 0 and below 1.")
    return float(value)


def check_above_zero(option: str, value: Any) -> float:
    """Return a finite number above 0."""
    _check_number(option, value, "a number above 0")
    if not 0 < value < float("inf"):
        raise ValueError(f"{option}={value}; it must be finite and above 0.")
    return value


def check_switch(option: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{option}={value!r}; True or False is needed.")
    return value


def check_choice(option: str, value: Any, allowed: Sequence[Value]) -> Value:
    """Return one of a few values of one type."""
    if value not in allowed or type(value) is not type(allowed[0]):
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"{option}={value!r}; one of {listed} is needed.")
    return value


def _check_number(option: str, value: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option}={value!r}; {wanted} is needed.")
