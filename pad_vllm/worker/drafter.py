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

import torch

from pad_vllm.kernels import Mixture, map_heads, mix_contexts
from pad_vllm.params import MAX_CONTEXTS, NEUTRAL, GuidanceParams
from pad_vllm.reward.device import to_device
from pad_vllm.worker.batch import GuidedBatch, RequestSlot
from pad_vllm.worker.contexts import Contexts
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.slots import RowParams, Slots

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
        self.compute_logits = loaded.model.model.compute_logits
        self.max_top_k, self.max_position = loaded.fit.config.max_top_k, max_model_len - 1
        self.weights = torch.zeros(slots.no_slot + 1, MAX_CONTEXTS, device=loaded.device)
        """[slots, MAX_CONTEXTS]: :func:`draft_weights`"""
        self.scale = torch.ones(slots.no_slot + 1, 1, device=loaded.device)
        self._params: RowParams | None = None

    @torch.inference_mode()
    def warm_up(self, hidden_states: torch.Tensor) -> None:
        """Take the most memory that a draft does, while vLLM still counts; ``hidden_states`` [1, hidden_size]."""
        logits = self.compute_logits(hidden_states.expand(self.slots.no_slot, -1))
        (logits * 1.0).topk(min(self.max_top_k, logits.shape[1]))

    def begin(self, slot: RequestSlot, params: GuidanceParams) -> None:
        """A request begins in a slot."""
        weights, scale = draft_weights(params)
        weights += [0.0] * (MAX_CONTEXTS - len(weights))
        self.weights[slot] = to_device(weights, self.weights.device, torch.float32)
        self.scale[slot] = scale

    def draft(self, batch: GuidedBatch, num_drafts: int, sample: Sample) -> torch.Tensor | None:
        """Draft tokens for requests, behind the last token of each.

        Args:
            batch: a row for each request: its last token, which no step has computed yet.
            num_drafts: vLLM may ask for none.
            sample: draws tokens from logits.

        Returns:
            [R, num_drafts] int64; None where there is no room for drafts.
        """
        layout = batch.layout
        self.contexts.forget_drafts(layout.slots)
        if not num_drafts:
            return layout.row_slots.new_empty(len(layout.slots), 0)
        if self._params is None or self._params.layout is not layout:
            self._params = RowParams(layout, self.slots, 1)
        params, positions = self._params, batch.device_positions()
        draft = self.contexts.begin_draft(batch, params, num_drafts)
        if draft is None:
            return None
        drafts: list[torch.Tensor] = []
        for j in range(num_drafts):
            logits, ids = self._candidates(draft.hidden_states(), params)
            drafts.append(sample(j, logits, ids, layout.row_slots, positions))
            positions = (positions + 1).clamp(max=self.max_position)  # behind it, nothing is verified
            draft.extend(drafts[-1], positions)
        return torch.stack(drafts, 1)

    def _candidates(self, hidden_states: torch.Tensor, params: RowParams) -> tuple[torch.Tensor, torch.Tensor]:
        """What may be drafted, of ``hidden_states`` [context rows, hidden_size].

        Returns:
            logits [R, K] in descending order, -inf beyond a row's own k; token ids [R, K] int64.
        """
        dtype, slots = hidden_states.dtype, params.layout.row_slots
        if params.head_mix is not None:
            hidden_states = map_heads(hidden_states, params.head_mix)
        if params.contexts.mixture is not None:
            contexts = params.contexts.mixture.contexts
            mixture = Mixture(contexts, self.weights[slots, : contexts.shape[1]].contiguous())
            hidden_states = mix_contexts(hidden_states, mixture)
        logits, base_ids = self.contexts.draftable(self.compute_logits(hidden_states.to(dtype)))
        # What an unguided row leaves out is drawn by verification.
        most = self.max_top_k if params.num_unguided else params.rows.max_top_k
        values, ids = logits.topk(min(most, logits.shape[1]))
        if params.min_top_k < most:
            place = torch.arange(values.shape[1], device=values.device)
            top_k = params.rows.top_k.unsqueeze(1)
            values = values.masked_fill((place >= top_k) & (top_k > 0), float("-inf"))
        if base_ids is not None:
            ids = base_ids[ids]
        return values * self.scale[slots].to(values.dtype), ids
