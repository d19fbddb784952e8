"""vLLM's sleep mode, and the reward model in it.

On a GPU that may sleep vLLM takes memory from pools with a tag. ``weights`` are kept on the host in a sleep of level 1;
level 2 discards them, and whoever wakes the engine loads the base model's anew. Nobody would load the reward model's,
and Model Runner V2 builds logits processors where it loads weights. So the reward model, its KV cache and the state of
requests are in a pool of the tag that vLLM gives its own state, which it keeps on the host at every level.

The V1 runner builds them outside its pools: there the reward model stays on the GPU, asleep or not. A reward model
that is the served one has no weights of its own to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.device_allocator import get_mem_allocator_instance
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from pad_vllm.worker.guidance import Guidance

KEPT_TAG = "runtime"
"""Of memory that ``CuMemBackend.suspend`` offloads at every level, and that every waking brings back."""


def make_kept(make: Callable[[], Guidance], vllm_config: VllmConfig, in_pools: bool) -> Guidance:
    """What ``make`` makes, where a sleeping engine keeps it. ``in_pools``: vLLM has opened those of its weights.

    Raises:
        ValueError: it is not there after all.
    """
    if not (in_pools and current_platform.is_cuda_alike() and vllm_config.model_config.enable_cumem_allocator):
        return make()
    allocator = get_mem_allocator_instance()
    with allocator.use_memory_pool(tag=KEPT_TAG):
        guidance = make()
    segments = {pointer: (data.handle[1], data.tag) for pointer, data in allocator.pointer_to_data.items()}
    for tensor in (*guidance.loaded.own_parameters(), *guidance.model.kv_caches.values()):
        if not is_kept(tensor, segments):
            raise ValueError(
                "pad cannot guide this engine: enable_sleep_mode: with this vLLM and this PyTorch a sleep of level 2 "
                "discards the reward model, and nothing loads it again; start without --enable-sleep-mode"
            )
    return guidance


def is_kept(tensor: torch.Tensor, segments: dict[int, tuple[int, str]]) -> bool:
    """Whether no sleep discards a tensor: it is outside of all ``segments`` (address -> size, tag), or in one that is
    kept."""
    address = tensor.data_ptr()
    tags = (tag for start, (size, tag) in segments.items() if start <= address < start + size)
    return next(tags, KEPT_TAG) == KEPT_TAG
