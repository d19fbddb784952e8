"""Which custom logits processors an engine has, in the order in which vLLM runs them.

vLLM builds those registered as entry points first, then those that ``logits_processors`` lists. PAD is both, and its
place in the list is what counts: what stands before it has changed z when it chooses candidates, what stands behind it
sees the guided rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import NamedTuple

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

ENTRY_POINTS = "vllm.logits_processors"


class Processor(NamedTuple):
    """One that vLLM builds."""

    name: str
    is_listed: bool
    """In ``logits_processors``; else it is an entry point."""
    is_ours: bool

    def __str__(self) -> str:
        return self.name if self.is_listed else f"{self.name} (entry point)"


def processors(listed: Sequence[str | type] | None, ours: type) -> list[Processor]:
    """All of an engine's, in vLLM's order.

    Args:
        listed: ``logits_processors`` of its configuration.
        ours: the class that guides.
    """
    plugins = [(point.value, point.load()) for point in entry_points(group=ENTRY_POINTS)]
    found = [Processor(name, False, is_a(loaded, ours)) for name, loaded in plugins]
    for item in listed or ():
        loaded = item if isinstance(item, type) else _load(item)
        name = f"{item.__module__}:{item.__qualname__}" if isinstance(item, type) else item
        found.append(Processor(name, True, is_a(loaded, ours)))
    return found


def _load(name: str) -> object:
    module, _, qualname = name.partition(":")
    return functools.reduce(getattr, qualname.split("."), import_module(module))


def is_a(loaded: object, ours: type) -> bool:
    return isinstance(loaded, type) and issubclass(loaded, ours)


def place(found: list[Processor]) -> int:
    """Where in ``found`` the one stands that guides: the first that is listed, or else the first."""
    mine = [i for i, processor in enumerate(found) if processor.is_ours]
    return next((i for i in mine if found[i].is_listed), mine[0] if mine else 0)


def num_giving_way(found: list[Processor]) -> int:
    """How many of our instances vLLM builds before the one that guides."""
    return sum(processor.is_ours for processor in found[: place(found)])


def is_first(found: list[Processor]) -> bool:
    """Whether no other processor runs before the one that guides."""
    return all(processor.is_ours for processor in found[: place(found)])


def log_order(found: list[Processor]) -> None:
    """Log the order, if there is any processor beside PAD. Warn of one that runs after PAD although its operator
    could not choose that."""
    at = place(found)
    shown = ["PAD" if i == at else str(p) for i, p in enumerate(found) if i == at or not p.is_ours]
    if len(shown) == 1:
        return
    logger.info(
        "PAD: logits processors run in this order: %s. Those before PAD can rule out candidates; those after PAD "
        "change the guided logits.",
        ", ".join(shown),
    )
    behind = [p.name for p in found[at + 1 :] if not p.is_listed and not p.is_ours]
    if behind:
        logger.warning(
            "PAD: %s, registered as an entry point, runs after PAD, so it may mask candidates that PAD has chosen, "
            "even all of them. To run it before PAD, list pad_vllm:PADLogitsProcessor in logits_processors.",
            ", ".join(behind),
        )
