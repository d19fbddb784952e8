"""The reward engine: contexts, their blocks of the reward KV cache, and the step that advances them.

The KV cache is only a cache. A context's tokens belong to the engine that generated them, and whatever is missing here
(never computed, evicted, taken by another context) is computed again from them. A pool too small for the contexts of
a step makes the step slower: it is run in several forwards, the contexts taking blocks from each other in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pad_vllm.reward.backend import BlockHash, BlockPool, ForwardBatch, KVCacheBlock, PagedModel, block_hasher


@dataclass(eq=False)
class Context:
    """One sequence that the reward model reads: a composed prompt, then generated tokens."""

    prompt_ids: list[int]
    block_hashes: list[BlockHash]
    """Of the prompt's full blocks; what ``BlockPool.cache_full_blocks`` reads."""
    blocks: list[KVCacheBlock] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_blocks: int = 0


@dataclass
class ContextStep:
    """Bring ``context`` to ``num_tokens`` tokens; the hidden state of the last one is wanted.

    Of the generated tokens, the last is taken from the step's ``last_token_ids`` (it may be on the device only); the
    ones before are already computed, or else read through ``output_ids``, which may synchronize with the device.
    """

    context: Context
    num_tokens: int
    output_ids: Callable[[], Sequence[int]]


@dataclass
class EngineStats:
    """Counters since the start."""

    num_forwards: int = 0
    num_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_contexts_evicted: int = 0


