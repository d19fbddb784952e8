"""The PAD training objective (arXiv 2410.04070, section 3).

The personalized reward of a token is the log-ratio of the personalized model to a reference,
``log pi_theta(a | s, p) - log pi_ref(a | s)``, and the reward of an answer its sum over tokens. The model is fitted to
preference pairs by the Bradley-Terry likelihood of these sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``tokens``.

    Args:
        logits: (num_tokens, vocab_size), the logits each token was predicted from.
        tokens: (num_tokens,) int64.

    Returns:
        (num_tokens,) float32.
    """
    return -F.cross_entropy(logits.float(), tokens, reduction="none")


def sequence_sums(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sums of per-token ``values`` (num_tokens,) over the sequence each belongs to, ``rows`` (num_tokens,) int64.

    Returns:
        (num_rows,), in the dtype of ``values``.
    """
    return values.new_zeros(num_rows).index_add(0, rows, values)


def pad_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    opposites: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PAD loss on answer log-probabilities.

        margin = beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]
        loss   = -log sigmoid(margin), averaged over the pairs

    Where two users chose oppositely of the same two answers, the sum of their margins does not depend on the reference,
    nor on what makes an answer likely under any preference: what is left is what the preference changes.

    Args:
        chosen, rejected: (num_pairs,) log pi_theta of the answers, summed over tokens, preference in the context.
        ref_chosen, ref_rejected: (num_pairs,) log pi_ref of the same answers, without the preference.
        beta: scale of the reward in the Bradley-Terry model.
        opposites: pairs 2 i and 2 i + 1 are such two users; the loss is of the sum of their margins.

    Returns:
        The loss (scalar) and the margins that it judges, whose sign says which answer the model prefers: (num_pairs,),
        or the sums (num_pairs / 2,).
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if opposites:
        margin = margin.view(-1, 2).sum(1)
    return -F.logsigmoid(margin).mean(), margin
