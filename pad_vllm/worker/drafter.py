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

Where a request has a bound, its drafts keep to it too: their candidates are those of what stands in for y, and they
move away from that no further. Where nothing but the contexts' mean stands in, as with one preference and the base
reference, drafts do not move away from it at all, and the bound changes nothing.

Unguided requests are drafted as well, from a context without a preference, by the same model.

A reward model with another tokenizer drafts those base tokens of which one token of its own is the whole, as nearly all
of a text are. A token's rows are not one then (:mod:`.other_tokens`), and verification computes them again.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pad_vllm.kernels import Mixture, append_adapters, map_heads, mix_contexts
from pad_vllm.params import MAX_CONTEXTS, NEUTRAL, GuidanceParams
from pad_vllm.reward.device import to_device
from pad_vllm.worker.batch import GuidedBatch, RequestSlot
from pad_vllm.worker.contexts import Contexts
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.slots import RowParams, Slots


class Bound(NamedTuple):
    """What holds drafts back."""

    stand_in: torch.Tensor
    """[R, K] logits: what stands in for the base model's"""
    max_divergence: torch.Tensor
    """[R] float32; inf: of a row that is drafted as if there were none"""


class Proposals(NamedTuple):
    """What each row's draft is drawn from."""

    values: torch.Tensor
    """[R, K] logits in descending order, before ``scale``; of a row with a bound, by that of its ``stand_in``"""
    ids: torch.Tensor
    """[R, K] int64"""
    base_ids: torch.Tensor | None
    """[W] int64: the base's id of each; None: ``ids`` are the base's"""
    top_k: torch.Tensor
    """[R] int64: how many of a row's logits to draw from; 0: all"""
    scale: torch.Tensor
    """[R] float32: what a row's logits are multiplied with"""
    slots: torch.Tensor
    """[R] int64, of requests"""
    places: torch.Tensor
    """[R] int64, of requests in the batch"""
    bound: Bound | None = None
    """None: of no row"""


class Draws(Protocol):
    """Draws the drafts of a step, and hands them on."""

    def draw(self, j: int, proposals: Proposals, positions: torch.Tensor) -> torch.Tensor:
        """Draft number j of each row, [R] int64; keeps what it is drawn from. ``positions``: [R] int64, of the tokens
        before it."""

    def draw_all(self, batch: GuidedBatch, params: RowParams, num_drafts: int) -> bool | None:
        """Make all drafts at once, none of which a bound holds back.

        Returns:
            Whether there was room for them; None: it cannot be done with these rows, and nothing is.
        """


UNGUIDED = GuidanceParams((), (1.0,), None, beta=0.0, top_k=0, reference="none")
"""Of a request that has a context to be drafted from, and whose rows are left alone."""


def stand_in_weights(params: GuidanceParams) -> list[float]:
    """What stands in for the base model's logits: a weight for each of ``params.contexts()``, 1 in sum."""
    contexts = params.contexts()
    total = sum(contexts.values())
    if NEUTRAL in contexts and len(contexts) > 1:
        return [float(reading == NEUTRAL) for reading in contexts]
    if total > 0:
        return [weight / total for weight in contexts.values()]
    return [1 / len(contexts)] * len(contexts)


def draft_weights(params: GuidanceParams) -> tuple[list[float], float]:
    """What a draft's logits are made of.

    Returns:
        A weight for each of ``params.contexts()``, 1 in sum, and what their mixture is multiplied with.
    """
    stand_in, rest = stand_in_weights(params), 1 - params.beta * params.base_weight
    weights = [
        rest * own + params.beta * weight for own, weight in zip(stand_in, params.contexts().values(), strict=True)
    ]
    scale = sum(weights)
    if scale <= 0:
        return stand_in, 1.0
    return [weight / scale for weight in weights], scale


def can_be_held_back(params: GuidanceParams) -> bool:
    """Whether drafts move away from what stands in for the base model, and have a bound."""
    weights, scale = draft_weights(params)
    moved = [scale * weight - own for weight, own in zip(weights, stand_in_weights(params), strict=True)]
    return params.max_divergence is not None and max(map(abs, moved)) > 1e-6


