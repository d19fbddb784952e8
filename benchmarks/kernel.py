"""What the guidance step costs on a GPU, against PyTorch and against the bytes that it must move.

    python -m benchmarks.kernel [--quick] [--only guide,groups] [--rows 1,64] [--k 10] [--reference]
        [--output benchmarks/results/h100/kernel.json] [--plot benchmarks/results/h100/kernel.png]

Needs torch, triton and a GPU; vLLM is not imported. In parts:

- guide: a reward model with the base's tokenizer;
- controls: the same, of requests with a bias and penalties;
- mixture: the same, of three contexts a row;
- groups: a reward model with another tokenizer. Groups have one or two members; every eighth row needs one of 2,000;
- bound: as guide, of requests that may diverge by 0.1 nats a token;
- adapters: of four LoRA adapters of rank 16 on lm_head, of which a row is read through one or none;
- traces: of requests whose trace is kept.

For every shape, microseconds a step:

- fused: the Triton kernels;
- limit: one read and one write of the guided logits, one read of the hidden states and of k rows of lm_head for each
  guided row (with groups, of the distinct members that all rows need), at the rate at which a copy moves bytes;
- composite, of guide: the obvious one: topk, the whole lm_head product, gather, log_softmax, scatter;
- reference, with ``--reference``: the same step in PyTorch (``reference`` of ``pad_vllm.kernels``).

Replays of CUDA graphs are timed, so that the host's launches are not: a graph copies several buffers of logits, since
the step works in place, and flushes the L2 cache; another goes on with a step on each. The difference of their medians,
over the steps. Values are checked first, against float64. ``--device cpu`` runs all of it in Triton's interpreter, for
a test: its times mean nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from pad_vllm.kernels import fused, reference
from pad_vllm.kernels.types import NUM_COUNTS

from .kernel_plot import plot_kernel
from .kernel_problems import RULE_PARTS, Problem, expected, problem

ROWS, TOP_K = (1, 8, 64, 256), (10, 40, 64)
VOCABULARY, HIDDEN = (32_000, 128_256, 256_000), (2048, 4096)
QUICK = ((128_256,), (2048,))
"""Of the other parts, and of all with ``--quick``."""
MOST_STEPS = {"reference": 1, "composite": 4}
"""In a graph, of steps that take long."""


class GraphTimer:
    """Replays of CUDA graphs, between events of the device."""

    device, most_buffers = "cuda", 48
    copy_bytes, flush_bytes = 2**30, 2**28

    def __init__(self) -> None:
        self.hardware = torch.cuda.get_device_name()

    def capture(self, run: Callable[[], Any]) -> Callable[[], None]:
        """A replay of ``run``."""
        run()  # compiles, and lets libraries allocate
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def elapsed(self, replay: Callable[[], None]) -> float:
        """Microseconds."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # the device is busy until the graph is launched
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3


class WallTimer:
    """Calls, by the clock on the wall."""

    device, hardware, most_buffers = "cpu", "Triton's interpreter: no measurement", 1
    copy_bytes, flush_bytes = 2**10, 2**10

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def elapsed(self, replay: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        replay()
        return (time.perf_counter() - begin) * 1e6


Timer = GraphTimer | WallTimer


def composite_(logits, hidden_states, head, rows, vocabulary, *, controls, mixture, trace):
    """The step as one would write it first; every row has the same k, and nothing ever fails."""
    z, ids = logits[rows.index].topk(rows.max_top_k, dim=-1)
    r = (hidden_states @ head.weight.T).gather(1, ids).float()
    reward = r.log_softmax(-1) - rows.reference.unsqueeze(1) * z.log_softmax(-1)
    guided = torch.full_like(logits, float("-inf")).scatter_(1, ids, z + rows.beta.unsqueeze(1) * reward)
    logits[rows.index] = guided


def largest_error(of: Problem) -> float:
    """Largest difference from float64, over the candidates; which must be the same ones."""
    ours = of.sources[0].clone()
    of.run(fused.guide_, ours)
    ids, z, guided = expected(of)
    assert ((ours > float("-inf")).sum(-1) == ids.shape[1]).all()
    difference = (ours.gather(1, ids).double() - guided).abs().max().item()
    assert difference < 1e-3, difference
    if of.trace is not None:
        log_p = guided.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - z.log_softmax(-1))).sum(-1)
        torch.testing.assert_close(of.trace.values[:, 0, 0, NUM_COUNTS - 1].double(), divergence, rtol=1e-3, atol=1e-4)
    return difference


def check_graph(of: Problem, timer: Timer) -> None:
    """The step can be captured in a CUDA graph, and replayed on other logits."""
    static, other = of.sources[0].clone(), of.sources[0].flip(1).contiguous()
    replay = timer.capture(lambda: of.run(fused.guide_, static))
    static.copy_(other)
    replay()
    of.run(fused.guide_, other)
    assert torch.equal(static, other)


