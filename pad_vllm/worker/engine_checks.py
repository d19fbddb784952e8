"""The engines that could not be guided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms import current_platform

from pad_vllm.worker.patches import reward_model_drafts

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_engine(vllm_config: VllmConfig, on_v2: bool) -> None:
    """Raise ValueError for an engine configuration with which guidance could not work."""
    model, parallel, speculative = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    refused = {
        "VLLM_USE_RUST_FRONTEND=1: that frontend runs no Python plugins, so it could not refuse a request that cannot "
        "be guided; unset it": envs.VLLM_USE_RUST_FRONTEND,
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the reward model runs beside the whole base "
        "model, not beside a stage of it; use tensor parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism splits sequences over ranks, but the reward model's sequences stay whole; turn it off": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "data parallelism of a mixture of experts makes all ranks step together, but only some may have guided "
        "requests; use tensor parallelism": (parallel.data_parallel_size > 1 and bool(parallel.is_moe_model)),
        "enable_batch_sharded_sampling lets each rank sample other requests, but guidance needs all ranks on the "
        "same ones; turn it off": (parallel.enable_batch_sharded_sampling),
        "on the V1 runner vLLM verifies drafts without logits processors; speculative decoding with guidance needs "
        "Model Runner V2, where the reward model itself can draft (docs/drafts.md)": (
            speculative is not None and not on_v2
        ),
        "rejection_sample_method='synthetic' ignores the guided logits when it accepts drafts; choose another method": (
            speculative is not None and speculative.rejection_sample_method == "synthetic"
        ),
        "enable_prompt_embeds: the reward model reads tokens, not embeddings; turn it off": model.enable_prompt_embeds,
        "the base model takes more than text, but the reward model reads only text; add --language-model-only": (
            model.is_multimodal_model and model.supports_multimodal_inputs
        ),
        "a diffusion model samples without logits processors": model.is_diffusion,
        "enable_sleep_mode: on this platform a sleep discards the reward model, and nothing loads it again": (
            on_v2 and model.enable_sleep_mode and not current_platform.is_cuda_alike()  # else: pad_vllm.worker.sleep
        ),
        "with async scheduling the V1 runner shows generated tokens only to listed logits processors; add "
        "--logits-processors pad_vllm:PADLogitsProcessor, or --no-async-scheduling": (
            not on_v2 and vllm_config.scheduler_config.async_scheduling and not model.logits_processors
        ),
    }
    if reward_model_drafts(vllm_config):
        refused |= {
            "the reward model drafts one token after the other; leave parallel_drafting out": (
                speculative.parallel_drafting
            ),
            "enable_adaptive_verification needs confidences from the drafter, and the reward model gives none; turn "
            "it off": (speculative.enable_adaptive_verification),
            "watermark_config: the reward model's drafts carry no watermark; draft with another model": (
                getattr(vllm_config, "watermark_config", None) is not None
            ),
        }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"pad cannot guide this engine: {reason}")
