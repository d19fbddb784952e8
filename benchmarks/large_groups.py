"""What a step costs whose candidates have a group of thousands of members, between real tokenizers, on a CPU.

    python -m benchmarks.large_groups FOLDER BASE:REWARD ... [--hidden-size 1024] [--output FILE]

FOLDER has a folder for each tokenizer, by its name (docs/families.md says where they come from). For each pair the
guidance step in PyTorch, as it runs on a CPU, in one thread and float32, with weights made here and the pair's real
vocabularies and tables: medians of interleaved calls on

- plain: a reward model with the base's tokenizer;
- small: candidates whose groups have at most 512 members;
- large: the same, one of them in the pair's largest group, in every row;
- head: the product of the hidden states with the whole output head, which none of these computes.

Also the time that the tables took. Goes on where it was stopped; a record of another machine is begun anew.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from pad_vllm.kernels import Groups, OutputHead, Rows, SharedVocabulary
from pad_vllm.kernels.large_groups import LARGE_ON_DEVICE
from pad_vllm.kernels.reference import guide_
from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.token_tables import TokenTables, make_tables

from .record import hardware

ROWS = (1, 16)
TOP_K = 10
REPEATS = 15
OUTPUT = Path(__file__).parent / "results" / "large-groups.json"


def read_tables(folder: Path, base: str, reward: str) -> tuple[TokenTables, ByteTokens, dict[str, float]]:
    """The tables of a pair, the reward model's tokens, and the seconds that both took, checks included."""
    began, cpu = time.perf_counter(), time.process_time()
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in (base, reward)]
    read = time.process_time() - cpu
    ours, theirs = (ByteTokens(t, name) for t, name in zip(tokenizers, (base, reward), strict=True))
    tables = make_tables(ours, {tokenizers[0].eos_token_id}, theirs, [tokenizers[1].eos_token_id])
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, "reading": read}
    return tables, theirs, {name: round(value, 1) for name, value in seconds.items()}


def candidates(tables: TokenTables, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """[TOP_K] base tokens with small groups, and with one of the largest group for the last."""
    sizes = np.diff(tables.member_starts)
    of_token = np.where(tables.key >= 0, sizes[np.maximum(tables.key, 0)], 0)
    small = rng.choice(np.flatnonzero((of_token > 0) & (of_token <= LARGE_ON_DEVICE)), TOP_K, replace=False)
    large = small.copy()
    large[-1] = of_token.argmax()
    return {"small": small, "large": large}


def time_step(tables: TokenTables, num_reward: int, num_rows: int, hidden_size: int) -> dict[str, float]:
    """Median milliseconds of each."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    vocab_size = len(tables.key)
    parts = (tables.key, tables.members, tables.member_starts)
    most = int(np.diff(tables.member_starts).max())
    arrays = (torch.from_numpy(np.ascontiguousarray(part, np.int32)) for part in parts)
    groups = Groups(vocab_size, *arrays, most)
    size = max(vocab_size, num_reward)
    lm_head = torch.randn(size, hidden_size, generator=generator) / hidden_size**0.5
    hidden = torch.randn(num_rows, hidden_size, generator=generator)
    index, beta = torch.arange(num_rows), torch.full((num_rows,), 0.8)
    top_k, end_ids = torch.full_like(index, TOP_K), torch.zeros_like(index)
    rows = Rows(index, top_k, beta, torch.ones_like(beta), end_ids, TOP_K)
    drawn = [candidates(tables, rng) for _ in range(num_rows)]

    def logits_of(name: str) -> torch.Tensor:
        logits = torch.randn(num_rows, vocab_size, generator=generator)
        for row, chosen in enumerate(drawn):
            logits[row, torch.from_numpy(chosen[name])] += 20
        return logits

    small, large = logits_of("small"), logits_of("large")
    head, shared_head = OutputHead(lm_head[:num_reward]), OutputHead(lm_head[:vocab_size])
    runs = {
        "plain": (lambda work: guide_(work, hidden, shared_head, rows, SharedVocabulary(vocab_size)), small),
        "small": (lambda work: guide_(work, hidden, head, rows, groups), small),
        "large": (lambda work: guide_(work, hidden, head, rows, groups), large),
        "head": (lambda work: hidden @ head.weight.T, small),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat, (name, (run, logits)) in itertools.product(range(REPEATS + 2), runs.items()):
        work = logits.clone()
        start = time.thread_time()
        run(work)
        if repeat >= 2:
            times[name].append(1000 * (time.thread_time() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", nargs="+", help="names of two tokenizers, base:reward")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"hidden_size": args.hidden_size, "top_k": TOP_K, "dtype": "float32", "threads": 1}
    record = json.loads(args.output.read_text()) if args.output.exists() else {}
    if (record.get("hardware"), record.get("settings")) != (hardware(), settings):
        record = {"hardware": hardware(), "settings": settings, "torch": torch.__version__, "pairs": {}}
    for pair in args.pairs:
        if pair in record["pairs"]:
            continue
        tables, reward, took = read_tables(args.folder, *pair.split(":"))
        sizes = np.diff(tables.member_starts)
        record["pairs"][pair] = entry = {
            "date": datetime.date.today().isoformat(),
            "tables": took,
            "groups": int((sizes > 0).sum()),
            "largest": int(sizes.max()),
            "largest_of": repr(reward.bytes[int(sizes.argmax())]),
            "over_512": int((sizes > LARGE_ON_DEVICE).sum()),
            "ms": {str(n): time_step(tables, reward.size, n, args.hidden_size) for n in ROWS},
        }
        args.output.write_text(json.dumps(record, indent=2) + "\n")
        print(pair, json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
