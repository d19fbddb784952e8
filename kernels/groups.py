"""Rewards of groups of tokens, in PyTorch: for a reward model with another tokenizer.

A base token c belongs to the group key(c), a token of the reward model, whose members are those with which the reward
model may begin to write what the base's tokens of the group say. With G the distinct groups of the candidates C,

    r_g = logsumexp of r over members(g),  y_g = logsumexp of y_c over the c in C with key(c) = g
    reward_g = log_softmax_G(r)_g - reference * log_softmax_G(y)_g
    z'_c     = z_c + beta * reward_key(c)    for c in C,    -inf elsewhere

Where every group is one token this is the rule of :mod:`.reference`, whose shapes and names these are; M members.
r_g is not linear in the hidden state: of several contexts each has its own, and these are mixed. It is computed from
rows of lm_head for the members of the candidates' groups alone.
"""

from __future__ import annotations

import torch

from .scoring import cap_and_scale, head_rows
from .selection import MAX_LOGIT, NEG_INF, Candidates
from .types import NO_OPINION, Groups, Mixture, OutputHead, Rows

MEMBERS_AT_ONCE = 16384
"""Members whose rows of lm_head are gathered together."""
LARGE_GROUP = 256
"""Members of a group whose rows are gathered once for all contexts that have it, and multiplied with all of these."""
FEW_CONTEXTS = 16
"""Contexts of which all groups are scored together."""


