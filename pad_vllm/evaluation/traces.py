"""What a server's traces say: tables of what guidance did, by persona or another field, and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = ("persona", "beta", "top_k", "reference", "engine", "adapters", "trace")
"""By which requests may be put together."""
HEADER = ("requests", "failed", "tokens", "changed", "divergence (nats)", "reward (nats)", "guidance (ms/token)")
NO_NAME = "(none)"


class TraceFolder(NamedTuple):
    """What stands in a folder of traces."""

    lines: list[dict[str, Any]]
    num_unread: int
    """Lines that are no traces, as the last one of a process that was killed"""


class Spread(NamedTuple):
    """Of a number that each token has: its mean over all tokens, and how far requests' own means lie apart."""

    mean: float
    deviation: float
    """Standard deviation over requests; 0 of one"""


class TracedGroup(NamedTuple):
    """Requests of one persona, or of one value of another field."""

    name: str
    num_requests: int
    num_failed: int
    tokens: int
    changed: Spread | None
    divergence: Spread | None
    """None where there are no tokens"""
    reward: Spread | None
    """The weighted sum of the contexts' rewards: what guidance sought"""
    rewards: list[Spread | None]
    """Of each context, of those of the group's requests that have as many"""
    ms_per_token: float | None


def read_traces(folder: str | Path) -> TraceFolder:
    """Read all files of a folder, as servers write them.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(Path(folder).glob("pad-traces-*.jsonl"))
    if not paths:
        raise ValueError(f"{folder}: contains no pad-traces-*.jsonl; a server with pad.trace writes them")
    lines, num_unread = [], 0
    for path in paths:
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
                assert isinstance(line["tokens"], int)
                assert all(isinstance(line.get(name) or [], list) for name in ("rewards", "weights"))
                lines.append(line)
            except (ValueError, KeyError, TypeError, AssertionError):
                num_unread += 1
    return TraceFolder(lines, num_unread)


def grouped(lines: Sequence[dict[str, Any]], by: str = "persona") -> list[TracedGroup]:
    """Groups by a field, those with the most tokens first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        value = line.get(by)
        name = NO_NAME if value is None or value == [] else str(value)
        groups.setdefault(name, []).append(line)
    found = [summarize(name, own) for name, own in groups.items()]
    return sorted(found, key=lambda group: (-group.tokens, group.name))


def summarize(name: str, lines: Sequence[dict[str, Any]]) -> TracedGroup:
    tokens = sum(line["tokens"] for line in lines)
    most = max(len(line.get("rewards") or ()) for line in lines)
    rewards = []
    for place in range(most):
        own = [line for line in lines if len(line.get("rewards") or ()) > place]
        rewards.append(spread([(line["rewards"][place], line["tokens"]) for line in own]))
    seconds = sum(line.get("guidance_seconds", 0.0) for line in lines)
    return TracedGroup(
        name,
        len(lines),
        sum(bool(line.get("failed")) for line in lines),
        tokens,
        spread([(line.get("changed"), line["tokens"]) for line in lines]),
        spread([(line.get("divergence"), line["tokens"]) for line in lines]),
        spread([(weighted_reward(line), line["tokens"]) for line in lines]),
        rewards,
        1000 * seconds / tokens if tokens else None,
    )


def weighted_reward(line: dict[str, Any]) -> float | None:
    """The sum of a request's rewards by its weights; None where it has none."""
    pairs = zip(line.get("rewards") or (), line.get("weights") or (), strict=False)
    parts = [reward * weight for reward, weight in pairs if reward is not None]
    return sum(parts) if parts else None


def spread(means: Sequence[tuple[float | None, int]]) -> Spread | None:
    """Of requests' means, each over so many tokens."""
    known = [(mean, num) for mean, num in means if mean is not None and num > 0]
    total = sum(num for _, num in known)
    if not total:
        return None
    mean = sum(mean * num for mean, num in known) / total
    of_requests = [one for one, _ in known]
    middle = sum(of_requests) / len(of_requests)
    variance = sum((one - middle) ** 2 for one in of_requests) / max(len(of_requests) - 1, 1)
    return Spread(mean, math.sqrt(variance))


def trace_table(groups: Sequence[TracedGroup], by: str = "persona") -> str:
    """Tables in Markdown: a row for each group; and each context's reward, where requests have several."""

    def percent(one: Spread | None) -> str:
        return "" if one is None else f"{100 * one.mean:.1f}% ± {100 * one.deviation:.1f}"

    def nats(one: Spread | None) -> str:
        return "" if one is None else f"{one.mean:.3f} ± {one.deviation:.3f}"

    rows = [
        [
            *(group.name, f"{group.num_requests:,}", f"{group.num_failed:,}", f"{group.tokens:,}"),
            *(percent(group.changed), nats(group.divergence), nats(group.reward)),
            "" if group.ms_per_token is None else f"{group.ms_per_token:.2f}",
        ]
        for group in groups
    ]
    parts = [_markdown([by, *HEADER], rows)]
    most = max((len(group.rewards) for group in groups), default=0)
    if most > 1:
        header = [by, *(f"reward {i + 1}" for i in range(most))]
        own = [[group.name, *map(nats, group.rewards), *[""] * (most - len(group.rewards))] for group in groups]
        parts.append(_markdown(header, own))
    return "\n\n".join(parts)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up, so that it is read as it stands too."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_traces(groups: Sequence[TracedGroup], path: str | Path, by: str = "persona") -> None:
    """Draw share of changed tokens, divergence and reward of each group, with their spread over requests.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots take `pip install 'pad-vllm[plot]'`") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [
        ("tokens changed (%)", [group.changed for group in groups], 100.0),
        ("divergence (nats / token)", [group.divergence for group in groups], 1.0),
        ("reward (nats / token)", [group.reward for group in groups], 1.0),
    ]
    names = [f"{group.name} ({group.num_requests})" for group in groups]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 1.2 + 0.35 * len(groups)), sharey=True)
    for axis, (label, spreads, scale) in zip(axes, panels, strict=True):
        means = [scale * one.mean if one else 0.0 for one in spreads]
        deviations = [scale * one.deviation if one else 0.0 for one in spreads]
        axis.barh(range(len(groups)), means, xerr=deviations, color="tab:green", ecolor="0.5", capsize=2)
        axis.set_xlabel(label, fontsize=8)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(groups)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"Guidance by {by} (requests); bars: mean over tokens, lines: deviation over requests", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