class Drafter:
    """Drafts tokens of requests.

    Args:
        loaded: the reward model.
        contexts: the requests'.
        slots: what they ask for.
        max_model_len: of the base model.
    """

    def __init__(self, loaded: Loaded, contexts: Contexts, slots: Slots, max_model_len: int) -> None:
        self.contexts, self.slots = contexts, slots
        self.loaded = loaded
        self.max_top_k, self.max_position = loaded.fit.config.max_top_k, max_model_len - 1
        self.weights = torch.zeros(slots.no_slot + 1, MAX_CONTEXTS, device=loaded.device)
        """[slots, MAX_CONTEXTS]: :func:`draft_weights`"""
        self.scale = torch.ones(slots.no_slot + 1, device=loaded.device)
        self.stand_in = torch.zeros_like(self.weights)
        """[slots, MAX_CONTEXTS]: :func:`stand_in_weights`"""
        self.host_held_back: np.ndarray = np.zeros(slots.no_slot + 1, bool)
        """:func:`can_be_held_back`"""
        self._params: RowParams | None = None
        # Of the rows of _params, [R] each:
        self._row_scale = self.scale
        self._max_divergence: torch.Tensor | None = None

    @torch.inference_mode()
    def warm_up(self, hidden_states: torch.Tensor, num_rows: int) -> Proposals:
        """What a draft of ``num_rows`` rows is drawn from. With the most rows it takes the most memory that a draft
        does, while vLLM still counts.

        ``hidden_states``: [1, hidden_size].
        """
        places = torch.arange(num_rows, device=hidden_states.device)
        dtype, no_bound = hidden_states.dtype, torch.full_like(self.scale[places], math.inf)
        hidden_states = append_adapters(hidden_states, self.loaded.head.adapters).expand(num_rows, -1)
        values, ids, base_ids, bound = self.largest(
            hidden_states, hidden_states.clone(), dtype, no_bound, self.max_top_k
        )
        return Proposals(values, ids, base_ids, torch.zeros_like(places), self.scale[places], places, places, bound)

    def begin(self, slot: RequestSlot, params: GuidanceParams) -> None:
        """A request begins in a slot."""
        weights, self.scale[slot] = draft_weights(params)
        unused = [0.0] * (MAX_CONTEXTS - len(weights))
        for mix, column in ((weights, self.weights), (stand_in_weights(params), self.stand_in)):
            column[slot] = to_device([*mix, *unused], column.device, torch.float32)
        self.host_held_back[slot] = can_be_held_back(params)

    def draft(self, batch: GuidedBatch, num_drafts: int, draws: Draws) -> bool:
        """Draft tokens for requests, behind the last token of each.

        Args:
            batch: a row for each request: its last token, which no step has computed yet.
            num_drafts: vLLM may ask for none.
            draws: draws tokens from logits, and hands them on.

        Returns:
            Whether there was room for drafts.
        """
        layout = batch.layout
        self.contexts.forget_drafts(layout.slots)
        if not num_drafts:
            return True
        if self._params is None or self._params.layout is not layout:
            self._params, self._row_scale = RowParams(layout, self.slots, 1), self.scale[layout.row_slots]
            is_any_held = self.host_held_back[layout.slots].any()
            self._max_divergence = self._params.rows.max_divergence if is_any_held else None
        params = self._params
        if self._max_divergence is None:
            found = draws.draw_all(batch, params, num_drafts)
            if found is not None:
                return found
        # Behind the last position nothing is verified.
        further = torch.arange(num_drafts, device=layout.row_slots.device).unsqueeze(1)
        positions = (batch.device_positions() + further).clamp(max=self.max_position)
        draft = self.contexts.begin_draft(batch, params, num_drafts)
        if draft is None:
            return False
        for j in range(num_drafts):
            draft.extend(draws.draw(j, self._proposals(draft.hidden_states(), params), positions[j]))
        return True

    def _proposals(self, hidden_states: torch.Tensor, params: RowParams) -> Proposals:
        """What may be drafted, of ``hidden_states`` [context rows, hidden_size]."""
        dtype, slots = hidden_states.dtype, params.layout.row_slots
        if params.head_mix is not None:
            hidden_states = map_heads(hidden_states, params.head_mix)
        head = params.contexts.ints.of_head(self.loaded.head)
        stand_in = hidden_states = append_adapters(hidden_states, head.adapters)
        if params.contexts.mixture is not None:
            contexts = params.contexts.mixture.contexts
            mixed = [
                mix_contexts(hidden_states, Mixture(contexts, weights[slots, : contexts.shape[1]].contiguous()))
                for weights in (self.weights, *([] if self._max_divergence is None else [self.stand_in]))
            ]
            hidden_states, stand_in = mixed[0], mixed[-1]
        # What an unguided row leaves out is drawn by verification.
        most = self.max_top_k if params.num_unguided else params.rows.max_top_k
        values, ids, base_ids, bound = self.largest(hidden_states, stand_in, dtype, self._max_divergence, most)
        return Proposals(values, ids, base_ids, params.rows.top_k, self._row_scale, slots, params.rows.index, bound)

    def largest(
        self,
        hidden_states: torch.Tensor,
        stand_in: torch.Tensor,
        dtype: torch.dtype,
        max_divergence: torch.Tensor | None,
        most: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Bound | None]:
        """``values``, ``ids``, ``base_ids`` and ``bound`` of :class:`Proposals`, K at ``most``.

        Args:
            hidden_states: [R, hidden_size], of the draft, but for its scale; with what adapters of the head append.
            stand_in: [R, hidden_size], of what stands in for the base model; not read where there is no bound.
            dtype: of the reward model.
            max_divergence: [R] float32, or None.
        """
        logits, base_ids = self.contexts.draftable(self._logits(hidden_states, dtype))
        most = min(most, logits.shape[1])
        if max_divergence is None:
            values, ids = logits.topk(most)
            return values, ids, base_ids, None
        y = self.contexts.draftable(self._logits(stand_in, dtype))[0]
        ids = torch.where((max_divergence < math.inf).unsqueeze(1), y, logits).topk(most).indices
        return logits.gather(1, ids), ids, base_ids, Bound(y.gather(1, ids), max_divergence)

    def _logits(self, hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[R, d], or [R, d + Q] of :func:`~pad_vllm.kernels.append_adapters` -> [R, vocabulary]."""
        head, size = self.loaded.head, self.loaded.head.weight.shape[1]
        logits = self.loaded.model.model.compute_logits(hidden_states[:, :size].to(dtype))
        if head.adapters is None or head.soft_cap is not None or head.all_reduce is not None:
            return logits  # with the head as it is, drafts may be refused
        return logits + head.scale * (hidden_states[:, size:] @ head.adapters.b.float().T)
