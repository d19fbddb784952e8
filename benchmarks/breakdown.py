"""Where a guided step's time goes: timers around the parts of :mod:`pad_vllm`, in the engine's own process.

Times are exclusive, a part's own without those measured inside it, and medians over the steps, nearly all of which only
decode. On a GPU they are what the host spends; the kernels run behind it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

HOST = (
    ("bookkeeping of requests (V1 or V2 adapter)", "adapter", "apply"),
    ("guidance: rows, slots", "guidance", "apply"),
    ("reward engine: blocks, slot mapping", "engine", "step"),
    ("attention metadata and forward context", "model", "forward"),
)
"""Part, owner, function: what only the host does."""
STEP_PARTS = (
    *HOST,
    ("reward forward", "module", "forward"),
    ("candidate selection, scoring and writing", "rule", "guide_"),
)


def time_parts(guidance: Any, run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds per guided step, by part; the last is what the engine spends outside guidance."""
    from pad_vllm.processor import PADLogitsProcessor

    (processor,) = PADLogitsProcessor.running()
    owners = {
        "adapter": processor.adapter,
        "guidance": guidance,
        "rule": guidance.rule,
        "engine": guidance.engine,
        "model": guidance.model,
        "module": guidance.model.model,
    }
    with _timers([(part, owners[owner], name) for part, owner, name in STEP_PARTS]) as (spent, ends):
        run()
    found = {part: 1000 * median(spent[part]) for part, _, _ in STEP_PARTS}
    step = 1000 * median(after - before for before, after in pairwise(ends[STEP_PARTS[0][0]]))
    return found | {"everything else (base model, scheduler, sampler)": step - sum(found.values())}


@contextmanager
def _timers(parts: list[tuple[str, Any, str]]):
    spent: dict[str, list[float]] = defaultdict(list)  # seconds of each call
    ends: dict[str, list[float]] = defaultdict(list)
    inner = [0.0]  # seconds of the parts inside the one that runs

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            outside, inner[0] = inner[0], 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                end = time.perf_counter()
                spent[part].append(end - start - inner[0])
                ends[part].append(end)
                inner[0] = outside + end - start

        return call

    before = [vars(owner).get(name) for _, owner, name in parts]
    for part, owner, name in parts:
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield spent, ends
    finally:
        for own, (_, owner, name) in zip(before, parts, strict=True):
            if own is None:
                delattr(owner, name)  # the class's shows again
            else:
                setattr(owner, name, own)
