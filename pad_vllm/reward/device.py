"""Small things between host and device, and whole blocks of KV caches."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d


def to_device(data: list | np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Host data on the device, through pinned memory: neither side waits for the other. A CPU may share the array."""
    return async_tensor_h2d(data, device, dtype)


class HostCopy:
    """A tensor on its way to the host, behind what the stream was already told to do."""

    def __init__(self, source: torch.Tensor) -> None:
        on_gpu = source.is_cuda
        self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu).copy_(source, non_blocking=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def tolist(self) -> list:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


@torch.inference_mode()
def copy_blocks(kv_caches: Iterable[torch.Tensor], pairs: list[tuple[int, int]]) -> None:
    """Copy blocks of every layer's KV cache, as if all at once.

    Args:
        kv_caches: [num_blocks, ...] each.
        pairs: (from, to). A block may be both: its context lost it to another in the same step. What is read is what
            was there before.
    """
    if not pairs:
        return
    for cache in kv_caches:
        source, target = to_device(np.array(pairs).T, cache.device, torch.int64)
        read = cache.index_select(0, source)  # all of them, before the first is written
        # Behind the shared tokens the source has its own, which may be NaN.
        cache[target] = read.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@torch.inference_mode()
def clear_blocks(kv_caches: Iterable[torch.Tensor], block_ids: list[int]) -> None:
    """Zero blocks of every layer's KV cache, [num_blocks, ...] each."""
    if block_ids:
        for cache in kv_caches:
            cache.index_fill_(0, to_device(block_ids, cache.device, torch.int64), 0)
