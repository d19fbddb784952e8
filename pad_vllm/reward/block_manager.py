"""Who holds which block of the reward KV cache.

The KV cache is only a cache: a context's tokens belong to the engine that generated them, and a context whose blocks
were taken by another is computed again from them. Blocks of equal prompts are shared, by vLLM's own block pool and
prefix hashing: a hash covers every token before a block's end, the preference's among them, and a
tenant's salt. Where a shared preference ends within a block, the block is copied from another context that holds it,
and the rest of it is the context's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, hash_block_tokens, init_none_hash

from pad_vllm.reward.device import to_device
from pad_vllm.reward.pace import ALONE, Lengths
from pad_vllm.reward.rows import ContextSlot

Tail = tuple[BlockHash | str | None, tuple[int, ...]]
"""Tokens that begin a block, behind the hash of the block before it; of a first one, behind its context's salt."""


class Copy(NamedTuple):
    """A block with which ``target`` begins: a copy of one of ``source``'s, once that is computed."""

    source: Context
    source_block: int
    target: Context
    block: int


@dataclass(eq=False)
class Context:
    """One sequence that the reward model reads: a composed prompt, then generated tokens.

    A context either holds blocks, and everything before its next token is computed in them, or holds none.
    """

    slot: ContextSlot
    prompt_ids: list[int]
    block_hashes: list[BlockHash]
    """Of the prompt's full blocks, without the prompt's last token: what ``BlockPool.cache_full_blocks`` reads."""
    blocks: list[KVCacheBlock] = field(default_factory=list)
    shared: tuple[int, ...] = ()
    """After how many tokens of the prompt something ends that others may have in common, in ascending order."""
    tails: list[Tail] = field(default_factory=list)
    """Under which its blocks in which that ends are known to others."""
    cache_salt: str | None = None
    """Contexts with another one share nothing with it."""
    was_computed: bool = False
    """Whether it ever held blocks: what it then lacks is computed again."""


@dataclass
class CacheStats:
    """Counters since the start."""

    num_prefix_hit_tokens: int = 0
    num_contexts_evicted: int = 0