def bandwidth(timer: Timer, repeats: int) -> float:
    """Bytes per second, read and written together, of a large copy."""
    source = torch.zeros(timer.copy_bytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    replay = timer.capture(lambda: target.copy_(source))
    return 2 * source.nbytes / statistics.median(timer.elapsed(replay) for _ in range(repeats + 1)) * 1e6


def time_steps(of: Problem, steps: dict[str, Callable[..., None]], timer: Timer, repeats: int) -> dict[str, float]:
    """Microseconds of each step: by medians of replays, in turns."""
    work = [torch.empty_like(source) for source in of.sources]
    flush = torch.empty(timer.flush_bytes, dtype=torch.uint8, device=timer.device)

    def run(step: Callable[..., None], num_steps: int) -> None:
        for logits, source in zip(work, of.sources, strict=True):
            logits.copy_(source)
        flush.zero_()
        for logits in work[:num_steps]:
            of.run(step, logits)

    counts = {name: min(MOST_STEPS.get(name, len(work)), len(work)) for name in steps}
    replays = {"nothing": timer.capture(lambda: run(fused.guide_, 0))}
    replays |= {name: timer.capture(functools.partial(run, step, counts[name])) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in replays}
    for repeat in range(repeats + 1):
        for name, replay in replays.items():
            if name != "reference" or repeat <= 3:
                times[name].append(timer.elapsed(replay))
    medians = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    return {name: (medians[name] - medians["nothing"]) / counts[name] for name in steps}


def compile_step(part: str, top_k: int, vocab_size: int, hidden_size: int) -> None:
    of = problem(part, 1, vocab_size, hidden_size, top_k, GraphTimer.device)
    of.run(fused.guide_, of.sources[0])
    torch.cuda.synchronize()


def compile_all(shapes: list[tuple[str, int, int, int, int]]) -> None:
    """In processes side by side, into Triton's cache. What fails in one of them fails here later, and is seen."""
    d = min(hidden_size for _, _, hidden_size, _, _ in shapes)
    jobs = {(part, max(16, triton.next_power_of_2(k)), V): (part, k, V, d) for part, V, _, _, k in shapes}
    with concurrent.futures.ProcessPoolExecutor(min(len(jobs), 8), multiprocessing.get_context("spawn")) as pool:
        concurrent.futures.wait([pool.submit(compile_step, *job) for job in jobs.values()])


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=RULE_PARTS, help="parts, as guide,groups")
    parser.add_argument("--rows", type=numbers, default=ROWS)
    parser.add_argument("--k", type=numbers, default=TOP_K)
    parser.add_argument("--vocabulary", type=numbers, help="of all parts")
    parser.add_argument("--hidden", type=numbers, help="of all parts")
    parser.add_argument("--quick", action="store_true", help="128,256 tokens and a hidden size of 2048 alone")
    parser.add_argument("--reference", action="store_true", help="time the PyTorch reference too, which takes minutes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: TRITON_INTERPRET=1")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(RULE_PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: must be of {','.join(RULE_PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernel times kernels on a GPU, and there is none here")
    return args


def main(argv: list[str] | None = None) -> None:
    args, begun = parse(argv), time.monotonic()
    timer = GraphTimer() if args.device == "cuda" else WallTimer()
    shapes: list[tuple[str, int, int, int, int]] = []
    for part in args.only:
        vocabulary, hidden = (VOCABULARY, HIDDEN) if part == "guide" and not args.quick else QUICK
        every = (args.vocabulary or vocabulary, args.hidden or hidden, args.rows, args.k)
        shapes += [(part, *shape) for shape in itertools.product(*every)]
    if args.device == "cuda":
        compile_all(shapes)
    torch.manual_seed(0)
    bytes_per_second = bandwidth(timer, args.repeats)
    record: dict[str, Any] = {
        "hardware": timer.hardware,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": bytes_per_second,
        "unit": "microseconds a step",
        "method": "medians of replays: (copies, flush of L2, steps) - (copies, flush of L2), over the steps",
        "results": [],
    }
    print(f"{timer.hardware}: a copy moves {bytes_per_second / 1e12:.2f} TB/s [{time.monotonic() - begun:.0f} s]")
    names = ("fused", "limit", "limit/fused", "error", "composite", "reference")
    print(("{:>9}" * 5 + "{:>12}" * 6).format("part", "rows", "V", "d", "k", *names), flush=True)
    for part, vocab_size, hidden_size, num_rows, top_k in shapes:
        of = problem(part, num_rows, vocab_size, hidden_size, top_k, timer.device, timer.most_buffers)
        error = largest_error(of)
        if part not in {row["part"] for row in record["results"]}:
            check_graph(of, timer)
        steps = {"fused": fused.guide_} | ({"composite": composite_} if part == "guide" else {})
        if args.reference:
            steps["reference"] = reference.guide_
        times = time_steps(of, steps, timer, args.repeats)
        limit = of.moved / bytes_per_second * 1e6
        row: dict[str, Any] = {"part": part, "rows": num_rows, "vocab_size": vocab_size, "hidden_size": hidden_size}
        row |= {"top_k": top_k, **times, "limit": limit, "fraction": limit / times["fused"], "error": error}
        record["results"].append(row)
        others = "".join(f"{times[name]:12.1f}" if name in times else " " * 12 for name in names[4:])
        print(
            f"{part:>9}{num_rows:9}{vocab_size:9}{hidden_size:9}{top_k:9}"
            f"{times['fused']:12.1f}{limit:12.1f}{row['fraction']:12.2f}{error:12.1e}{others}",
            flush=True,
        )
        if args.output:  # as far as it has come
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.monotonic() - begun:.0f} s")
    if args.plot:
        plot_kernel(record, args.plot)


if __name__ == "__main__":
    main()
