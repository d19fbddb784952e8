"""A real vLLM engine in a process of its own, so that tests choose the runner and several engines stay apart."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any
from unittest.mock import patch

from pad_vllm.benchmarks import interpreter

# Nothing but loopback is reached from a test.
OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
CORES = sorted(os.sched_getaffinity(0))
A_CORE_EACH = f"{CORES[0]}|{CORES[-1]}"
"""VLLM_CPU_OMP_THREADS_BIND of two ranks."""
PLUGIN = ["pad_vllm:PADLogitsProcessor"]
KV_CACHE = 128 << 20
"""Bytes of a base model's KV cache, where a test says nothing of it. VLLM_CPU_KVCACHE_SPACE is at least a GiB, which a
start fills with zeros."""
ONE_CONTEXT = 1024 * 2 * 2 * 32 * 4
"""Bytes of the tests' reward model's KV cache: tokens, layers, key and value, head size, float32."""

_llm: Any = None


def set_environment(runner: str, multiprocess: bool = False, kernels: str = "reference") -> None:
    """Choose the runner, and the kernels; before vLLM is imported. On a CPU, V2 and Triton run in the interpreter."""
    os.environ["PAD_VLLM_KERNELS"] = kernels
    os.environ.update(OFFLINE, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(multiprocess)), VLLM_CPU_KVCACHE_SPACE="1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if runner == "v2":
        interpreter.use_v2()


def fork_processes() -> None:
    """On a CPU vLLM spawns an engine's processes, each of which imports it again; let this process fork its own."""
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context(
        "fork" if method in ("spawn", "forkserver") else method
    )


def preload_processes() -> None:
    """Let the engines that this package starts be forked from the process that the tests' own are."""
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: Preloaded("v1") if method == "forkserver" else get_context(method)


def _start(runner: str, multiprocess: bool, kernels: str, kwargs: dict[str, Any]) -> None:
    global _llm
    set_environment(runner, multiprocess, kernels)
    if multiprocess:
        fork_processes()
    from vllm import LLM

    interpreter.complete()
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]  # or it would be taken for what is asked here
    if not multiprocess:
        kwargs["distributed_executor_backend"] = "uni"
    _llm = LLM(**kwargs)


def _stop() -> None:
    gc.collect = lambda *_: 0  # of a process that ends, for a second
    # Else the process would wait, on its way out, for an engine core that waits for it.
    _llm.llm_engine.engine_core.shutdown()


def _generate(prompts: list[list[int]], params: list[dict[str, Any]]) -> list[list[int]]:
    from vllm import SamplingParams

    outputs = _llm.generate(
        [{"prompt_token_ids": p} for p in prompts], [SamplingParams(**p) for p in params], use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _call(function, *args):
    return function(_llm, *args)


def _inherit(environment: dict[str, str]) -> None:
    os.environ.update(environment)


class PreloadedProcess(ForkServerProcess):
    """Forked from a process that has imported vLLM for a runner, which takes a quarter of a minute."""

    runner: str

    def start(self) -> None:
        # multiprocessing has one server for all processes; this one has imported something else.
        with patch.object(forkserver, "connect_to_new_process", SERVERS[self.runner].connect_to_new_process):
            super().start()


class Preloaded(ForkServerContext):
    def __init__(self, runner: str) -> None:
        self.runner = runner

    def Process(self, *args: Any, **kwargs: Any) -> PreloadedProcess:
        process = PreloadedProcess(*args, **kwargs)
        process.runner = self.runner
        return process


SERVERS = {runner: forkserver.ForkServer() for runner in ("v1", "v2")}
for _runner, _server in SERVERS.items():
    _server.set_forkserver_preload([f"tests.support.preload.{_runner}"])


class Worker:
    """A fresh process that runs functions, and raises here what they raise there; it has a runner's vLLM already."""

    def __init__(self, runner: str) -> None:
        self._pool = ProcessPoolExecutor(1, Preloaded(runner), _inherit, (dict(os.environ),))

    def run(self, function: Callable, *args: Any) -> Any:
        return self._pool.submit(function, *args).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Engine(Worker):
    """``vllm.LLM`` in a process of its own. ``multiprocess``: its engine core in yet another, as it is served.

    ``kernels``: the Triton interpreter takes some milliseconds a row, so most tests use the reference; V2 with Triton's
    is the plugin as a GPU runs it. ``before`` is called in the engine's process before there is one.
    """

    def __init__(
        self,
        runner: str,
        model: Any,
        *,
        multiprocess: bool = False,
        kernels: str = "reference",
        before: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(runner)
        if before is not None:
            self.run(before)
        settings = {"model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "seed": 0}
        settings["kv_cache_memory_bytes"] = KV_CACHE
        try:
            self.run(_start, runner, multiprocess, kernels, settings | kwargs)
        except BaseException:
            super().close()
            raise

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]] | dict[str, Any]) -> list[list[int]]:
        """One completion of each prompt, token ids in and out."""
        per_prompt = params if isinstance(params, list) else [params] * len(prompts)
        return self.run(_generate, prompts, per_prompt)

    def close(self) -> None:
        self.run(_stop)
        super().close()

    def call(self, function: Callable, *args: Any) -> Any:
        """``function(llm, *args)`` in the engine's process."""
        return self.run(_call, function, *args)


def pad_config(reward_model, **pad) -> dict:
    return {"additional_config": {"pad": {"reward_model": str(reward_model), "reference": "base", **pad}}}


def running_guidance(llm):
    """The guidance of an engine that runs in this process."""
    from pad_vllm import PADLogitsProcessor

    (processor,) = [p for p in PADLogitsProcessor.running() if p.vllm_config is llm.llm_engine.vllm_config]
    return processor.adapter.guidance


def engine_stats(llm) -> dict:
    """Of the running processors in the engine's process."""
    from pad_vllm import PADLogitsProcessor

    copies = len(PADLogitsProcessor.running())
    return guidance_stats(running_guidance(llm)) | {"copies": copies}


def guidance_stats(guidance) -> dict[str, int]:
    engine = guidance.engine
    blocks = engine.blocks
    contexts = [context for context in blocks.contexts if context is not None]
    return {
        "evicted": blocks.stats.num_contexts_evicted,
        "prefix_hits": blocks.stats.num_prefix_hit_tokens,
        "tokens": engine.stats.num_tokens,
        "contexts": len(contexts),
        "held_blocks": len({block.block_id for context in contexts for block in context.blocks}),
        "free_blocks": blocks.num_free_blocks,
        "blocks": engine.model.num_blocks - 1,
    }


def metric(llm, name: str) -> float:
    """One of vLLM's own counters; needs ``disable_log_stats=False``."""
    return next(counter.value for counter in llm.get_metrics() if counter.name == name)


def greedy(max_tokens: int, **pad: Any) -> dict[str, Any]:
    """Sampling parameters of a request of exactly ``max_tokens``, guided if anything is asked."""
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | (guided(**pad) if pad else {})


def guided(**pad: Any) -> dict[str, Any]:
    """``extra_args`` of a guided request, from names without their prefix."""
    return {"extra_args": {f"pad_{key}": value for key, value in pad.items()}}
