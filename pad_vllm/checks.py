"""Checks of values that users give, and how error messages show such values in one line."""

from __future__ import annotations

import bisect
import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 100
"""Most characters of a value that an error message repeats."""
MAX_WEIGHT = 1e4
MAX_TEXT_CHARS = 32_768
"""Most characters of any text. A persona's preference may be this long, if the engine has room for its tokens."""
MAX_NUMBERS = 1024
"""In a list of weights."""
MAX_COMPARED = 50
"""Most names that an unknown one is compared with; of more, those next to it in the alphabet."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, and what there is."""
    name, known = name[:MAX_SHOWN], sorted(known)
    at = bisect.bisect(known, name)
    near = known[max(at - MAX_COMPARED // 2, 0) : at + MAX_COMPARED // 2] if len(known) > MAX_COMPARED else known
    close = difflib.get_close_matches(name, near, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    names = ", ".join(known[:20]) + (f", and {len(known) - 20} more" if len(known) > 20 else "")
    return f"{hint}known: {names or 'none'}"


def shown(value: Any) -> str:
    """``repr(value)``, for an error message: no longer than a line."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MAX_SHOWN
_REPR.maxlist = _REPR.maxtuple = 12
_REPR.maxlevel = 2


def shown_name(name: Any) -> str:
    """A name as it stands, for an error message: no longer than a line."""
    return shown(str(name)[: MAX_SHOWN + 1])[1:-1]


def check_text(key: str, value: Any, max_chars: int = MAX_TEXT_CHARS) -> str:
    """``value`` if it is a non-empty text that can be encoded; else ValueError naming ``key``."""
    if not isinstance(value, str):
        raise ValueError(f"{key}={shown(value)}: must be a string, not {type(value).__name__}")
    if len(value) > max_chars:
        raise ValueError(f"{key}: {len(value)} characters, at most {max_chars} are allowed")
    if not value.strip():
        raise ValueError(f"{key}={shown(value)}: must not be empty; leave it out instead")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key}={shown(value)}: contains a lone surrogate, which is not text") from None
    return value


def check_number(key: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float if it is a number in [low, high]; else ValueError naming ``key``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key}={shown(value)}: must be a number, not {type(value).__name__}")
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{key}={shown(value)}: must be between {low:g} and {high:g}")
    return float(value)


def check_int(key: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer in [low, high]; else ValueError naming ``key``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key}={shown(value)}: must be an integer, not {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{key}={shown(value)}: must be " + (f"at least {low}" if high is None else f"between {low} and {high}")
        )
    return value


def check_numbers(key: str, value: Any, each: str) -> tuple[float, ...]:
    """``value`` as floats if it is a list of numbers, one for ``each`` of something; else ValueError naming ``key``."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{key}={shown(value)}: must be a list of numbers, one for each {each}")
    if len(value) > MAX_NUMBERS:
        raise ValueError(f"{key}: a list of {len(value)} numbers; at most {MAX_NUMBERS} are allowed")
    return tuple(check_number(f"{key}[{i}]", x, -MAX_WEIGHT, MAX_WEIGHT) for i, x in enumerate(value))
