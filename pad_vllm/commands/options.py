"""What several commands' options have in common."""

from __future__ import annotations

from collections.abc import Sequence


def assignments(option: str, values: Sequence[str]) -> dict[str, str]:
    if strange := [value for value in values if "=" not in value]:
        raise ValueError(f"{option}: {strange[0]!r}: expected NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


def given(**settings) -> dict:
    """Those that were given: the rest have defaults of their own."""
    return {name: value for name, value in settings.items() if value is not None}
