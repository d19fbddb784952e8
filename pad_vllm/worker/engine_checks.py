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
        "VLLM_USE_RUST_FRONTEND=1: that frontend runs no Python plugins, so nothing would refuse a request that cannot "
        "be guided; unset it": envs.VLLM_USE_RUST_FRONTEND,
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the reward model stands beside the whole base "
        "model; use tensor parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism splits sequences over ranks, and the reward model's would not be": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "data parallelism of a mixture of experts lets ranks step together, and only some have guided requests": (
            parallel.data_parallel_size > 1 and bool(parallel.is_moe_model)
        ),
        "enable_batch_sharded_sampling gives every rank other requests to sample": (
            parallel.enable_batch_sharded_sampling
        ),
        "on the V1 runner vLLM verifies drafts without logits processors; speculative decoding with guidance needs "
        "Model Runner V2, where the reward model itself can draft (docs/drafts.md)": (
            speculative is not None and not on_v2
        ),
        "rejection_sample_method='synthetic' accepts drafts whatever the guided logits say": (
            speculative is not None and speculative.rejection_sample_method == "synthetic"
        ),
        "enable_prompt_embeds: the reward model reads tokens": model.enable_prompt_embeds,
        "the base model takes more than text, and the reward model reads text alone; add --language-model-only": (
            model.is_multimodal_model and model.supports_multimodal_inputs
        ),
        "a diffusion model samples without logits processors": model.is_diffusion,
        "enable_sleep_mode: on this platform a sleep discards the reward model, and nobody loads it again": (
            on_v2 and model.enable_sleep_mode and not current_platform.is_cuda_alike()  # else: pad_vllm.worker.sleep
        ),
        "with async scheduling the V1 runner shows generated tokens only to listed logits processors; add "
        "--logits-processors pad_vllm:PADLogitsProcessor, or --no-async-scheduling": (
            not on_v2 and vllm_config.scheduler_config.async_scheduling and not model.logits_processors
        ),
    }
    if reward_model_drafts(vllm_config):
        refused |= {
            "the reward model drafts one token after the other; take out parallel_drafting": (
                speculative.parallel_drafting
            ),
            "enable_adaptive_verification asks a drafter for confidences, and the reward model gives none": (
                speculative.enable_adaptive_verification
            ),
            "watermark_config: the reward model's drafts bear no watermark; draft with another model": (
                getattr(vllm_config, "watermark_config", None) is not None
            ),
        }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"pad cannot guide this engine: {reason}")
