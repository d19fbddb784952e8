"""A soak: random requests through the asynchronous engine, arriving and leaving as users do.

    python -m tests.soak --requests 2000 --output benchmarks/results/soak.json

Lengths, personas, preferences, strengths, arrivals and aborts are random; the base's and the reward model's KV caches
are too small for the batch, so requests are preempted and contexts evicted. Afterwards every block must be free
(cached or not), memory must have stopped growing, and a random sample of the outputs must be the oracle's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.engine import ONE_CONTEXT, Worker, fork_processes, guided, pad_config, set_environment

MAX_MODEL_LEN, MAX_NUM_SEQS = 256, 16
PERSONAS = {
    "terse": {"preference": "concise, formal", "beta": 1.5},
    "mixed": {"weights": [0.7, -0.2, 0.5], "top_k": 20},
    "long": {"preference": "Please be playful, and give an example. " * 12, "beta": 0.5},
}
MIX = [0.7, -0.2, 0.5]


@dataclass
class Request:
    """One user's."""

    prompt: list[int]
    max_tokens: int
    pad: dict[str, Any]
    """Request arguments, without their prefix; none: unguided"""
    arrives: float
    """Seconds after the one before"""
    abort_after: int | None
    """Tokens that this user waits for"""


@dataclass
class Result:
    """What was seen; the checks are the caller's."""

    requests: int
    guided: int
    aborted: int
    preemptions: float
    seconds: float
    resident_mib: list[float]
    """Of the engine's process, at every tenth of the requests"""
    stats: dict[str, int]
    """The reward engine's, at the end"""
    sampled: int
    wrong: list[dict]
    """Of the sample, what is not the oracle's"""


def make_requests(number: int, vocabulary: range, rng: random.Random) -> list[Request]:
    prompts = [[0, *rng.choices(vocabulary, k=rng.choice([2, 8, 30, 90, 190]))] for _ in range(60)]
    asked = [
        *[{"persona": name} for name in PERSONAS],
        *[{"preference": f"say {word} " * 40, "beta": beta} for word in ("why", "when", "how") for beta in (0.5, 1.0)],
        {"preference": "formal", "weights": MIX, "top_k": 5},
        {"beta": 0.7},
        {"persona": "terse", "beta": 0.2},
    ]
    return [
        Request(
            prompt=rng.choice(prompts),
            max_tokens=rng.choice([1, 5, 16, 48]),
            pad=rng.choice(asked) if rng.random() < 0.7 else {},
            arrives=rng.expovariate(300),
            abort_after=rng.randrange(1, 12) if rng.random() < 0.15 else None,
        )
        for _ in range(number)
    ]


def _resident_mib(worker) -> float:
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss / 2**20


def _stats(worker) -> dict[str, int]:
    from pad_vllm import PADLogitsProcessor
    from tests.support.engine import guidance_stats

    (processor,) = PADLogitsProcessor.running()
    return guidance_stats(processor.adapter.guidance)


async def _serve(
    base: str, reward: str, requests: list[Request], num_drafts: int
) -> tuple[list[list[int] | None], dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    drafts = {"method": "draft_model", "model": reward, "num_speculative_tokens": num_drafts}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            base,
            dtype="float32",
            enforce_eager=True,
            seed=0,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=128,
            block_size=32,
            num_gpu_blocks_override=40,
            speculative_config=drafts if num_drafts else None,
            logits_processors=["pad_vllm:PADLogitsProcessor"],
            **pad_config(reward, personas=PERSONAS, kv_cache_memory_bytes=ONE_CONTEXT * 9 // 8),
        )
    )
    outputs: list[list[int] | None] = [None] * len(requests)
    resident, done, finished = [], 0, asyncio.Event()

    async def ask(i: int, request: Request) -> None:
        nonlocal done
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.CUMULATIVE,
            **(guided(**request.pad) if request.pad else {}),
        )
        stream = engine.generate({"prompt_token_ids": request.prompt}, params, request_id=str(i))
        async for output in stream:
            tokens = list(output.outputs[0].token_ids)
            if output.finished:
                outputs[i] = tokens
            elif request.abort_after is not None and len(tokens) >= request.abort_after:
                await stream.aclose()  # the client hangs up
                break
        done += 1
        if done % max(len(requests) // 10, 1) == 0:
            resident.extend(await engine.collective_rpc(_resident_mib))
        if done == len(requests):
            finished.set()

    began = time.time()
    tasks = set()
    for i, request in enumerate(requests):
        await asyncio.sleep(request.arrives)
        tasks.add(asyncio.create_task(ask(i, request)))
        if len(tasks) > 64:  # users beyond these wait outside
            _, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*tasks)
    seconds = time.time() - began
    async for _ in engine.generate(
        {"prompt_token_ids": [0, 5]}, SamplingParams(temperature=0.0, max_tokens=2), request_id="last"
    ):
        pass  # the runner hears of requests that left with its next step
    (stats,) = await engine.collective_rpc(_stats)
    from vllm.v1.metrics.reader import get_metrics_snapshot

    preemptions = sum(metric.value for metric in get_metrics_snapshot() if metric.name == "vllm:num_preemptions")
    engine.shutdown()
    return outputs, {"resident_mib": resident, "stats": stats, "seconds": seconds, "preemptions": preemptions}


