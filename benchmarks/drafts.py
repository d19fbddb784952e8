"""What the reward model's drafts are worth: tokens for a pass of the base model, and what that would be in time.

Two parts of ``pad-vllm bench``: section ``drafts`` is the reward model by how many tokens it drafts, ``drafters`` holds
others beside it. Every strength and temperature is in one batch, request by request, so that a drafter is one engine.
Acceptance does not depend on the machine. Time does, so without a GPU it is the cost model's: a pass of the reward
model costs ``REWARD_COST`` of one of the base, and verification as much as a pass.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .interpreter import complete, use_v2
from .methods import running_guidance

BETAS = (0.5, 0.8, 1.0, 1.5)
TEMPERATURES = (0.0, 0.8)
NUM_DRAFTS = (1, 2, 4, 8)
TOP_K = 40
MEASURED_WITH = 4
"""Drafts of the engine that compares drafters."""
DRAFTERS_BETAS, DRAFTERS_TEMPERATURES = (0.5, 1.0), (0.0, 0.7)
"""of that engine"""
PROMPTS, OUTPUT_LEN = 3, 48
"""Requests of a strength and a temperature, and their tokens."""
REWARD_COST = 1.9 / 15.0
"""Bytes that a pass of an 8B base and of a 1B reward model read (docs/performance.md)."""


@dataclass(frozen=True)
class DraftSetup:
    """An engine with a drafter."""

    base: str
    reward: str
    drafter: str
    """A model's path: the reward model's, or another's"""
    num_drafts: int
    betas: tuple[float | None, ...] = BETAS
    """None: the requests are not guided"""
    temperatures: tuple[float, ...] = TEMPERATURES
    reference: str = "base"


@dataclass(frozen=True)
class Drafted:
    """Requests of one kind, and how many tokens each pass of the base model gave them."""

    beta: float | None
    temperature: float
    passes: list[int]
    reward_passes: float
    """of the engine, for each of its steps"""


def measure_drafts(setup: DraftSetup, prompts: Sequence[list[int]], preferences: Sequence[str | None]) -> list[Drafted]:
    """Run one engine, in this process, with ``PROMPTS`` requests of every kind at once."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    use_v2()
    if os.environ.get("TRITON_INTERPRET") == "1":
        os.environ.setdefault("PAD_VLLM_KERNELS", "reference")  # as exact, and nothing is timed
    from vllm import LLM, SamplingParams

    complete()
    kinds = list(product(setup.betas, setup.temperatures))
    llm = LLM(
        setup.base,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=len(kinds) * len(prompts),
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
        distributed_executor_backend="uni",
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": setup.reward, "kv_cache_memory_bytes": 1 << 30}},
        speculative_config={
            "method": "draft_model",
            "model": setup.drafter,
            "num_speculative_tokens": setup.num_drafts,
            "draft_sample_method": "probabilistic",
        },
    )
    engine, asked = llm.llm_engine, {}
    for beta, temperature in kinds:
        for i, prompt in enumerate(prompts):
            request_id = f"{beta}/{temperature}/{i}"
            guidance: dict[str, Any] = {"pad_beta": beta, "pad_top_k": TOP_K, "pad_reference": setup.reference}
            if preferences[i] is not None:
                guidance["pad_preference"] = preferences[i]
            asked[request_id] = 0
            params = SamplingParams(
                temperature=temperature,
                max_tokens=OUTPUT_LEN,
                ignore_eos=True,
                detokenize=False,
                seed=i,
                extra_args=None if beta is None else guidance,
            )
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    passes: dict[str, list[int]] = {request_id: [] for request_id in asked}
    begun, steps = reward_passes(), 0
    while engine.has_unfinished_requests():
        steps += 1
        for output in engine.step():
            name = output.request_id.rpartition("-")[0] or output.request_id
            name = name if name in asked else output.request_id
            length = len(output.outputs[0].token_ids)
            if asked[name] and not output.finished:  # the first is the prompt's pass, the last is cut to length
                passes[name].append(length - asked[name])
            asked[name] = length
    per_step = (reward_passes() - begun) / steps
    engine.engine_core.shutdown()
    return [
        Drafted(
            beta, temperature, [n for i in range(len(prompts)) for n in passes[f"{beta}/{temperature}/{i}"]], per_step
        )
        for beta, temperature in kinds
    ]


def reward_passes() -> int:
    return running_guidance().engine.stats.num_forwards


def accepted(passes: Sequence[int], num_drafts: int) -> list[float]:
    """By position: of the passes that came to a draft there, which part accepted it."""
    reached = [sum(n > i for n in passes) for i in range(num_drafts + 1)]
    return [round(reached[i + 1] / max(reached[i], 1), 3) for i in range(num_drafts)]


def speed(tokens: float, num_drafts: int) -> float:
    """Of the unguided base's, by the cost model."""
    return tokens / (1 + (num_drafts + 1) * REWARD_COST)