class BlockManager:
    """Gives contexts their blocks, and takes them back.

    Args:
        num_blocks: of the KV cache, the null block among them.
        block_size: tokens in a block.
        max_num_contexts: contexts at one time; they are numbered from 0.
        max_num_blocks: blocks of the longest context.
        device: where attention reads the block table.
    """

    def __init__(
        self, num_blocks: int, block_size: int, max_num_contexts: int, max_num_blocks: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=block_size)
        self.hash_block = block_hasher()
        self.contexts: list[Context | None] = [None] * max_num_contexts
        self.num_held: np.ndarray = np.zeros(max_num_contexts, np.int64)
        """[max_num_contexts] blocks that each context holds"""
        self.table = torch.zeros(max_num_contexts + 1, max_num_blocks, dtype=torch.int32, device=device)
        """[max_num_contexts + 1, max_num_blocks] int32; the last row stands for no context: null blocks"""
        self.version = 0
        """Another one whenever the table, or the block that a context's last token is in, may be another"""
        self.stats = CacheStats()
        self.tails: dict[Tail, Context] = {}
        self.copies: list[Copy] = []
        """To be made before anything that was admitted is computed."""
        self.new_blocks: list[int] = []
        self._unwritten: list[tuple[Context, int]] = []  # from which of its blocks on
        self._clock = 0
        self._step_began = 0
        # By the clock, but for those that were ready last.
        self._last_used: np.ndarray = np.zeros(max_num_contexts, np.int64)
        self._ready: np.ndarray | None = None  # slots that were, and hold their blocks since
        # [C] of these, the least length with the same last block.
        self._lengths_begin: np.ndarray = np.zeros(0, np.int64)
        self._room = 0  # tokens that each of these may get without another block
        self._step = ALONE  # in which they were

    @property
    def num_free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def usage(self) -> float:
        """Part of the blocks that contexts hold, from 0 to 1."""
        return self.pool.get_usage()

    def add(
        self, slot: ContextSlot, prompt_ids: list[int], shared: Sequence[int] = (), cache_salt: str | None = None
    ) -> Context:
        """Begin a context at ``slot``, which must be free.

        ``shared``: after how many tokens something ends that others may have in common, in ascending order.
        ``cache_salt``: those with another one have nothing in common with it.
        """
        assert self.contexts[slot] is None
        # Copying waits for the source's forward. A few tokens are computed sooner, unless a preference is among them.
        ends = {min(n, len(prompt_ids) - 1) for n in shared if n >= self.block_size or n == shared[-1]}
        hashes: list[BlockHash] = []
        # The last token is left out: the step that scores the first candidates computes it, for its hidden state.
        for start in range(0, len(prompt_ids) - self.block_size, self.block_size):
            parent = hashes[-1] if hashes else None
            hashes.append(self.hash_block(parent, prompt_ids[start : start + self.block_size], cache_salt))
        context = Context(slot, prompt_ids, hashes, shared=tuple(sorted(ends)), cache_salt=cache_salt)
        self.contexts[slot] = context
        return context

    def _context(self, slot: int) -> Context:
        """Of a slot that has one."""
        context = self.contexts[slot]
        assert context is not None
        return context

    def remove(self, context: Context) -> None:
        """End a context. Its prompt's blocks stay in the cache until the pool needs them."""
        self.release(context)
        self.contexts[context.slot] = None

    def release(self, context: Context) -> None:
        """Take a context's blocks away."""
        for tail in context.tails:
            del self.tails[tail]
        context.tails.clear()
        self.pool.free_blocks(reversed(context.blocks))
        self._note_used()
        context.blocks = []
        self.num_held[context.slot] = 0

    def reset(self) -> None:
        """Forget everything that was computed."""
        for context in self.contexts:
            if context is not None:
                self.release(context)
        self.copies.clear()
        self.new_blocks.clear()
        self.pool.reset_prefix_cache()

    def begin_step(self) -> None:
        """What is used from now on belongs to a new step."""
        self._step_began = self._clock

    def ready(self, slots: np.ndarray, num_tokens: Lengths, step: int = ALONE) -> bool:
        """Whether contexts hold the blocks for so many tokens already; then they count as used. ``step``: of
        :class:`~pad_vllm.reward.pace.Pace`; one that follows the last reads nothing but a counter."""
        if self._ready is not None and self._room and step == self._step + 1:
            self._room, self._step = self._room - 1, step
            self._clock += 1
            return True
        self._step = step
        return self._look(slots, num_tokens.array())

    def _look(self, slots: np.ndarray, num_tokens: np.ndarray) -> bool:
        """As :meth:`ready`, by the contexts' lengths and blocks."""
        if slots is not self._ready or not self._in_last_blocks(num_tokens):
            self._note_used()
            if not self.holds(slots, num_tokens):
                return False
            self._ready, self._lengths_begin = slots, (num_tokens - 1) // self.block_size * self.block_size + 1
            self._in_last_blocks(num_tokens)
            self.version += 1
        self._clock += 1
        return True

    def holds(self, slots: np.ndarray, num_tokens: np.ndarray) -> bool:
        """Whether contexts hold the blocks for so many tokens already."""
        return bool((self.num_held[slots] >= self._num_blocks(num_tokens)).all())

    def has_room(self, slots: np.ndarray, num_tokens: np.ndarray) -> bool:
        """Whether contexts hold blocks, and may come to so many tokens without taking any from others."""
        held = self.num_held[slots]
        missing = np.maximum(self._num_blocks(num_tokens) - held, 0).sum()
        return bool(held.all()) and missing <= self.num_free_blocks

    def _in_last_blocks(self, num_tokens: np.ndarray) -> bool:
        """Whether the contexts that were ready last would have their last token in the same block as then."""
        beyond = num_tokens - self._lengths_begin
        self._room = self.block_size - 1 - int(beyond.view(np.uint64).max())  # what is before it is a huge number
        return self._room >= 0

    def _note_used(self) -> None:
        """Steps that change nothing leave this to the first one that does."""
        if self._ready is not None:
            self._last_used[self._ready] = self._clock
            self._ready = None

    def admit(self, line: Sequence[int], num_tokens: Sequence[int]) -> tuple[int, list[tuple[Context, int]]]:
        """Give contexts blocks, from the front of ``line`` to the first for whom there are none.

        A short pool lets contexts take blocks from others: first from those that are not in this step, least recently
        used first; then from those that this step is through with, the last one first (the first will be wanted
        soonest); then from the end of the line. The first in line therefore always gets its blocks.

        Args:
            line: slots of contexts.
            num_tokens: how long each may become.

        Returns:
            How many were admitted, and those of them that must be computed, in line, each with the number of its
            tokens that are computed already, or will be for a context before it.
        """
        self._note_used()
        admitted = 0
        cold: list[tuple[Context, int]] = []
        victims = self._victims(line)
        for slot, length in zip(line, num_tokens, strict=True):
            context = self._context(slot)
            is_cold = not context.blocks
            if is_cold:
                self._reuse_prefix(context)
            num_blocks = len(context.blocks)
            missing = int(self._num_blocks(length)) - num_blocks
            while missing > self.num_free_blocks and victims and victims[-1] is not context:
                self.stats.num_contexts_evicted += bool(victims[-1].blocks)
                self.release(victims.pop())
            if missing > self.num_free_blocks:
                if is_cold:
                    self.release(context)
                break
            if victims and victims[0] is context:
                del victims[0]
            if missing > 0:
                new_blocks = self.pool.get_new_blocks(missing)
                context.blocks += new_blocks
                self.new_blocks += [block.block_id for block in new_blocks]
            if is_cold:
                self._share_prefix(context, num_blocks)
                cold.append((context, num_blocks * self.block_size + self._share_tail(context, num_blocks)))
            if is_cold or missing > 0:
                self._unwritten.append((context, 0 if is_cold else num_blocks))
            self._clock += 1
            self._last_used[slot] = self._clock
            self.num_held[slot] = len(context.blocks)
            admitted += 1
        self._write_table()
        return admitted, cold

    def take_copies(self) -> list[Copy]:
        """What was decided since the last call."""
        copies, self.copies = self.copies, []
        return copies

    def take_new_blocks(self) -> list[int]:
        """Those given since the last call: what is in them is another context's."""
        new_blocks, self.new_blocks = self.new_blocks, []
        return new_blocks

    def _num_blocks(self, num_tokens: np.ndarray | int) -> np.ndarray | int:
        return np.minimum(-(-num_tokens // self.block_size), self.table.shape[1])

    def _victims(self, line: Sequence[int]) -> list[Context]:
        """Whose blocks may be taken, the next to give last; the line's first is the list's first."""
        waiting = set(line)
        others = [self._context(slot) for slot in np.flatnonzero(self.num_held).tolist() if slot not in waiting]
        others.sort(key=lambda context: self._last_used[context.slot])
        done = [context for context in others if self._last_used[context.slot] > self._step_began]
        return [self._context(slot) for slot in line] + done + others[: len(others) - len(done)][::-1]

    def _reuse_prefix(self, context: Context) -> None:
        """Start an empty context from the longest cached prefix of its prompt."""
        for block_hash in context.block_hashes:
            cached = self.pool.get_cached_block(block_hash, [0])
            if cached is None:
                break
            self.pool.touch(cached)
            context.blocks += cached

    def _share_prefix(self, context: Context, num_cached: int) -> None:
        """Let others reuse the full blocks of a prompt, those too that this step is about to compute: whoever reuses
        them comes later in line, and a layer writes all of a forward's keys and values before it attends."""
        self.stats.num_prefix_hit_tokens += num_cached * self.block_size
        num_full = len(context.block_hashes)
        if num_full > num_cached:
            self.pool.cache_full_blocks(
                context, context.blocks, num_cached, num_full, self.block_size, kv_cache_group_id=0
            )

    def _share_tail(self, context: Context, num_cached: int) -> int:
        """Let a context have what its shared head has beyond its last full block, from another that holds it, or let
        others have it from this one. Returns how many tokens it need not compute for that."""
        num_copied = 0
        for num_shared in reversed(context.shared):
            at = num_shared // self.block_size
            tokens = tuple(context.prompt_ids[at * self.block_size : num_shared])
            if not tokens:
                continue
            tail = context.block_hashes[at - 1] if at else context.cache_salt, tokens
            source = self.tails.get(tail)
            if source is None:
                self.tails[tail] = context
                context.tails.append(tail)
            elif num_cached == at and not num_copied:  # else it has that block already, or lacks others before it
                self.copies.append(Copy(source, source.blocks[at].block_id, context, context.blocks[at].block_id))
                num_copied = len(tokens)
        self.stats.num_prefix_hit_tokens += num_copied
        return num_copied

    def _write_table(self) -> None:
        """Bring the device's block table up to date with the blocks just given."""
        at: list[int] = []
        ids: list[int] = []
        for context, start in self._unwritten:
            row = context.slot * self.table.shape[1]
            at += range(row + start, row + len(context.blocks))
            ids += [block.block_id for block in context.blocks[start:]]
        self._unwritten.clear()
        if ids:
            self.version += 1
            self.table.view(-1)[to_device(at, self.device, torch.int64)] = to_device(ids, self.device, torch.int32)


def block_hasher() -> Callable[[BlockHash | None, list[int], str | None], BlockHash]:
    """vLLM's prefix-cache hash of a block: (hash of the block before it or None, its token ids, salt) -> hash."""
    init_none_hash(sha256)

    def hash_block(parent: BlockHash | None, token_ids: list[int], cache_salt: str | None) -> BlockHash:
        # As vLLM has it: the first block's hash has the salt, and through it all that follow.
        extra_keys = (("cache_salt", cache_salt),) if parent is None and cache_salt else None
        return hash_block_tokens(sha256, parent, token_ids, extra_keys)

    return hash_block