def reward_groups(
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    groups: Groups,
    candidates: Candidates,
    y: torch.Tensor,
    mixture: Mixture | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reward of each candidate, by its group; arguments and results as of :func:`.reference.reward_tokens`."""
    ids, z = candidates.ids, candidates.z
    places = ids if rows.key_offsets is None else ids + rows.key_offsets.unsqueeze(1)
    keys = groups.key[places].long().masked_fill(z == NEG_INF, -1)
    scored = keys
    if mixture is not None:
        hidden_states = hidden_states[mixture.contexts.flatten()]
        scored = keys.repeat_interleave(mixture.contexts.shape[1], 0)
    scores = score_groups(hidden_states, head, scored, groups, candidates.is_readable)
    if head.all_reduce is not None:
        scores = gather_shards(scores, head).logsumexp(0)
    if mixture is not None:
        scores = scores.unflatten(0, mixture.contexts.shape)
        weights = mixture.weights.unsqueeze(-1)
        scores = torch.where(weights == 0, 0.0, weights * scores).sum(1)
    has_opinion = keys != NO_OPINION if groups.any_silent else None
    return normalize(keys, y, scores, rows.reference), has_opinion


def gather_shards(partial: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """What each rank of a tensor-parallel group has of a sum of exponentials: [...] -> [ranks, ...]."""
    rank, num_ranks = head.shard
    whole = partial.new_zeros(num_ranks, *partial.shape)
    whole[rank] = partial
    return whole if head.all_reduce is None else head.all_reduce(whole)


def score_groups(
    hidden_states: torch.Tensor, head: OutputHead, keys: torch.Tensor, groups: Groups, is_readable: bool
) -> torch.Tensor:
    """The logsumexp of the reward model's logits over the members of each group.

    Args:
        hidden_states: [C, d], mapped by the value heads where there are any.
        head: where it is one of several shards, members in another do not count.
        keys: [C, K] int64, groups; below 0: none.

    Returns:
        [C, K] float32; -inf where there is no group, or no member in this shard.
    """
    if not is_readable:  # which groups there are is not known
        return score_by_whole_head(hidden_states, head, keys, groups)
    # What several candidates of a context have in common is computed once.
    context = torch.arange(len(keys)).unsqueeze(1)
    num_groups = len(groups.starts) - 1
    flat = (context * num_groups + keys).masked_fill(keys < 0, -1)
    pairs, place = flat.unique(return_inverse=True)
    context, group = pairs.div(num_groups, rounding_mode="floor"), pairs % num_groups
    begin = groups.starts[group].long()
    counts = (groups.starts[group + 1].long() - begin).where(pairs >= 0, 0)
    few = counts.where(counts <= LARGE_GROUP, 0)
    owner = torch.arange(len(pairs)).repeat_interleave(few)
    within = torch.arange(len(owner)) - (few.cumsum(0) - few)[owner]
    members = groups.members[begin[owner] + within]
    r = [
        logits_of(head, (rows_of(head, part) * hidden_states[context[whose]].float()).sum(-1), part)
        for whose, part in zip(owner.split(MEMBERS_AT_ONCE), members.split(MEMBERS_AT_ONCE), strict=True)
    ]
    scores = logsumexp_by(torch.cat(r), owner, len(pairs))
    is_large = counts > LARGE_GROUP
    for g in group[is_large].unique().tolist():
        its = (is_large & (group == g)).nonzero().flatten()
        hidden = hidden_states[context[its]].float()
        members = groups.members[groups.starts[g] : groups.starts[g + 1]]
        parts = [logits_of(head, hidden @ rows_of(head, part).T, part) for part in members.split(MEMBERS_AT_ONCE)]
        scores[its] = torch.cat(parts, 1).logsumexp(-1)
    return scores[place]


def score_by_whole_head(
    hidden_states: torch.Tensor, head: OutputHead, keys: torch.Tensor, groups: Groups
) -> torch.Tensor:
    """:func:`score_groups` where nothing may be read back: the logits of all tokens, and of all groups."""
    members, num_groups = groups.members.long(), len(groups.starts) - 1
    sizes = (groups.starts[1:] - groups.starts[:-1]).long()
    owner = torch.repeat_interleave(torch.arange(num_groups, device=keys.device), sizes, output_size=len(members))
    scores = []
    for hidden in hidden_states.float().split(FEW_CONTEXTS):
        r = torch.cat(
            [logits_of(head, hidden @ rows_of(head, part).T, part) for part in members.split(MEMBERS_AT_ONCE)], 1
        )
        whose = owner.expand(len(hidden), -1)
        most = r.new_full((len(hidden), num_groups), -MAX_LOGIT).scatter_reduce_(1, whose, r, "amax")
        sums = torch.zeros_like(most).scatter_add_(1, whose, (r - most.gather(1, whose)).exp())
        scores.append(most + sums.log())
    return torch.cat(scores).gather(1, keys.clamp(min=0)).masked_fill(keys < 0, NEG_INF)


def _local(head: OutputHead, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this shard, any for a token of another; and which tokens are this one's."""
    local = tokens.long() - head.vocab_start
    mine = (local >= 0) & (local < len(head.weight))
    return local.where(mine, 0), mine


def rows_of(head: OutputHead, tokens: torch.Tensor) -> torch.Tensor:
    """[tokens, d] float32, [tokens, d + Q] where the head has adapters; those in another shard are any."""
    return head_rows(head, _local(head, tokens)[0])


def logits_of(head: OutputHead, products: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of what the tokens' rows times hidden states are, [..., tokens]; -inf in another shard."""
    local, mine = _local(head, tokens)
    if head.bias is not None:
        products = products + head.bias[local].float()
    r = cap_and_scale(products, head)
    return r if head.all_reduce is None else r.where(mine, NEG_INF)


def logsumexp_by(values: torch.Tensor, owner: torch.Tensor, size: int) -> torch.Tensor:
    """[n] float32 values, each of one owner [n] int64 below ``size`` -> [size]; -inf of those that have none."""
    most = torch.full((size,), -MAX_LOGIT).scatter_reduce_(0, owner, values, "amax")
    return most + torch.zeros(size).scatter_add_(0, owner, (values - most[owner]).exp()).log()


def normalize(keys: torch.Tensor, y: torch.Tensor, scores: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The reward of each candidate's group.

    Args:
        keys: [R, K] int64, candidates' groups; below 0 where there is none.
        y: [R, K] float32, candidates' logits; those without a group do not count.
        scores: [R, K] float32, the reward model's logits of the groups.
        reference: [R] float32.

    Returns:
        [R, K] float32.
    """
    place = torch.arange(keys.shape[1], device=keys.device)
    ordered, order = keys.sort(stable=True, dim=-1)
    leader = order.gather(1, torch.searchsorted(ordered, keys.contiguous()))
    """the group's first candidate"""
    y = y.masked_fill(keys < 0, NEG_INF)
    most = torch.full_like(y, NEG_INF).scatter_reduce_(1, leader, y, "amax").clamp(min=-torch.finfo(y.dtype).max)
    sums = torch.zeros_like(y).scatter_add_(1, leader, (y - most.gather(1, leader)).exp())
    y_group = (most + sums.log()).gather(1, leader)
    r = scores.masked_fill(keys < 0, NEG_INF)
    log_r = r - r.masked_fill(leader != place, NEG_INF).logsumexp(-1, keepdim=True)
    return log_r - reference.unsqueeze(1) * (y_group - y.logsumexp(-1, keepdim=True))
