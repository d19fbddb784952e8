"""Stage 2: train one linear map per preference dimension over a frozen backbone (the paper's R = w_p . phi).

A head is a direction: with weight a, ``a (W h + b)`` is added to the hidden state that lm_head reads. So a user wants
more of a dimension (a > 0), less of it (a < 0), or does not care (0). The backbone's own hidden state is exported as a
head too: the identity, whose weight is 1 for everybody.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pad_vllm.reward.heads import BACKBONE_HEAD, ValueHeads
from pad_vllm.training.data import PairExample


class HeadedModel(nn.Module):
    """A frozen backbone whose hidden state is moved by heads before lm_head.

    Attributes:
        weight: (num_heads, hidden_size, hidden_size) float32, zero at first.
        bias: (num_heads, hidden_size) float32, zero at first.
    """

    backbone: PreTrainedModel

    def __init__(self, backbone: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        # Not registered: its weights are in no checkpoint.
        object.__setattr__(self, "backbone", backbone.requires_grad_(False).eval())
        self.names = tuple(names)
        hidden_size = backbone.get_output_embeddings().weight.shape[1]
        self.weight = nn.Parameter(torch.zeros(len(names), hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(len(names), hidden_size))
        self.to(backbone.device)

    @classmethod
    def of(cls, backbone: PreTrainedModel, heads: ValueHeads) -> HeadedModel:
        """With the heads of a file: what each adds to the backbone's own hidden state at weight 1."""
        model = cls(backbone, heads.names)
        weight = torch.diag_embed(heads.weight) if heads.weight.dim() == 2 else heads.weight.clone()
        if BACKBONE_HEAD in heads.names:
            weight[heads.names.index(BACKBONE_HEAD)] = 0
        else:
            weight -= torch.eye(weight.shape[-1])  # each is a map of its own, not a direction
        with torch.no_grad():
            model.weight.copy_(weight)
            model.bias.copy_(heads.bias)
        return model

    def forward(self, input_ids: torch.Tensor, weights: torch.Tensor, **inputs: Any) -> Any:
        """The backbone's output with ``weights`` (batch_size, num_heads) float32 applied to each row."""

        def move(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (hidden,) = args
            matrix = torch.einsum("bn,nij->bij", weights, self.weight)
            moved = hidden.float() @ matrix.mT + (weights @ self.bias)[:, None]
            return ((hidden + moved).to(hidden.dtype),)

        # Before lm_head, so that whatever the architecture does to its logits comes after.
        handle = self.backbone.get_output_embeddings().register_forward_pre_hook(move)
        try:
            return self.backbone(input_ids=input_ids, **inputs)
        finally:
            handle.remove()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HeadedModel:
        self.backbone._apply(fn, recurse)  # moves with the heads
        return super()._apply(fn, recurse)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a heads file holds, by the plugin's names: the identity, then a weight and a bias per dimension."""
        hidden_size = self.bias.shape[1]
        tensors = {f"{BACKBONE_HEAD}.weight": torch.eye(hidden_size), f"{BACKBONE_HEAD}.bias": torch.zeros(hidden_size)}
        for name, weight, bias in zip(self.names, self.weight.detach(), self.bias.detach(), strict=True):
            tensors |= {f"{name}.weight": weight.cpu().contiguous(), f"{name}.bias": bias.cpu().contiguous()}
        return tensors


def users_of(pairs: Sequence[PairExample], names: Sequence[str], seed: int) -> tuple[list[PairExample], torch.Tensor]:
    """For each labelled pair a user to whom a random part of its labels matters, and the pair as this user sees it.

    The user's weights are 1 or -1 in these dimensions and 0 elsewhere, and the chosen answer is the one with more of
    what the user wants. Preferences in words stay out: the weights alone say what is wanted.

    Returns:
        pairs, and their users' weights (num_pairs, num_heads) float32. Pairs without labels are left out.
    """
    rng = random.Random(seed)
    seen, users = [], []
    for pair in pairs:
        labels = {name: label for name, label in pair.labels.items() if name in names}
        if not labels:
            continue
        cares = rng.sample(sorted(labels), rng.randint(1, len(labels)))
        wants = {name: rng.choice((-1.0, 1.0)) for name in cares}
        score = sum(want * labels[name] for name, want in wants.items())
        if score == 0:
            wants = {cares[0]: wants[cares[0]]}
            score = wants[cares[0]] * labels[cares[0]]
        answers, theirs = (pair.chosen, pair.rejected), pair.reference
        if score <= 0:
            answers = answers[::-1]
            theirs = theirs and (theirs[0], *theirs[:0:-1])
        seen.append(PairExample(pair.ref_prompt, pair.ref_prompt, *answers, wants, theirs))
        users.append([wants.get(name, 0.0) for name in names])
    return seen, torch.tensor(users).view(-1, len(names))


def head_weights(names: Sequence[str], wants: Mapping[str, float]) -> list[float]:
    """``pad_weights`` of a user who ``wants`` this much of some dimensions: one per head, in the order of ``names``."""
    return [1.0 if name == BACKBONE_HEAD else float(wants.get(name, 0.0)) for name in names]
