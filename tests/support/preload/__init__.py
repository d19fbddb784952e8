"""What the processes of a runner's engines and servers have in common, imported once; see Worker."""

from __future__ import annotations

import gc
import importlib

from tests.support.engine import set_environment

MODULES = {
    "v1": ["vllm.v1.worker.gpu_model_runner"],
    "v2": ["vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"],
}


def load(runner: str) -> None:
    """Import what they need, and leave it out of every collection of garbage: vLLM's start has seven of them."""
    set_environment(runner)
    for name in (
        "vllm.entrypoints.llm",
        "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        *MODULES[runner],
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
