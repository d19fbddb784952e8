"""What the guidance step costs on a GPU, against PyTorch and against the bytes that it must move.

    python -m benchmarks.kernel [--output benchmarks/results/kernel-<gpu>.json] [--plot kernel.png]

Needs torch, triton and a GPU; vLLM is not imported. For every shape, medians of interleaved calls on fresh copies of
the logits (the step works in place), with the L2 cache flushed before each:

- fused: the Triton kernels;
- reference: the same step in PyTorch (``pad_vllm.kernels.reference``);
- composite: the obvious one: topk, the whole lm_head product, gather, log_softmax, scatter;
- limit: one read and one write of the guided logits and k rows of lm_head each, at the bandwidth that a copy reaches on
  this card.

Values are checked first, against the reference in float64.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
from pathlib import Path

import torch
import triton

from pad_vllm.kernels import fused, reference

ROWS = (1, 8, 64, 256)
VOCABULARY = (32_000, 128_256, 256_000)
HIDDEN = (2048, 4096)
TOP_K = (10, 40)
FLUSH_BYTES = 2**28


def composite_(logits, hidden_states, lm_head, rows, top_k, beta, reference, end_ids, *, max_top_k, vocab_size):
    """The step as one would write it first; every row has the same k, and nothing ever fails."""
    z, ids = logits[rows].topk(max_top_k, dim=-1)
    r = (hidden_states @ lm_head.T).gather(1, ids).float()
    reward = r.log_softmax(-1) - reference.unsqueeze(1) * z.log_softmax(-1)
    guided = torch.full_like(logits, float("-inf")).scatter_(1, ids, z + beta.unsqueeze(1) * reward)
    logits[rows] = guided


STEPS = {"fused": fused.guide_, "reference": reference.guide_, "composite": composite_}


def problem(num_rows: int, vocab_size: int, hidden_size: int, top_k: int, device: str, dtype=torch.bfloat16):
    """Arguments of a step, without the logits; and the logits."""
    logits = 3 * torch.randn(num_rows, vocab_size, device=device)
    hidden = torch.randn(num_rows, hidden_size, device=device).to(dtype)
    lm_head = (torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    rows = torch.arange(num_rows, device=device)
    k = torch.full_like(rows, top_k)
    beta = torch.full((num_rows,), 0.8, device=device)
    args = (hidden, lm_head, rows, k, beta, torch.ones_like(beta), torch.zeros_like(rows))
    return args, {"max_top_k": top_k, "vocab_size": vocab_size}, logits


def check(args, kwargs, logits) -> float:
    """Largest difference from the float64 reference, over the candidates; which must be the same ones."""
    hidden, lm_head, _, _, beta, ref, _ = args
    ours = logits.clone()
    fused.guide_(ours, *args, **kwargs)
    z, ids = logits.double().topk(kwargs["max_top_k"], dim=-1)
    r = torch.einsum("rkd,rd->rk", lm_head[ids].double(), hidden.double())
    expected = z + beta.double().unsqueeze(1) * (r.log_softmax(-1) - ref.double().unsqueeze(1) * z.log_softmax(-1))
    assert ((ours > float("-inf")).sum(-1) == kwargs["max_top_k"]).all()
    difference = (ours.gather(1, ids).double() - expected).abs().max().item()
    assert difference < 1e-3, difference
    return difference


def bandwidth(device: str) -> float:
    """Bytes per second, read and written together, of a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / milliseconds * 1e3


def measure(args, kwargs, logits, repeats: int) -> dict[str, float]:
    """Median microseconds of each step, in turns."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=logits.device)
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for repeat in range(repeats + 3):
        for name, step in STEPS.items():
            work = logits.clone()
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Behind a kernel that keeps the device busy, so that launching is not what is measured.
            torch.cuda._sleep(200_000)
            begin.record()
            step(work, *args, **kwargs)
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def check_graph(args, kwargs, logits) -> None:
    """The step can be captured in a CUDA graph, and replayed on other logits."""
    static, expected = logits.clone(), logits.flip(1).contiguous()
    fused.guide_(static, *args, **kwargs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.guide_(static, *args, **kwargs)
    static.copy_(expected)
    graph.replay()
    fused.guide_(expected, *args, **kwargs)
    assert torch.equal(static, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernel times kernels on a GPU, and there is none here")
    device = "cuda"
    bytes_per_second = bandwidth(device)
    record = {
        "hardware": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_second": bytes_per_second,
        "unit": "microseconds, medians",
        "results": [],
    }
    print(f"{record['hardware']}: a copy moves {bytes_per_second / 1e12:.2f} TB/s")
    head = ("rows", "V", "d", "k", *STEPS, "limit", "limit/fused", "composite/fused", "error")
    print(("{:>15}" * len(head)).format(*head))
    for num_rows, vocab_size, hidden_size, top_k in itertools.product(ROWS, VOCABULARY, HIDDEN, TOP_K):
        step_args, kwargs, logits = problem(num_rows, vocab_size, hidden_size, top_k, device)
        error = check(step_args, kwargs, logits)
        check_graph(step_args, kwargs, logits)
        times = measure(step_args, kwargs, logits, args.repeats)
        moved = 2 * logits.nbytes + num_rows * (top_k + 1) * hidden_size * step_args[1].element_size()
        limit = moved / bytes_per_second * 1e6
        row = {"rows": num_rows, "vocab_size": vocab_size, "hidden_size": hidden_size, "top_k": top_k}
        row |= times | {"limit": limit, "error": error}
        record["results"].append(row)
        print(
            ("{:>15}" * 4).format(num_rows, vocab_size, hidden_size, top_k)
            + "".join(f"{value:15.1f}" for value in (*times.values(), limit))
            + f"{limit / times['fused']:15.2f}{times['composite'] / times['fused']:15.2f}{error:15.1e}"
        )
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(record, args.plot)


def plot(record: dict, path: Path) -> None:
    """Fraction of the byte limit over rows, a line for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(STEPS), figsize=(15, 4.5), sharey=True)
    for axis, name in zip(axes, STEPS, strict=True):
        for vocab_size, hidden_size, top_k in itertools.product(VOCABULARY, HIDDEN, TOP_K):
            shape = (vocab_size, hidden_size, top_k)
            points = [r for r in record["results"] if (r["vocab_size"], r["hidden_size"], r["top_k"]) == shape]
            label = f"V {vocab_size:,} d {hidden_size} k {top_k}"
            axis.plot([r["rows"] for r in points], [r["limit"] / r[name] for r in points], marker="o", label=label)
        axis.set(title=name, xlabel="guided rows", xscale="log", ylim=(0, 1.05))
    axes[0].set_ylabel("fraction of the byte limit")
    axes[-1].legend(fontsize=6)
    figure.suptitle(f"The guidance step on {record['hardware']}, {record['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
