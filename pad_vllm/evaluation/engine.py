"""Answers from real vLLM engines, each in a process of its own, which gives everything back when it ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the process is the engine's already
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def _set_environment() -> None:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def quiet() -> None:
    """Let vLLM in this process log only errors, and reach no network. Call it before vLLM is imported. The
    environment's own settings take precedence."""
    _set_environment()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


@dataclass(frozen=True)
class Request:
    """One answer to ask for: prompt ids, and guidance arguments (none: unguided)."""

    prompt: Sequence[int]
    guidance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """Texts and token ids in the order of the requests, and how long the engine took for all of them.

    ``nll``: of each answer the mean negative log-likelihood of its tokens by the base model as it read the prompt, in
    nats, where asked for.
    """

    texts: list[str]
    tokens: list[list[int]]
    seconds: float
    nll: list[float] | None = None


def generate_batches(
    model: str,
    batches: Mapping[str, Sequence[Request]],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    nll: bool = False,
    stop: Sequence[str] = (),
    **engine: Any,
) -> dict[str, Answers]:
    """Answers to each batch of requests by one engine of ``model``. Request i of every batch draws with ``seed`` + i.

    Args:
        nll: whether to measure how likely the base model finds the answers.
        stop: texts that end an answer and are not part of it.
        engine: further arguments of ``vllm.LLM``.
    """
    _set_environment()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pad_vllm.evaluation.preload"])  # vLLM's modules, once for all engines
    with ProcessPoolExecutor(1, context) as process:
        sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "stop": list(stop)}
        if nll:
            sampling["logprobs"] = 0  # of the sampled tokens; raw, as the base model has them before any processor
        return process.submit(_generate, model, dict(batches), sampling, seed, engine).result()


def _generate(
    model: str, batches: dict[str, Sequence[Request]], sampling: dict[str, Any], seed: int, engine: dict[str, Any]
) -> dict[str, Answers]:
    from vllm import LLM, SamplingParams

    llm = LLM(model, **engine)
    answers: dict[str, Answers] = {}

    def run(requests: Sequence[Request]) -> Answers:
        params = [
            SamplingParams(**sampling, seed=seed + i, extra_args=dict(request.guidance) or None)
            for i, request in enumerate(requests)
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        first = [output.outputs[0] for output in outputs]
        nll = None
        if "logprobs" in sampling:
            nll = [
                -sum(found[token].logprob for token, found in zip(one.token_ids, one.logprobs, strict=True))
                / max(len(one.token_ids), 1)
                for one in first
            ]
        return Answers([one.text for one in first], [list(one.token_ids) for one in first], seconds, nll)

    for name, requests in batches.items():
        run(requests[:2])  # what is done once is not the method's
        answers[name] = run(requests)
    return answers
