"""How large the reward model's KV cache is, where nobody says. Numbers in, a number out; bytes unless named."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseMemory:
    """What the base model's KV cache will be."""

    bytes_per_token: int
    num_tokens: int | None
    """If it was set; else it takes what is left of ``budget``."""
    budget: int
    """Memory for both KV caches, when the base's was not set."""


def derive_kv_cache_bytes(
    base: BaseMemory, bytes_per_token: float, stretch: float, one_context: int, max_num_seqs: int
) -> int:
    """Size of the reward model's KV cache, so that neither of the two runs short before the other.

    A request of n tokens takes n of the base's and at most ``stretch`` * n of the reward model's, so both caches are
    given room for the same requests. No more than every request at its full length needs, no less than one does.

    Args:
        base: the base model's side.
        bytes_per_token: of the reward model's KV cache.
        stretch: the reward model's longest context over the base's.
        one_context: the reward model's longest context.
        max_num_seqs: requests at one time.
    """
    per_base_token = bytes_per_token * stretch
    if base.num_tokens is not None:
        wanted = base.num_tokens * per_base_token
    else:
        wanted = max(base.budget, 0) * per_base_token / (base.bytes_per_token + per_base_token)
    return max(min(int(wanted), max_num_seqs * one_context), one_context)
