"""The back ends that the throughput benchmark compares, each in a process of its own.

Only one of them works at a time; the others wait and cost nothing but memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .interpreter import complete, use_v2

if TYPE_CHECKING:
    from pad_vllm.worker.guidance import Guidance

PROMPT_TOKENS = range(100, 30_000)
"""Token ids of random prompts: nothing special among them."""


@dataclass(frozen=True)
class Workload:
    """What a batch of requests is like."""

    batch: int = 16
    prompt_len: int = 16
    output_len: int = 64
    top_k: int = 10
    share: float = 1.0
    """of guided requests"""
    personas: int = 1
    """among the guided requests; 0: guided without a preference"""
    reference: str = "base"
    """of the guided requests; ``neutral``: a second context for each"""


@dataclass(frozen=True)
class Setup:
    """What all cells share."""

    base: Path
    reward: Path
    dtype: str = "float32"
    enforce_eager: bool = False
    max_model_len: int = 2048
    max_num_seqs: int = 64
    kv_cache_memory_bytes: int = 2 << 30
    load_format: str = "auto"
    personas: Mapping[str, str] | None = None
    """Name -> preference."""


def random_prompts(cell: Workload, seed: int) -> list[list[int]]:
    """Random and new to every cache."""
    rng = random.Random(seed)
    return [rng.choices(PROMPT_TOKENS, k=cell.prompt_len) for _ in range(cell.batch)]


def guidance(cell: Workload, i: int) -> dict[str, Any] | None:
    """The arguments of request ``i``; the guided ones are spread evenly."""
    guided = int((i + 1) * cell.share) > int(i * cell.share)
    if not guided:
        return None
    asked: dict[str, Any] = {"pad_top_k": cell.top_k, "pad_reference": cell.reference}
    return asked | ({"pad_persona": f"p{i % cell.personas}"} if cell.personas else {})


class VllmBackend:
    """vLLM, in this process. ``plugin``: ``pad``, ``naive`` or none; ``model``: ``base`` or ``reward``."""

    def __init__(self, setup: Setup, plugin: str | None = None, model: str = "base") -> None:
        import vllm

        extra: dict[str, Any] = {}
        if plugin == "pad":
            personas = {name: {"preference": text} for name, text in (setup.personas or {}).items()}
            extra["logits_processors"] = ["pad_vllm:PADLogitsProcessor"]
            extra["additional_config"] = {"pad": {"reward_model": str(setup.reward), "personas": personas}}
        elif plugin == "naive":
            extra["logits_processors"] = [f"{__package__}.naive_plugin:NaiveProcessor"]
            extra["additional_config"] = {"naive": {"reward_model": str(setup.reward)}}
        self.plugin = plugin
        self.llm = vllm.LLM(
            str(getattr(setup, model)),
            dtype=setup.dtype,
            enforce_eager=setup.enforce_eager,
            max_model_len=setup.max_model_len if model == "base" else None,
            max_num_seqs=setup.max_num_seqs,
            kv_cache_memory_bytes=setup.kv_cache_memory_bytes,
            load_format=setup.load_format,
            enable_prefix_caching=False,
            **extra,
        )

    def run(self, cell: Workload, seed: int) -> float:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=cell.output_len,
                ignore_eos=True,
                detokenize=False,
                extra_args=self._arguments(cell, i),
            )
            for i in range(cell.batch)
        ]
        inputs = [{"prompt_token_ids": ids} for ids in random_prompts(cell, seed)]
        start = time.perf_counter()
        self.llm.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start

    def _arguments(self, cell: Workload, i: int) -> dict[str, Any] | None:
        asked = guidance(cell, i) if self.plugin else None
        if asked and self.plugin == "naive":  # pad's own would be refused by an engine without a reward model
            return {"naive_top_k": cell.top_k}
        return asked

    def reward_tokens(self) -> int:
        """How many tokens the reward model has computed."""
        return running_guidance().engine.stats.num_tokens

    def breakdown(self, cell: Workload, seed: int) -> dict[str, float]:
        from .breakdown import time_parts

        return time_parts(running_guidance(), lambda: self.run(cell, seed))


def running_guidance() -> Guidance:
    """Of the engine in this process."""
    from pad_vllm.processor import PADLogitsProcessor

    (processor,) = PADLogitsProcessor.running()
    assert processor.adapter is not None
    return processor.adapter.guidance


class Loop:
    """transformers, without vLLM. ``cached``: batched, with KV caches; else as published, one request at a time."""

    def __init__(self, setup: Setup, cached: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        dtype, self.device = getattr(torch, setup.dtype), "cuda" if torch.cuda.is_available() else "cpu"
        self.base, self.reward = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(self.device).eval()
            for path in (setup.base, setup.reward)
        )
        self.cached = cached

    def run(self, cell: Workload, seed: int) -> float:
        import torch

        from .loops import cached_loop, published_loop

        ids = torch.tensor(random_prompts(cell, seed), device=self.device)
        start = time.perf_counter()
        if self.cached:
            cached_loop(self.base, self.reward, ids, cell.output_len, cell.top_k)
        else:
            for row in ids:
                published_loop(self.base, self.reward, row[None], cell.output_len, cell.top_k)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


BACKENDS: dict[str, Any] = {
    "unguided": lambda setup: VllmBackend(setup),
    "guided": lambda setup: VllmBackend(setup, "pad"),
    "reward model alone": lambda setup: VllmBackend(setup, None, "reward"),
    "naive plugin": lambda setup: VllmBackend(setup, "naive"),
    "transformers loop, cached": lambda setup: Loop(setup, cached=True),
    "as published": lambda setup: Loop(setup, cached=False),
}
"""What is side by side. ``unguided``: vLLM without any plugin. ``reward model alone``: vLLM serving nothing else.
``naive plugin``: a logits processor with a transformers model and a cache for each request. ``as published``: the
authors' algorithm, no caches, one request at a time."""


ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def host_on_v2(setup: Setup, cell: Workload) -> dict[str, float]:
    """What the host does in a guided step on Model Runner V2, of :meth:`VllmBackend.breakdown`; in a process that has
    not imported vLLM yet. Without a GPU the kernels run in Triton's interpreter, and no other time says anything."""
    from .breakdown import HOST

    os.environ.update(ENVIRONMENT)
    use_v2()
    if os.environ.get("TRITON_INTERPRET") == "1":
        os.environ.setdefault("PAD_VLLM_KERNELS", "reference")
    engine = VllmBackend(replace(setup, enforce_eager=True), "pad")
    complete()
    engine.run(cell, 0)
    parts = engine.breakdown(cell, 1)
    engine.llm.llm_engine.engine_core.shutdown()
    return {part: parts[part] for part, _, _ in HOST}


class BackendProcess:
    """One of :data:`BACKENDS` in a process of its own; calls its object's methods."""

    def __init__(self, name: str, setup: Setup) -> None:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pad_vllm.evaluation.preload"])  # vLLM's modules, once for all of them
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, setup, theirs), name=name)
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._process.name}: its process ended") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()


def _serve(name: str, setup: Setup, pipe: Any) -> None:
    method = BACKENDS[name](setup)
    pipe.send(None)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            asked = None
        if asked is None:
            os._exit(0)  # what holds measured models needs no orderly end
        called, args = asked
        try:
            pipe.send(getattr(method, called)(*args))
        except Exception as error:
            pipe.send(RuntimeError(f"{name}: {type(error).__name__}: {error}"))
