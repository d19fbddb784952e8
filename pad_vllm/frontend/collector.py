"""``pad_*`` metrics under the server's own ``/metrics``, read from the engines' boards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pad_vllm.channel import read_stats
from pad_vllm.frontend import engines
from pad_vllm.stats import GAUGES, HELP, LABELS, Stats


class Collector:
    """The engines' numbers, for the frontend's Prometheus registry."""

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        shown: dict[tuple[str, str], np.ndarray] = {}
        for path, announcement in engines.own().items():
            try:
                values = np.frombuffer(read_stats(path), np.float64)
            except (OSError, ValueError):
                continue  # not the first rank, or just withdrawn
            if len(values) == len(fields(Stats)):
                shown[announcement.labels] = shown.get(announcement.labels, 0) + values
        if not shown:
            return
        for name, text in HELP.items():
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            metric = family(f"pad_{name}", text, labels=LABELS)
            for labels, values in shown.items():
                metric.add_metric(labels, getattr(Stats(*values.tolist()), name))
            yield metric


@functools.cache
def register_collector() -> None:
    """Put the metrics under this process's ``/metrics``."""
    REGISTRY.register(Collector())
