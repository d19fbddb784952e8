"""Where a guided step's time goes: timers around the parts of :mod:`pad_vllm`, in the engine's own process.

Times are exclusive: a part's own, without those measured inside it. On a GPU they are what the host spends; the kernels
run behind it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

PARTS = (
    ("bookkeeping of requests (V1 or V2 adapter)", "adapter", "apply"),
    ("guidance: rows, slots", "guidance", "apply"),
    ("reward engine: blocks, slot mapping", "engine", "step"),
    ("attention metadata and forward context", "model", "forward"),
    ("reward forward", "module", "forward"),
    ("candidate selection, scoring and writing", "guidance", "guide_"),
)


def measure(guidance: Any, run: Callable[[], float]) -> dict[str, float]:
    """Milliseconds per guided step, by part; ``other`` is what the engine spends outside guidance."""
    from pad_vllm.processor import PADLogitsProcessor

    (processor,) = PADLogitsProcessor.running()
    owners = {
        "adapter": processor.adapter,
        "guidance": guidance,
        "engine": guidance.engine,
        "model": guidance.model,
        "module": guidance.model.model,
    }
    with _timers([(part, owners[owner], name) for part, owner, name in PARTS]) as (spent, calls):
        seconds = run()
    steps = max(calls[PARTS[1][0]], 1)
    found = {part: 1000 * spent[part] / steps for part, _, _ in PARTS}
    return found | {"everything else (base model, scheduler, sampler)": 1000 * (seconds - sum(spent.values())) / steps}


@contextmanager
def _timers(parts: list[tuple[str, Any, str]]):
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    inner = [0.0]  # seconds of the parts inside the one that runs

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            outside, inner[0] = inner[0], 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                spent[part] += took - inner[0]
                calls[part] += 1
                inner[0] = outside + took

        return call

    before = [vars(owner).get(name) for _, owner, name in parts]
    for part, owner, name in parts:
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield spent, calls
    finally:
        for own, (_, owner, name) in zip(before, parts, strict=True):
            if own is None:
                delattr(owner, name)  # the class's shows again
            else:
                setattr(owner, name, own)
