"""Where an engine's first rank shows its numbers, and a log line of them in vLLM's manner.

The numbers arise in the engine's workers, and ``/metrics`` is answered by the frontend, to which vLLM carries only its
own. So the first rank of an engine writes them to a memory-mapped file beside its announcement, which a collector in
the frontend reads when it is asked.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import weakref
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from vllm import envs
from vllm.logger import init_logger

from pad_vllm.channel import OWNER, make_stats
from pad_vllm.stats import NAMES, Stats

logger = init_logger(f"vllm.{__name__}")

KEEP_INTERVAL = 3600.0
"""Seconds between two signs of life for those who tidy folders of temporary files by age."""


class Board:
    """Where an engine's first rank shows its :class:`Stats`, and what logs them.

    Args:
        announcement: file of the engine's announcement.
        labels: as vLLM's own metrics have them.
    """

    def __init__(self, announcement: Path, labels: tuple[str, str]) -> None:
        path = make_stats(announcement, np.zeros(len(fields(Stats))).nbytes)
        self.values = np.asarray(np.memmap(path, np.float64, "r+"))
        self._memory = memoryview(self.values)
        interval = float(envs.VLLM_LOG_STATS_INTERVAL)
        self.closed = closed = threading.Event()
        """Set when nobody has the board any more"""
        weakref.finalize(self, closed.set)
        if interval > 0:
            every(interval, closed, _Logger(self.values, labels[1]).log)
        every(KEEP_INTERVAL, closed, lambda: touch_files(announcement))

    def show(self, stats: Stats) -> None:
        _pack_into(self._memory, 0, *_read(stats))


_read = attrgetter(*NAMES)
_pack_into = struct.Struct(f"={len(NAMES)}d").pack_into


def touch_files(announcement: Path) -> None:
    """A sign of life at an engine's announcement, all that it shows beside it, and the lock of their folder."""
    for path in (*announcement.parent.glob(f"{announcement.stem}.*"), announcement.with_name(OWNER)):
        with contextlib.suppress(OSError):
            os.utime(path)


def every(seconds: float, closed: threading.Event, run: Any) -> None:
    """Run it on a thread, again and again until it is closed."""

    def loop() -> None:
        while not closed.wait(seconds):
            run()

    threading.Thread(target=loop, name="pad-metrics", daemon=True).start()


class _Logger:
    """What guidance did since the last line, and nothing where it did nothing."""

    def __init__(self, values: np.ndarray, engine: str) -> None:
        self.values, self.engine = values, engine
        self.last, self.last_time = Stats(), time.monotonic()

    def log(self) -> None:
        now, stats, last = time.monotonic(), Stats(*self.values.tolist()), self.last
        steps = stats.steps - last.steps
        if steps > 0 or stats.failed_requests > last.failed_requests:
            logger.info(
                "Engine %s PAD: Guided: %d reqs running, %d new, %d failed, Guided throughput: %.1f tokens/s, "
                "Guidance: %.2f ms/step, Reward KV cache usage: %.1f%%, Reward tokens computed: %d (%d of them again), "
                "Reward prefix cache hits: %d tokens",
                self.engine,
                stats.running_requests,
                stats.guided_requests - last.guided_requests,
                stats.failed_requests - last.failed_requests,
                (stats.guided_tokens - last.guided_tokens) / (now - self.last_time),
                1000 * (stats.step_seconds - last.step_seconds) / max(steps, 1),
                100 * stats.kv_cache_usage_perc,
                stats.reward_tokens - last.reward_tokens,
                stats.recomputed_tokens - last.recomputed_tokens,
                stats.prefix_hit_tokens - last.prefix_hit_tokens,
            )
        self.last, self.last_time = stats, now