class RewardEngine:
    """Advances contexts through a :class:`PagedModel`, sharing the blocks of equal prefixes.

    Args:
        model: the reward model.
        max_num_batched_tokens: most tokens in one forward.
    """

    def __init__(self, model: PagedModel, max_num_batched_tokens: int) -> None:
        self.model = model
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_size = model.block_size
        self.block_pool = BlockPool(model.num_blocks, enable_caching=True, hash_block_size=model.block_size)
        self.hash_block = block_hasher()
        self.contexts: dict[Context, None] = {}  # those that hold blocks, least recently used first
        self.stats = EngineStats()

    def new_context(self, prompt_ids: list[int]) -> Context:
        hashes: list[BlockHash] = []
        for start in range(0, len(prompt_ids) - self.block_size + 1, self.block_size):
            parent = hashes[-1] if hashes else None
            hashes.append(self.hash_block(parent, prompt_ids[start : start + self.block_size]))
        return Context(prompt_ids, hashes)

    def free(self, context: Context) -> None:
        """Give a context's blocks back; those of its prompt stay cached until the pool needs them."""
        self.contexts.pop(context, None)
        self.block_pool.free_blocks(reversed(context.blocks))
        context.blocks = []
        context.num_computed_tokens = context.num_cached_blocks = 0

    def step(self, steps: Sequence[ContextStep], last_token_ids: torch.Tensor) -> torch.Tensor:
        """Advance every context of ``steps`` (each at most once).

        Args:
            steps: what to compute.
            last_token_ids: [len(steps)] int32 on the device, each context's last token; ignored for a context at
                the end of its prompt.

        Returns:
            [len(steps), hidden_size] hidden state of each context's last token, in the model's dtype.
        """
        hidden_states: torch.Tensor | None = None
        pending = list(range(len(steps)))
        while pending:
            scheduled = self._schedule(steps, pending)
            output, finished = self._forward(steps, scheduled, last_token_ids)
            if hidden_states is None:
                if len(finished) == len(steps):  # in their order
                    return output
                hidden_states = output.new_empty(len(steps), output.shape[-1])
            if finished:
                hidden_states[self._index(finished)] = output
            pending = [i for i in pending if i not in finished]
        assert hidden_states is not None
        return hidden_states

    def _schedule(self, steps: Sequence[ContextStep], pending: list[int]) -> list[tuple[int, int, int]]:
        """Pick this forward's share of ``pending``: (index into ``steps``, first token, one past the last)."""
        scheduled: list[tuple[int, int, int]] = []
        # Whose blocks may be taken, the next to give last: idle contexts, least recently used first, then those of
        # this step from the end of the line. The first in line may take from all, so every forward finishes a piece.
        line = {steps[i].context: place for place, i in enumerate(pending)}
        idle = [(len(steps), context) for context in self.contexts if context not in line]
        victims = [(place, context) for context, place in line.items()] + idle[::-1]
        budget = self.max_num_batched_tokens
        for place, i in enumerate(pending):
            context, num_tokens = steps[i].context, steps[i].num_tokens
            if budget == 0:
                break
            if not context.blocks:
                self._reuse_prefix(context, num_tokens)
            # A context already complete computes its last token again, for its hidden state.
            start = min(context.num_computed_tokens, num_tokens - 1)
            end = min(num_tokens, start + budget)
            if not self._allocate(context, end, victims, place):
                break
            budget -= end - start
            scheduled.append((i, start, end))
        assert scheduled, "the pool holds at least one whole context"
        # Single tokens first: the order that attention back ends with a decode path ask for.
        return sorted(scheduled, key=lambda s: (s[2] - s[1], s[0]))

    def _allocate(self, context: Context, num_tokens: int, victims: list[tuple[int, Context]], place: int) -> bool:
        """Give ``context`` the blocks for ``num_tokens`` tokens, if need be those of victims behind its place."""
        missing = -(-num_tokens // self.block_size) - len(context.blocks)
        while missing > self.block_pool.get_num_free_blocks():
            if not victims or victims[-1][0] <= place:
                return False
            _, victim = victims.pop()
            self.stats.num_contexts_evicted += bool(victim.blocks)
            self.free(victim)
        if missing > 0:
            context.blocks += self.block_pool.get_new_blocks(missing)
        self._touch(context)
        return True

    def _touch(self, context: Context) -> None:
        """Make ``context`` the most recently used."""
        self.contexts.pop(context, None)
        self.contexts[context] = None

    def _reuse_prefix(self, context: Context, num_tokens: int) -> None:
        """Start from the longest cached prefix; the last token is always computed."""
        for block_hash in context.block_hashes[: (num_tokens - 1) // self.block_size]:
            cached = self.block_pool.get_cached_block(block_hash, [0])
            if cached is None:
                break
            self.block_pool.touch(cached)
            context.blocks += cached
        context.num_cached_blocks = len(context.blocks)
        context.num_computed_tokens = len(context.blocks) * self.block_size
        self.stats.num_prefix_hit_tokens += context.num_computed_tokens
        self._touch(context)

    def _forward(
        self, steps: Sequence[ContextStep], scheduled: list[tuple[int, int, int]], last_token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """Run one forward. Returns the hidden states of the contexts that it finished, and which those are."""
        num_reqs, lengths = len(scheduled), [end - start for _, start, end in scheduled]
        query_start_loc = np.zeros(num_reqs + 1, np.int32)
        np.cumsum(lengths, out=query_start_loc[1:])
        block_table = np.zeros((num_reqs, self.model.max_num_blocks), np.int32)
        token_ids = np.zeros(query_start_loc[-1], np.int32)
        for row, (i, start, end) in enumerate(scheduled):
            block_table[row, : len(steps[i].context.blocks)] = [block.block_id for block in steps[i].context.blocks]
            token_ids[query_start_loc[row] : query_start_loc[row + 1]] = self._token_ids(steps[i], start, end)
        positions = np.concatenate([np.arange(start, end, dtype=np.int64) for _, start, end in scheduled])
        rows = np.repeat(np.arange(num_reqs), lengths)
        slots = block_table[rows, positions // self.block_size].astype(np.int64) * self.block_size
        batch = ForwardBatch(
            input_ids=torch.from_numpy(token_ids).to(self.model.device, non_blocking=True),
            positions=positions,
            slot_mapping=slots + positions % self.block_size,
            query_start_loc=query_start_loc,
            seq_lens=np.array([end for _, _, end in scheduled], np.int32),
            block_table=block_table,
        )
        # Each generated token that is a context's last comes straight from the device.
        last = [
            (query_start_loc[row + 1] - 1, i)
            for row, (i, _, end) in enumerate(scheduled)
            if end == steps[i].num_tokens > len(steps[i].context.prompt_ids)
        ]
        if last:
            at, of = self._index(last).T
            batch.input_ids[at] = last_token_ids[of]

        hidden_states = self.model.forward(batch)

        self.stats.num_forwards += 1
        self.stats.num_tokens += len(positions)
        for i, _, end in scheduled:
            self._computed(steps[i].context, end)
        finished = {
            i: query_start_loc[r + 1] - 1 for r, (i, _, end) in enumerate(scheduled) if end == steps[i].num_tokens
        }
        order = sorted(finished)
        return hidden_states[self._index([finished[i] for i in order])], order

    def _index(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.model.device, non_blocking=True)

    def _token_ids(self, step: ContextStep, start: int, end: int) -> list[int]:
        """A context's tokens [start, end), with a 0 for a last one that comes from the device."""
        prompt_ids = step.context.prompt_ids
        token_ids = prompt_ids[start:end]
        if end > len(prompt_ids):
            first, stop = max(start - len(prompt_ids), 0), end - len(prompt_ids)
            from_device = int(end == step.num_tokens)
            if stop - from_device > first:
                token_ids = [*token_ids, *step.output_ids()[first : stop - from_device]]
            token_ids = [*token_ids, *[0] * from_device]
        return token_ids

    def _computed(self, context: Context, num_tokens: int) -> None:
        """Record that a context is computed up to ``num_tokens``, and share its prompt's full blocks."""
        context.num_computed_tokens = num_tokens
        full = min(num_tokens // self.block_size, len(context.block_hashes))
        if full > context.num_cached_blocks:
            self.block_pool.cache_full_blocks(
                context, context.blocks, context.num_cached_blocks, full, self.block_size, kv_cache_group_id=0
            )
            context.num_cached_blocks = full
