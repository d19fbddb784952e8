"""How strongly a row is guided where its divergence has a bound.

With q_b = softmax(z + b * reward) over the candidates and p = softmax(z), guidance of strength b moves the row's
distribution by

    D(b) = KL(q_b || p) = b A'(b) - A(b),    A(b) = logsumexp(z + b * reward) - logsumexp(z)

A' and A'' are the mean and the variance of the reward under q_b. So D'(b) = b A''(b) = b Var(reward): D is 0 at 0, and
grows with |b|, whatever the sign. The largest strength up to beta that keeps to the bound is found by bisection, among
the multiples of beta / 2^NUM_HALVINGS. Where the base model is sure, or reward and base disagree by much, it is small;
where the base is free it is beta. Of a bound of 0 it is 0: the base model, on its candidates.

Candidates without an opinion keep their probability (:func:`.reference.keep_shares`), and the others theirs together,
s. So the divergence over all candidates, which is what is bounded, is s times that over those with an opinion.
"""

from __future__ import annotations

import torch

from .selection import NEG_INF

NUM_HALVINGS = 16
"""Steps of the bisection, of all implementations."""


def bound_beta(
    z: torch.Tensor,
    reward: torch.Tensor,
    beta: torch.Tensor,
    max_divergence: torch.Tensor,
    has_opinion: torch.Tensor | None = None,
) -> torch.Tensor:
    """The strength of each row.

    Args:
        z: [R, K] float32, the candidates' logits; -inf behind a row's own.
        reward: [R, K] float32; anything where there is no candidate, or no opinion.
        beta: [R] float32, the most of it.
        max_divergence: [R] float32, nats; inf: the row's is beta.
        has_opinion: [R, K] bool, of which candidates the reward model has one; None: of all.

    Returns:
        [R] float32, between 0 and beta.
    """
    there = z > NEG_INF
    speaks = there if has_opinion is None else there & has_opinion
    own = z.where(speaks, NEG_INF)
    log_sum = own.logsumexp(-1, keepdim=True)
    log_p = own - log_sum
    most = max_divergence / (log_sum - z.where(there, NEG_INF).logsumexp(-1, keepdim=True)).exp().squeeze(1)

    def keeps_to_it(b: torch.Tensor) -> torch.Tensor:
        log_q = (z + b.unsqueeze(1) * reward).where(speaks, NEG_INF).log_softmax(-1)
        divergence = torch.where(log_q == NEG_INF, 0.0, log_q.exp() * (log_q - log_p)).sum(-1)
        return (divergence < most) & (max_divergence > 0)  # false for NaN

    bounded, step = torch.zeros_like(beta), beta
    for _ in range(NUM_HALVINGS):
        step = step * 0.5
        bounded = torch.where(keeps_to_it(bounded + step), bounded + step, bounded)
    return torch.where((max_divergence == float("inf")) | keeps_to_it(beta), beta, bounded)
