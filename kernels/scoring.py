"""What the reward model says of tokens, in PyTorch: hidden states, mixed, times rows of its output head."""

from __future__ import annotations

import torch

from .types import HeadAdapters, HeadMix, Mixture, OutputHead


def map_heads(hidden_states: torch.Tensor, head_mix: HeadMix) -> torch.Tensor:
    """Mix value heads; hidden_states [C, d], any float dtype -> [C, d] float32."""
    weight, bias, head_weights = head_mix
    h = hidden_states.float()
    mapped = (torch.einsum("hij,rj->rhi", weight, h) if weight.dim() == 3 else h.unsqueeze(1) * weight) + bias
    return head_weights[:, :1] * h + torch.einsum("rh,rhi->ri", head_weights[:, 1:], mapped)


def append_adapters(hidden_states: torch.Tensor, adapters: HeadAdapters | None) -> torch.Tensor:
    """[C, d], any float dtype -> [C, d + Q] float32: behind each hidden state a_q . h, of its own adapter's q, and 0 of
    the others'. The head has the columns b for it, so the product is linear, and contexts are mixed as ever."""
    if adapters is None:
        return hidden_states
    h = hidden_states.float()
    is_mine = adapters.owner == adapters.numbers.unsqueeze(1)
    return torch.cat([h, (h @ adapters.a.T).where(is_mine, 0.0)], 1)


def head_rows(head: OutputHead, local: torch.Tensor) -> torch.Tensor:
    """[...] int64, rows of this shard -> [..., d] float32; [..., d + Q] where the head has adapters."""
    weight = head.weight[local].float()
    return weight if head.adapters is None else torch.cat([weight, head.adapters.b[local].float()], -1)


def mix_contexts(hidden_states: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """sum_j weights_j h_j; [C, d], any float dtype -> [R, d] float32."""
    return torch.bmm(mixture.weights.unsqueeze(1), hidden_states[mixture.contexts].float()).squeeze(1)


def score_candidates(
    hidden_states: torch.Tensor, head: OutputHead, ids: torch.Tensor, bias_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The reward model's logits of the candidates, before soft cap and scale.

    Args:
        hidden_states: [R, d], mapped by the value heads where there are any; [R, d + Q] of :func:`append_adapters`.
        head: where it is one of several shards, a candidate outside it scores 0: the sum over the shards of a
            tensor-parallel group is the score.
        ids: [R, K] int64.
        bias_weight: [R, 1] float32, how many times a row's hidden state has the bias: where it is a mixture.

    Returns:
        [R, K] float32.
    """
    local = ids - head.vocab_start if head.vocab_start else ids
    is_sharded = head.all_reduce is not None
    mine = (local >= 0) & (local < head.weight.shape[0]) if is_sharded else None
    if is_sharded:
        local = local.where(mine, 0)
    scores = torch.bmm(head_rows(head, local), hidden_states.float().unsqueeze(-1)).squeeze(-1)
    if head.bias is not None:
        scores = scores + head.bias[local].float() * (1.0 if bias_weight is None else bias_weight)
    return scores.where(mine, 0.0) if is_sharded else scores


def cap_and_scale(scores: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """What some architectures do to their logits, elementwise; after the scores of all shards are summed."""
    if head.soft_cap is not None:
        scores = torch.tanh(scores / head.soft_cap) * head.soft_cap
    return scores * head.scale
