"""What several commands' options have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pad_vllm.checks import shown
from pad_vllm.reading import read_json


def assignments(option: str, values: Sequence[str]) -> dict[str, str]:
    if strange := [value for value in values if "=" not in value]:
        raise ValueError(f"{option}: {strange[0]!r}: expected NAME=VALUE")
    names = [value.partition("=")[0] for value in values]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"{option}: {twice!r} is given twice")
    return dict(value.split("=", 1) for value in values)


def json_assignments(option: str, values: Sequence[str]) -> dict[str, Any]:
    read = {}
    for name, value in assignments(option, values).items():
        try:
            read[name] = read_json(value)
        except ValueError as error:
            raise ValueError(f"{option}: {name}={shown(value)} is not JSON: {error}") from None
    return read


def given(**settings) -> dict:
    """Those that were given: the rest have defaults of their own."""
    return {name: value for name, value in settings.items() if value is not None}
