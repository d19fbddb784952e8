"""What guidance did in each token of a request: rows kept apart, for an engine that explains, in its own process.

A trace has a place for each of a request's last rows, and sums of those before. Where there are as many places as a
request has tokens, nothing is summed: each place has the values of one position.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from pad_vllm.params import GuidanceParams

_keeper: RowKeeper | None = None


class RowEffect(NamedTuple):
    """What guidance did to one token."""

    changed: bool
    """Whether its most likely token is another than without guidance"""
    divergence: float
    """From the unguided distribution over the candidates, in nats"""
    rewards: tuple[float | None, ...]
    """Of each of ``params.readings``; None for one that is not read"""


class KeptRows(NamedTuple):
    """What guidance did to a request."""

    params: GuidanceParams
    effects: dict[int, RowEffect]
    """By the generated token's place in the answer"""
    failed: bool


class RowKeeper:
    """Stands in place of a trace's writer, for the engine that is started within it (``with``), in this process.

    Args:
        max_tokens: most that a request generates.
    """

    num_lost = 0
    when_idle: Callable[[], None] | None = None

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.kept: dict[str, KeptRows] = {}
        self.end_requests: Callable[[], None] = lambda: None

    def __enter__(self) -> RowKeeper:
        global _keeper
        _keeper = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _keeper
        _keeper = None

    def put(self, ended: Any) -> None:
        """What :class:`~.traces.Ended` has of a request that is gone; waits for the device."""
        params, record = ended.record.params, ended.record
        if params is None or params.trace is None:
            return
        effects: dict[int, RowEffect] = {}
        if ended.values is not None and ended.positions is not None:
            places, begin = params.places(), len(record.prompt_ids) - 1
            for position, ((counted, changed, divergence, *rewards), _) in zip(
                ended.positions.tolist(), ended.values.tolist(), strict=True
            ):
                if counted:  # else there was no row, or one that was not guided
                    of_each = tuple(None if place is None else rewards[place] for place in places)
                    effects[position - begin] = RowEffect(bool(changed), divergence, of_each)
        self.kept[params.trace] = KeptRows(params, effects, record.failed)

    def close(self) -> None:
        """There is no thread that would have to end."""

    def take(self, name: str) -> KeptRows | None:
        """Of the request with this ``pad_trace``, once the engine has nothing left to do; None: there is nothing."""
        self.end_requests()
        return self.kept.pop(name, None)


def row_keeper() -> RowKeeper | None:
    """That an engine which starts now is to leave its rows to."""
    return _keeper