def serve(base: str, reward: str, requests: list[Request], num_drafts: int) -> tuple[list, dict[str, Any]]:
    set_environment("v2" if num_drafts else "v1", multiprocess=True)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to look into the engine's process
    fork_processes()
    return asyncio.run(_serve(base, reward, requests, num_drafts))


def soak(models, expect, number: int, sample: int, seed: int = 0, num_drafts: int = 0) -> Result:
    """Run it. ``models`` and ``expect`` are the tests' own. With ``num_drafts``, on Model Runner V2, by drafts of the
    reward model."""
    rng = random.Random(seed)
    requests = make_requests(number, range(5, 500), rng)
    worker = Worker("v2" if num_drafts else "v1")
    try:
        outputs, seen = worker.run(serve, str(models.base), str(models.named), requests, num_drafts)
    finally:
        worker.close()
    complete = [i for i, output in enumerate(outputs) if output is not None]
    sampled = rng.sample(complete, min(sample, len(complete)))
    wrong = []
    for i in sampled:
        request = requests[i]
        expected = ask_oracle(expect, request)
        if outputs[i] != expected:
            wrong.append({"request": asdict(request), "expected": expected, "got": outputs[i]})
    return Result(
        requests=number,
        guided=sum(bool(request.pad) for request in requests),
        aborted=number - len(complete),
        sampled=len(sampled),
        wrong=wrong,
        **seen,
    )


def ask_oracle(expect, request: Request) -> list[int]:
    pad = PERSONAS.get(request.pad.get("persona"), {}) | {k: v for k, v in request.pad.items() if k != "persona"}
    head = "mixed" if pad.pop("weights", None) else None
    return expect(request.prompt, guided=bool(request.pad), head=head, max_tokens=request.max_tokens, **pad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drafts", type=int, default=0, help="of the reward model, on Model Runner V2")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    from pad_vllm.reward.template import PromptTemplate
    from tests.conftest import Models, make_expect

    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        expect = make_expect(models, PromptTemplate(models.tokenizer).compose)
        result = soak(models, expect, args.requests, args.sample, args.seed, args.drafts)
    record = {"hardware": f"{os.cpu_count()}-core {platform.machine()} CPU", "seed": args.seed, "drafts": args.drafts}
    record |= asdict(result)
    print(json.dumps(record, indent=2))
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    check(result, drafts=args.drafts > 0)


def check(result: Result, settled: bool = True, drafts: bool = False) -> None:
    """Raise AssertionError for whatever must not be. ``settled``: long enough for memory to have stopped growing."""
    assert not result.wrong, result.wrong[:3]
    stats = result.stats
    assert stats["free_blocks"] + stats["held_blocks"] == stats["blocks"], "blocks are lost"
    # Model Runner V2 does not say that a request left: its context is idle until its slot is taken.
    assert stats["contexts"] <= (MAX_NUM_SEQS if drafts else 0), "contexts are left"
    assert stats["evicted"] > 0
    assert not settled or result.preemptions > 0
    half, last = result.resident_mib[len(result.resident_mib) // 2], result.resident_mib[-1]
    assert not settled or last < half * 1.01, f"memory still grows: {result.resident_mib}"


if __name__ == "__main__":
    main()