def chat_prompts(base: str, number: int) -> tuple[list[list[int]], list[str | None]]:
    """Prompts of the demo, held out, and a preference for each; random tokens and none where the base has no chats."""
    from transformers import AutoTokenizer

    from pad_vllm.demo import wishes

    tokenizer, rng = AutoTokenizer.from_pretrained(base), random.Random(0)
    if not tokenizer.chat_template:
        return [rng.choices(range(100, 500), k=16) for _ in range(number)], [None] * number
    texts, values = wishes.prompts(held_out=True), ("simple", "brief", "emphatic", "academic")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts[:number]
    ]
    return prompts, [wishes.preference([values[i % len(values)]], rng, held_out=True) for i in range(number)]


def rows(label: str, setup: DraftSetup, measured: Sequence[Drafted]) -> Iterator[dict[str, Any]]:
    for kind in measured:
        tokens = sum(kind.passes) / max(len(kind.passes), 1)
        yield {
            "label": label,
            "n": setup.num_drafts,
            "beta": kind.beta,
            "temperature": kind.temperature,
            "tokens_per_pass": round(tokens, 2),
            "accepted": accepted(kind.passes, setup.num_drafts),
            "reward_passes_per_pass": round(kind.reward_passes, 2),
            "speed_8b_1b": round(speed(tokens, setup.num_drafts), 2),
        }


Keep = Callable[[list[dict[str, Any]]], None]
"""Is given all rows whenever there are more: an engine takes minutes without a GPU."""


def by_number(base: str | None, reward: str | None, kept: Sequence[dict[str, Any]], keep: Keep) -> list[dict[str, Any]]:
    """The reward model's drafts, by how many there are; rows of the record.

    Args:
        base, reward: paths; None: the demo's models.
        kept: rows of engines that have been measured.
        keep: is given all rows as each engine ends.
    """
    base, reward = models(base, reward)
    return measure_setups([("reward model", DraftSetup(base, reward, reward, n)) for n in NUM_DRAFTS], kept, keep)


def by_drafter(
    base: str | None, reward: str | None, kept: Sequence[dict[str, Any]], keep: Keep
) -> list[dict[str, Any]]:
    """The reward model's drafts beside those of the same model without the preference; as :func:`by_number`."""
    base, reward = models(base, reward)
    first = DraftSetup(base, reward, reward, MEASURED_WITH, DRAFTERS_BETAS, DRAFTERS_TEMPERATURES)
    return measure_setups(
        [
            ("reward model", first),
            ("plain drafter", replace(first, drafter=base)),
            ("reward model, neutral reference", replace(first, reference="neutral")),
            ("reward model, unguided request", replace(first, betas=(None,))),
        ],
        kept,
        keep,
    )


def models(base: str | None, reward: str | None) -> tuple[str, str]:
    if base is not None and reward is not None:
        return base, reward
    from pad_vllm.demo.smollm import build_base, build_untrained

    return str(build_base()), str(build_untrained())


def measure_setups(
    setups: Sequence[tuple[str, DraftSetup]], kept: Sequence[dict[str, Any]], keep: Keep
) -> list[dict[str, Any]]:
    found = list(kept)
    measured_before = {(row["label"], row["n"]) for row in kept}
    prompts, preferences = chat_prompts(setups[0][1].base, PROMPTS)
    for label, setup in setups:
        if (label, setup.num_drafts) in measured_before:
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure_drafts, setup, prompts, preferences).result()
        for row in rows(label, setup, measured):
            found.append(row)
            print(
                f"{label:32} n {setup.num_drafts} beta {row['beta']} temperature {row['temperature']}: "
                f"{row['tokens_per_pass']} tokens a pass, accepted {row['accepted']}, "
                f"{row['reward_passes_per_pass']} reward passes",
                flush=True,
            )
        keep(found)
    return found
