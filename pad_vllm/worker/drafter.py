"""The reward model as drafter of guided text.

At beta 1 the guided distribution is the reward model's own, restricted to the base model's candidates, so what the
reward model would say next is nearly always accepted. A draft is made in the request's own contexts, and nothing is
computed twice: its keys and values are those that verification reads, and the hidden states of drafted rows are kept,
so that verification runs the reward model for the last draft alone. With n drafts, the reward model runs n + 1 times
for one pass of the base model.

The draft's logits are the guided ones with the base model's unknown y replaced by what stands in for it: the reward
model without a preference where the request has that context (the neutral reference), else the mean of its contexts. Of
these, as of the base model's, only the request's top k are drafted, so that drafts are drawn from a few tokens and not
from the vocabulary. Whatever is drafted from, verification makes the output's distribution that of guidance without
drafts (Leviathan et al., arXiv 2211.17192).

Unguided requests are drafted as well, from a context without a preference, by the same model.

A reward model with another tokenizer drafts those base tokens of which one token of its own is the whole, as nearly all
of a text are. A token's rows are not one then (:mod:`.growth`), and verification computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pad_vllm.kernels import Mixture, map_heads, mix_contexts
from pad_vllm.params import MAX_CONTEXTS, GuidanceParams
from pad_vllm.reward.device import to_device
from pad_vllm.reward.engine import ContextRows
from pad_vllm.reward.token_tables import NO_KEY, TokenTables
from pad_vllm.worker.slots import RowParams

if TYPE_CHECKING:
    from pad_vllm.worker.batch import GuidedBatch
    from pad_vllm.worker.guidance import Guidance

Sample = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Draft number j, logits [R, K] in descending order (-inf: not to be drawn), token_ids [R, K] int64, row_slots [R],
positions [R] -> a token id of each row, [R] int64. Keeps the logits."""

UNGUIDED = GuidanceParams((), (1.0,), None, beta=0.0, top_k=0, reference="none")
"""Of a request that has a context to be drafted from, and whose rows are left alone."""


def draft_weights(params: GuidanceParams) -> tuple[list[float], float]:
    """What a draft's logits are made of.

    Returns:
        A weight for each of ``params.contexts()``, 1 in sum, and what their mixture is multiplied with.
    """
    contexts = params.contexts()
    total = sum(contexts.values())
    if None in contexts and len(contexts) > 1:
        stand_in = dict.fromkeys(contexts, 0.0) | {None: 1.0}
    elif total > 0:
        stand_in = {text: weight / total for text, weight in contexts.items()}
    else:
        stand_in = dict.fromkeys(contexts, 1 / len(contexts))
    rest = 1 - params.beta * params.base_weight
    weights = [rest * stand_in[text] + params.beta * weight for text, weight in contexts.items()]
    scale = sum(weights)
    if scale <= 0:
        return list(stand_in.values()), 1.0
    return [weight / scale for weight in weights], scale


class WholeTokens:
    """The base tokens that are one token of a reward model with another tokenizer."""

    def __init__(self, tables: TokenTables, device: torch.device) -> None:
        whole = tables.whole_tokens()
        columns = np.flatnonzero(whole != NO_KEY)
        self.columns = to_device(columns, device, torch.int64)
        """[W] int64: the reward tokens that are one"""
        self.base_ids = to_device(whole[columns], device, torch.int64)
        """[W] int64: of which"""
        reward_ids = np.zeros(len(tables.key), np.int64)
        reward_ids[whole[columns]] = columns
        self.reward_ids = to_device(reward_ids, device, torch.int64)
        """[base tokens] int64: what the reward model reads for one of these; anything for others"""


