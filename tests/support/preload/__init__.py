"""What the processes of a runner's engines and servers have in common, imported once; see Worker."""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress

from tests.support.engine import set_environment

MODULES = {
    "v1": ["vllm.v1.worker.gpu_model_runner"],
    "v2": ["vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"],
}

AT_A_START = (
    "vllm.compilation.backends",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "pad_vllm.processor",
    "pad_vllm.worker.start",
)
"""What every start imports by itself, wherever a release has it: a second, in all."""


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
    for name in AT_A_START:
        with suppress(ImportError):
            importlib.import_module(name)
    with suppress(ImportError):  # else each engine would go through all loggers
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging_if_needed

        configure_logging_if_needed(LoggingConfig())
    gc.collect()
    gc.freeze()
