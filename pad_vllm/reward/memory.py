"""The size of the reward model's KV cache, if the configuration does not set it. Sizes are in bytes unless named
otherwise."""

from __future__ import annotations

from dataclasses import dataclass

TYPICAL_TOKENS = 1024
"""Of a typical request with its answer, in the base's tokens; at most half of what the engine takes."""
TYPICAL_PREFERENCE = 32
"""Tokens of a preference in words, those of the template around it apart."""


@dataclass(frozen=True)
class BaseMemory:
    """What the base model's KV cache will be."""

    bytes_per_token: int
    num_tokens: int | None
    """If it was set; else it takes what is left of ``budget``."""
    budget: int
    """Memory for both KV caches, when the base's was not set."""


@dataclass(frozen=True)
class TypicalContext:
    """The context of most requests, by which the KV cache is sized. Few have the longest preference that is allowed,
    and a KV cache that is too small makes steps slower, never wrong."""

    base_max_model_len: int
    stretch: float
    """How much longer a text is in the reward model's tokens"""
    num_own: int
    """Tokens of a preference, and of the template, that no other request has"""

    @property
    def num_base_tokens(self) -> int:
        return max(min(TYPICAL_TOKENS, self.base_max_model_len // 2), 1)

    @property
    def num_tokens(self) -> int:
        return round(self.num_base_tokens * self.stretch) + self.num_own

    @property
    def per_base_token(self) -> float:
        return self.num_tokens / self.num_base_tokens


def derive_kv_cache_bytes(
    base: BaseMemory, bytes_per_token: float, typical: TypicalContext, one_context: int, max_num_seqs: int
) -> int:
    """Size of the reward model's KV cache, so that neither of the two runs short before the other.

    Both caches are given room for the same typical requests, of one context each. No more than every request at its
    full length needs, no less than one does.

    Args:
        base: the base model's side.
        bytes_per_token: of the reward model's KV cache.
        typical: the context of most requests.
        one_context: the reward model's longest context.
        max_num_seqs: requests at one time.
    """
    per_base_token = bytes_per_token * typical.per_base_token
    if base.num_tokens is not None:
        wanted = base.num_tokens * per_base_token
    else:
        wanted = max(base.budget, 0) * per_base_token / (base.bytes_per_token + per_base_token)
    return max(min(int(wanted), max_num_seqs * one_context), one_context)