class Drafter:
    """Drafts tokens of requests, and keeps what their verification needs.

    Args:
        guidance: of the engine.
        num_drafts: most drafts of a request.
    """

    def __init__(self, guidance: Guidance, num_drafts: int) -> None:
        self.guidance, self.engine, self.model = guidance, guidance.engine, guidance.model
        self.num_drafts = num_drafts
        num_slots, device = guidance.no_slot + 1, guidance.device
        hidden_size = self.model.vllm_config.model_config.get_hidden_size()
        dtype = self.model.vllm_config.model_config.dtype
        self.whole: WholeTokens | None = None
        if guidance.pair is not None:
            self.whole = WholeTokens(guidance.pair.tables, device)
        tokens, last = guidance.fit.tokens, guidance.reward_vocab_size
        unknown = [i for i in (*tokens.foreign, *tokens.no_opinion) if i < last]
        self.not_drafted = to_device(unknown, device, torch.int64) if unknown else None
        """tokens with a row that the reward model does not know"""
        num_kept = 0 if self.whole else num_drafts
        self.kept = torch.zeros(self.engine.no_slot + 1, num_kept, hidden_size, dtype=dtype, device=device)
        """[contexts + 1, num_drafts, hidden_size]: hidden states of the tokens from which drafts were made"""
        self.num_kept = np.zeros(num_slots, np.int64)
        """[slots] of a request's contexts"""
        self.weights = torch.zeros(num_slots, MAX_CONTEXTS, device=device)
        """[slots, MAX_CONTEXTS]: :func:`draft_weights`"""
        self.scale = torch.ones(num_slots, 1, device=device)
        self.max_position = guidance.max_model_len - 1
        self._params: RowParams | None = None

    @torch.inference_mode()
    def warm_up(self, hidden_states: torch.Tensor) -> None:
        """Take the most memory that a draft does, while vLLM still counts; ``hidden_states`` [1, hidden_size]."""
        logits = self.model.model.compute_logits(hidden_states.expand(self.guidance.no_slot, -1))
        (logits * 1.0).topk(min(self.guidance.config.max_top_k, logits.shape[1]))

    def begin(self, slot: int, params: GuidanceParams) -> None:
        """A request begins in a slot."""
        weights, scale = draft_weights(params)
        weights += [0.0] * (MAX_CONTEXTS - len(weights))
        self.weights[slot] = to_device(weights, self.weights.device, torch.float32)
        self.scale[slot] = scale
        self.forget(slot)

    def forget(self, slot: int | np.ndarray) -> None:
        """What was kept of a request is not that of its next rows."""
        self.num_kept[slot] = 0

    def draft(self, batch: GuidedBatch, num_drafts: int, sample: Sample) -> torch.Tensor | None:
        """Draft tokens for requests, behind the last token of each.

        Args:
            batch: a row for each request: its last token, which no step has computed yet.
            num_drafts: at most ``self.num_drafts``; vLLM may ask for none.
            sample: draws tokens from logits.

        Returns:
            [R, num_drafts] int64; None where the reward model's pool has no room for drafts: they would take their
            blocks from contexts that guidance needs.
        """
        layout = batch.layout
        self.forget(layout.slots)
        if not num_drafts:
            return layout.row_slots.new_empty(len(layout.slots), 0)
        if self._params is None or self._params.layout is not layout:
            self._params = RowParams(layout, self.guidance.slots, 1)
        params = self._params
        if self.whole is None:
            rows, last = self.guidance.context_rows(batch, params), None
        else:
            rows, last, _ = self.guidance.growth.rows_on_device(batch, params)
        rows.num_tokens = np.minimum(rows.num_tokens + num_drafts, self.model.max_model_len)
        if not self.engine.blocks.has_room(rows.slots, rows.num_tokens):
            return None
        of_rows, positions, drafts = params.contexts.rows, batch.positions, []
        for j in range(num_drafts):
            hidden_states = self.engine.step(rows)
            if self.whole is None:
                self.kept[rows.row_slots, j] = hidden_states
            elif j == 0:  # the pieces of the last token; drafts are one each
                hidden_states, rows = hidden_states[last], rows.select(last)
            logits, ids = self._candidates(hidden_states, params)
            drafts.append(sample(j, logits, ids, layout.row_slots, positions))
            token_ids = drafts[-1] if of_rows is None else drafts[-1][of_rows]
            positions = (positions + 1).clamp(max=self.max_position)  # behind it, nothing is verified
            if self.whole is None:
                at = (positions if of_rows is None else positions[of_rows]) + params.contexts.ints.offset
                at = at.clamp(max=self.model.max_model_len - 1)  # behind it, verification ends the request
            else:
                at = (rows.positions + 1).clamp(max=self.model.max_model_len - 1)
                token_ids = self.whole.reward_ids[token_ids]
            rows = replace(rows, positions=at, token_ids=token_ids)
        if self.whole is None:
            self.num_kept[layout.slots] = num_drafts
        return torch.stack(drafts, 1)

    def _candidates(self, hidden_states: torch.Tensor, params: RowParams) -> tuple[torch.Tensor, torch.Tensor]:
        """What may be drafted, of ``hidden_states`` [context rows, hidden_size].

        Returns:
            logits [R, K] in descending order, -inf beyond a row's own k; token ids [R, K] int64.
        """
        guidance, dtype = self.guidance, hidden_states.dtype
        if params.head_mix is not None:
            hidden_states = map_heads(hidden_states, params.head_mix)
        slots = params.layout.row_slots
        if params.contexts.mixture is not None:
            contexts = params.contexts.mixture.contexts
            mixture = Mixture(contexts, self.weights[slots, : contexts.shape[1]].contiguous())
            hidden_states = mix_contexts(hidden_states, mixture)
        logits = self.model.model.compute_logits(hidden_states.to(dtype))
        if self.whole is not None:
            logits = logits[:, self.whole.columns]
        else:
            logits = logits[:, : guidance.vocab_size]
            if self.not_drafted is not None:
                logits = logits.index_fill(1, self.not_drafted, float("-inf"))
        # What an unguided row leaves out is drawn by verification.
        most = guidance.config.max_top_k if params.num_unguided else params.rows.max_top_k
        values, ids = logits.topk(min(most, logits.shape[1]))
        if params.min_top_k < most:
            place = torch.arange(values.shape[1], device=values.device)
            top_k = params.rows.top_k.unsqueeze(1)
            values = values.masked_fill((place >= top_k) & (top_k > 0), float("-inf"))
        if self.whole is not None:
            ids = self.whole.base_ids[ids]
        return values * self.scale[slots].to(values.dtype), ids

    def hidden_states(
        self, rows: ContextRows, request_slots: np.ndarray, local_positions: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of rows that are verified: those kept, and the last draft's, which is computed.

        Args:
            rows: of the step, R.
            request_slots: [requests] int64, whose they are.
            local_positions: [R] int64: how many drafts before each row's token, itself included.

        Returns:
            [R, hidden_size].
        """
        num_kept = int(self.num_kept[request_slots].min())
        same = num_kept == self.num_kept[request_slots].max()
        if not num_kept or not same or not self.engine.blocks.holds(rows.slots, rows.num_tokens):
            return self.engine.step(rows)
        is_last = (local_positions == num_kept) & (rows.row_slots != self.engine.no_slot)
        where = is_last.int().argsort(descending=True, stable=True)[: len(rows.slots)]
        is_last = is_last[where]
        last = rows.select(where)
        last.row_slots = last.row_slots.where(is_last, self.engine.no_slot)
        last.positions = last.positions.where(is_last, 0)
        computed = self.engine.step(last)
        hidden_states = self.kept[rows.row_slots, local_positions.clamp(max=num_kept - 1)]
        hidden_states[where] = computed.where(is_last.unsqueeze(1), hidden_states[where])
        return hidden_states
