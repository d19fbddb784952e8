"""What a checker says of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Judgement(NamedTuple):
    """What a checker says of an answer: by dimension, the shares (0 to 1) of what was wanted that it does; and whether
    it is well formed, whatever was wanted."""

    satisfied: Mapping[str, float]
    well_formed: bool

    @property
    def satisfaction(self) -> float:
        return sum(self.satisfied.values()) / len(self.satisfied)
