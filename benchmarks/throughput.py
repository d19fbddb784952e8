"""What guidance costs: vLLM with and without it, and the other ways to get it, side by side in one run.

    pad-vllm bench [--sections batch baselines ...] [--repeats 5] [--output FOLDER [--resume]]

Models are given (``--base``, ``--reward``), or made: random weights of any size, because what is measured does not
depend on what they say. Every repeat runs all entries of a comparison one after the other; the ratio is the median of
the repeats' own ratios, since absolute numbers of a shared machine mean little, and every other repeat goes backwards.
Greedy, ``ignore_eos``, prompts that no cache has seen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pad_vllm.reward.source import SERVED
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE

from . import drafts
from .methods import BackendProcess, Setup, Workload, host_on_v2
from .models import add_model_arguments, make_models, make_models_of_two_tokenizers
from .record import Record

NUM_PERSONAS = 16
PRELUDE = 16
"""Tokens that a method generates before it is measured"""
LONG_PERSONA = 500
"""Words, and so tokens, of the one that many users share."""

Entry = tuple[str, str, Workload]
"""Label, method, cell."""


class ThroughputBench:
    """Starts methods as they are needed, and compares them."""

    def __init__(self, setup: Setup, repeats: int) -> None:
        self.setup, self.repeats = setup, repeats
        self.methods: dict[str, BackendProcess] = {}
        self.seed = 0
        self.kept: list[Any] = []
        """Rows that an unfinished section has already"""
        self.keep: Callable[[list[Any]], None] = lambda rows: None
        """Keep an unfinished section's rows"""

    def method(self, name: str) -> BackendProcess:
        if name not in self.methods:
            self.methods[name] = BackendProcess(name, self.setup)
        return self.methods[name]

    def run(self, method: str, cell: Workload) -> float:
        """Seconds of a batch, on prompts of its own."""
        self.seed += 1
        return self.method(method)("run", cell, self.seed)

    def run_warm(self, method: str, cell: Workload) -> float:
        """The same, after a short one: what a process does first after it has waited for others is not measured."""
        self.run(method, replace(cell, output_len=min(PRELUDE, cell.output_len)))
        return self.run(method, cell)

    def compare(self, entries: Sequence[Entry], repeats: int | None = None) -> list[dict[str, Any]]:
        """A row for each entry; ``ratio`` is of its tokens per second to the first one's in the same repeat: the
        median, and between which two the middle half of the repeats lies. Every other repeat goes backwards."""
        for _, method, cell in entries:
            self.run(method, cell)  # warms up: compilation, kernels, memory
        speeds: list[dict[int, float]] = []
        for n in range(repeats or self.repeats):
            order = list(enumerate(entries))[:: -1 if n % 2 else 1]
            speeds.append(
                {i: cell.batch * cell.output_len / self.run_warm(method, cell) for i, (_, method, cell) in order}
            )
        rows = []
        for i, (label, method, cell) in enumerate(entries):
            ratios = [repeat[i] / repeat[0] for repeat in speeds]
            rows.append(
                {
                    "label": label,
                    "method": method,
                    "cell": asdict(cell),
                    "tokens_per_s": round(statistics.median(repeat[i] for repeat in speeds), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "middle_half": [round(float(np.percentile(ratios, q)), 3) for q in (25, 75)],
                    "repeats": len(ratios),
                }
            )
            print(
                f"{label:45} batch {cell.batch:3}: {rows[-1]['tokens_per_s']:9.1f} tok/s  {rows[-1]['ratio']:.3f}",
                flush=True,
            )
        return rows

    def each(self, cells: Sequence[Workload], rows_of: Callable[[Workload], list[Any]]) -> list[Any]:
        """The rows of all cells, the first of which is unguided. They are kept as each cell is done; what an
        interrupted run has kept is not measured again."""
        found = list(self.kept)
        for cell in cells:
            if all(row.get("cell") != asdict(cell) for row in found):
                found += rows_of(cell)
                self.keep(found)
        return found

    def close(self) -> None:
        for method in self.methods.values():
            method.close()


def versus(cell: Workload, *shares: float) -> list[Entry]:
    """Unguided vLLM, and guided with some shares of guided requests."""
    words = {0.0: "plugin, no request guided", 1.0: "guided"}
    shared = [(words.get(s, f"guided, {s:.0%} of requests"), "guided", replace(cell, share=s)) for s in shares]
    return [("unguided", "unguided", cell), *shared]


def of_batches(args: argparse.Namespace, **kind: Any) -> list[Workload]:
    return [Workload(batch, args.prompt_len, args.output_len, args.top_k, **kind) for batch in args.batch]


def batches(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """What guidance costs, by batch size; what it costs others; and the reward model by itself."""

    def rows_of(cell: Workload) -> list[Any]:
        shares = (1.0, 0.5, 0.0) if cell.batch > 1 else (1.0, 0.0)
        entries = [*versus(cell, *shares), ("reward model alone", "reward model alone", cell)]
        return bench.compare(entries, repeats=3 * bench.repeats)

    return bench.each(of_batches(args, personas=0), rows_of)


def shapes(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Long prompts, long answers, many candidates, many personas."""
    cell = Workload(top_k=args.top_k, personas=0)
    others = [
        replace(cell, prompt_len=512),
        replace(cell, batch=4, output_len=1024),
        replace(cell, top_k=40),
        replace(cell, personas=1),
        replace(cell, personas=NUM_PERSONAS),
    ]
    return bench.each(others, lambda other: bench.compare(versus(other, 1.0), repeats=min(bench.repeats, 3)))


def baselines(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """The other ways to be guided."""
    cell = Workload(batch=16, output_len=args.output_len, top_k=args.top_k, personas=0)
    others = ("naive plugin", "transformers loop, cached")
    found = bench.compare([*versus(cell, 1.0), *((name, name, cell) for name in others)])
    return found


def published(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """The authors' algorithm at 512 generated tokens, once: it reads every context again at every token."""
    cell = Workload(batch=1, output_len=512, top_k=args.top_k, personas=0)
    speeds = {name: cell.output_len / bench.run_warm(name, cell) for name in ("guided", "as published")}
    rows = []
    for name, speed in speeds.items():
        ratio = speed / speeds["guided"]
        rows.append(
            {
                "label": name,
                "method": name,
                "cell": asdict(cell),
                "tokens_per_s": round(speed, 2),
                "ratio": round(ratio, 4),
            }
        )
        print(f"{name:45} {speed:.2f} tok/s  {ratio:.4f}", flush=True)
    return rows


def flatness(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Time per token at 1,000 generated tokens over that at 100, guided over unguided."""
    short, long = (Workload(batch=4, output_len=n, top_k=args.top_k) for n in (100, 1000))
    entries = [
        (f"{name}, {cell.output_len} tokens", name, cell) for name in ("unguided", "guided") for cell in (short, long)
    ]
    rows = bench.compare(entries, repeats=min(bench.repeats, 3))
    per_token = [1 / row["tokens_per_s"] for row in rows]
    quotient = (per_token[3] / per_token[2]) / (per_token[1] / per_token[0])
    print(f"guided time per token, 1,000 over 100 tokens, over the same unguided: {quotient:.3f}")
    return [*rows, {"label": "quotient", "value": round(quotient, 3)}]


def rows_and_personas(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Cost of a step by guided rows, and by how many personas these have."""
    cell = Workload(batch=16, output_len=args.output_len, top_k=args.top_k)
    shares = [("unguided", "unguided", cell)]
    shares += [(f"{int(16 * s)} of 16 rows guided", "guided", replace(cell, share=s)) for s in (0.25, 0.5, 0.75, 1.0)]
    shares += [(f"16 rows guided, {n} personas", "guided", replace(cell, personas=n)) for n in (4, NUM_PERSONAS)]
    return bench.compare(shares)


def contexts(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Two contexts a request, a preference's and the neutral reference's, over one: what each takes beyond unguided."""

    def rows_of(cell: Workload) -> list[Any]:
        entries = [*versus(cell, 1.0), ("guided, two contexts", "guided", replace(cell, reference="neutral"))]
        rows = bench.compare(entries)
        unguided, one, two = (1 / row["ratio"] for row in rows)
        quotient = (two - unguided) / (one - unguided)
        print(f"batch {cell.batch}: the guidance of two contexts over that of one: {quotient:.3f}", flush=True)
        return [*rows, {"label": f"two contexts over one, batch {cell.batch}", "value": round(quotient, 3)}]

    return bench.each(of_batches(args), rows_of)


def tokenizers(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """A reward model with another tokenizer beside one with the base's, on random models."""
    if args.base:
        return []
    name = "guided, another tokenizer"
    with tempfile.TemporaryDirectory() as folder:
        base, reward = make_models_of_two_tokenizers(Path(folder), args)
        bench.methods[name] = BackendProcess("guided", replace(bench.setup, base=base, reward=reward, personas=None))

        def rows_of(cell: Workload) -> list[Any]:
            rows = bench.compare([*versus(cell, 1.0), (name, name, cell)])
            quotient = rows[1]["ratio"] / rows[2]["ratio"]
            print(f"batch {cell.batch}: time with another tokenizer over that with one: {quotient:.3f}", flush=True)
            return [*rows, {"label": f"two tokenizers over one, batch {cell.batch}", "value": round(quotient, 3)}]

        return bench.each(of_batches(args, personas=0), rows_of)


def sharing(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Tokens that the reward model computes for 16 users of one persona with a long prompt, who come at once."""
    cell = Workload(batch=16, prompt_len=args.prompt_len, output_len=2, top_k=args.top_k)
    long = BackendProcess(
        "guided", replace(bench.setup, personas={"p0": " ".join(f"w{i}" for i in range(1000, 1000 + LONG_PERSONA))})
    )
    try:
        before = long("reward_tokens")
        long("run", cell, 10**6)
        computed = long("reward_tokens") - before
    finally:
        long.close()
    head = LONG_PERSONA + len(DEFAULT_PROMPT_TEMPLATE.format(preference="", prompt="").split())
    least = head + cell.batch * (cell.prompt_len + cell.output_len - 1)
    print(
        f"16 users of a {LONG_PERSONA}-token persona: {computed} reward tokens; one prompt and 16 own parts are {least}"
    )
    return [{"label": "reward tokens", "computed": computed, "least": least, "ratio": round(computed / least, 3)}]


def breakdown(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Milliseconds of a guided step, by part."""
    found = []
    for cell in of_batches(args, personas=0):
        bench.run("guided", cell)
        parts = bench.method("guided")("breakdown", cell, 10**6 + cell.batch)
        found.append(_parts_of(f"batch {cell.batch}", parts))
    return found


def breakdown_v2(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Milliseconds of a guided step on Model Runner V2: what the host does."""
    found = []
    for cell in of_batches(args, personas=0):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(_parts_of(f"batch {cell.batch}", pool.submit(host_on_v2, bench.setup, cell).result()))
    return found


def _parts_of(label: str, parts: Mapping[str, float]) -> dict[str, Any]:
    print(f"{label}: " + ", ".join(f"{part} {ms:.3f} ms" for part, ms in parts.items()), flush=True)
    return {"label": label, "milliseconds": {part: round(ms, 3) for part, ms in parts.items()}}


def draft_lengths(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Tokens for a pass of the base model where the reward model drafts."""
    return drafts.by_number(args.base, args.reward, bench.kept, bench.keep)


def drafters(bench: ThroughputBench, args: argparse.Namespace) -> list[Any]:
    """Tokens for a pass of the base model, by who drafts."""
    return drafts.by_drafter(args.base, args.reward, bench.kept, bench.keep)


SECTIONS = {
    "batch": batches,
    "baselines": baselines,
    "rows": rows_and_personas,
    "contexts": contexts,
    "tokenizers": tokenizers,
    "sharing": sharing,
    "flatness": flatness,
    "shapes": shapes,
    "published": published,
    "breakdown": breakdown,
    "breakdown-v2": breakdown_v2,
    "drafts": draft_lengths,
    "drafters": drafters,
}


NOT_SETTINGS = ("sections", "output", "resume")
"""Arguments on which no result depends."""


def measure_throughput(setup: Setup, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Run the sections, and keep each one's result as it ends, in a record of ``settings``."""
    record = Record(args.output, settings, {name: section.__doc__ or "" for name, section in SECTIONS.items()})
    bench = ThroughputBench(setup, args.repeats)
    try:
        for name in args.sections:
            kept = record.results.get(name, {}) if args.resume else {}
            if kept and "unfinished" not in kept:
                print(f"\n{name}: measured on {kept['date']}", flush=True)
                continue
            print(f"\n{name}: {SECTIONS[name].__doc__}", flush=True)
            bench.kept, bench.keep = kept.get("rows", []), partial(record.add, name, is_whole=False)
            record.add(name, SECTIONS[name](bench, args))
    finally:
        bench.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure (default: all)"
    )
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="batch sizes (default 1 16 64)")
    parser.add_argument("--prompt-len", type=int, default=16, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="candidates of a token (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each comparison (default %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of throughput.json, .md and .png; results of this machine and these settings are kept there",
    )
    parser.add_argument("--resume", action="store_true", help="skip the sections that --output has already")


def main(args: argparse.Namespace) -> None:
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    guides_itself = args.reward == SERVED
    if bool(args.base) != bool(args.reward) and not guides_itself:
        raise ValueError("--base and --reward: give both, or none")
    with tempfile.TemporaryDirectory() as folder:
        base, reward = (args.base, args.reward) if args.base else make_models(Path(folder), args)
        if guides_itself:
            reward, args.reward = base, args.base
        setup = Setup(
            base,
            reward,
            dtype=args.dtype,
            enforce_eager=args.enforce_eager,
            max_num_seqs=max(16, *args.batch),
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            load_format=args.load_format,
            personas={f"p{i}": " ".join(f"w{1000 + 20 * i + j}" for j in range(16)) for i in range(NUM_PERSONAS)},
        )
        measure_throughput(setup, args, settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    main(parser.parse_args())
