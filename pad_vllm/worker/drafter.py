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
of a text are. A token's rows are not one then (:mod:`.other_tokens`), and verification computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pad_vllm.kernels import Mixture, append_adapters, map_heads, mix_contexts
from pad_vllm.params import MAX_CONTEXTS, NEUTRAL, GuidanceParams
from pad_vllm.reward.device import to_device
from pad_vllm.worker.batch import GuidedBatch, RequestSlot
from pad_vllm.worker.contexts import Contexts
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.slots import RowParams, Slots


class Proposals(NamedTuple):
    """What each row's draft is drawn from."""

    values: torch.Tensor
    """[R, K] logits in descending order, before ``scale``"""
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


Sample = Callable[[int, Proposals, torch.Tensor], torch.Tensor]
"""Draft number j, what it is drawn from, positions [R] -> a token id of each row, [R] int64. Keeps the logits."""

UNGUIDED = GuidanceParams((), (1.0,), None, beta=0.0, top_k=0, reference="none")
"""Of a request that has a context to be drafted from, and whose rows are left alone."""


def draft_weights(params: GuidanceParams) -> tuple[list[float], float]:
    """What a draft's logits are made of.

    Returns:
        A weight for each of ``params.contexts()``, 1 in sum, and what their mixture is multiplied with.
    """
    contexts = params.contexts()
    total = sum(contexts.values())
    if NEUTRAL in contexts and len(contexts) > 1:
        stand_in = dict.fromkeys(contexts, 0.0) | {NEUTRAL: 1.0}
    elif total > 0:
        stand_in = {reading: weight / total for reading, weight in contexts.items()}
    else:
        stand_in = dict.fromkeys(contexts, 1 / len(contexts))
    rest = 1 - params.beta * params.base_weight
    weights = [rest * stand_in[reading] + params.beta * weight for reading, weight in contexts.items()]
    scale = sum(weights)
    if scale <= 0:
        return list(stand_in.values()), 1.0
    return [weight / scale for weight in weights], scale


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
        self.compute_logits, self.head = loaded.model.model.compute_logits, loaded.head
        self.max_top_k, self.max_position = loaded.fit.config.max_top_k, max_model_len - 1
        self.weights = torch.zeros(slots.no_slot + 1, MAX_CONTEXTS, device=loaded.device)
        """[slots, MAX_CONTEXTS]: :func:`draft_weights`"""
        self.scale = torch.ones(slots.no_slot + 1, device=loaded.device)
        self._params: RowParams | None = None
        self._row_scale = self.scale  # [R], of the rows of _params

    @torch.inference_mode()
    def warm_up(self, hidden_states: torch.Tensor, num_rows: int) -> Proposals:
        """What a draft of ``num_rows`` rows is drawn from. With the most rows it takes the most memory that a draft
        does, while vLLM still counts.

        ``hidden_states``: [1, hidden_size].
        """
        logits, base_ids = self.contexts.draftable(self.compute_logits(hidden_states.expand(num_rows, -1)))
        values, ids = logits.topk(min(self.max_top_k, logits.shape[1]))
        places = torch.arange(num_rows, device=ids.device)
        return Proposals(values, ids, base_ids, torch.zeros_like(places), self.scale[places], places, places)

    def begin(self, slot: RequestSlot, params: GuidanceParams) -> None:
        """A request begins in a slot."""
        weights, scale = draft_weights(params)
        weights += [0.0] * (MAX_CONTEXTS - len(weights))
        self.weights[slot] = to_device(weights, self.weights.device, torch.float32)
        self.scale[slot] = scale

    def draft(self, batch: GuidedBatch, num_drafts: int, sample: Sample) -> bool:
        """Draft tokens for requests, behind the last token of each.

        Args:
            batch: a row for each request: its last token, which no step has computed yet.
            num_drafts: vLLM may ask for none.
            sample: draws tokens from logits, and hands them on.

        Returns:
            Whether there was room for drafts.
        """
        layout = batch.layout
        self.contexts.forget_drafts(layout.slots)
        if not num_drafts:
            return True
        if self._params is None or self._params.layout is not layout:
            self._params, self._row_scale = RowParams(layout, self.slots, 1), self.scale[layout.row_slots]
        params = self._params
        # Behind the last position nothing is verified.
        further = torch.arange(num_drafts, device=layout.row_slots.device).unsqueeze(1)
        positions = (batch.device_positions() + further).clamp(max=self.max_position)
        draft = self.contexts.begin_draft(batch, params, num_drafts)
        if draft is None:
            return False
        for j in range(num_drafts):
            draft.extend(sample(j, self._proposals(draft.hidden_states(), params), positions[j]))
        return True

    def _proposals(self, hidden_states: torch.Tensor, params: RowParams) -> Proposals:
        """What may be drafted, of ``hidden_states`` [context rows, hidden_size]."""
        dtype, slots = hidden_states.dtype, params.layout.row_slots
        if params.head_mix is not None:
            hidden_states = map_heads(hidden_states, params.head_mix)
        hidden_size, head = hidden_states.shape[1], params.contexts.ints.of_head(self.head)
        hidden_states = append_adapters(hidden_states, head.adapters)
        if params.contexts.mixture is not None:
            contexts = params.contexts.mixture.contexts
            mixture = Mixture(contexts, self.weights[slots, : contexts.shape[1]].contiguous())
            hidden_states = mix_contexts(hidden_states, mixture)
        logits = self.compute_logits(hidden_states[:, :hidden_size].to(dtype))
        if head.adapters is not None and head.soft_cap is None and head.all_reduce is None:  # else a draft is refused
            logits = logits + head.scale * (hidden_states[:, hidden_size:] @ head.adapters.b.float().T)
        logits, base_ids = self.contexts.draftable(logits)
        # What an unguided row leaves out is drawn by verification.
        most = self.max_top_k if params.num_unguided else params.rows.max_top_k
        values, ids = logits.topk(min(most, logits.shape[1]))
        return Proposals(values, ids, base_ids, params.rows.top_k, self._row_scale, slots, params.rows.index)
