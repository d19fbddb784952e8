"""The rule for the rows of a step whose hidden states are there: candidates, rewards, the logits rewritten."""

from __future__ import annotations

import torch

from pad_vllm import kernels
from pad_vllm.kernels import Controls
from pad_vllm.worker.device_tables import candidate_tables, device_groups
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.slots import RowParams


class Rule:
    """PAD on tensors, for one reward model.

    Args:
        loaded: the reward model.
    """

    def __init__(self, loaded: Loaded) -> None:
        fits, device = loaded.fit, loaded.device
        self.head, self.heads, self.vocab_size = loaded.head, loaded.heads, fits.vocab_size
        self.foreign_ids, self.no_opinion = candidate_tables(fits.tokens, fits.vocab_size, loaded.vocab_size, device)
        self.kernels = kernels.implementation(device)
        self.pair = fits.tokens.pair
        self.guide_ = kernels.load_guide(self.kernels, self.pair and device_groups(self.pair.tables, device))

    def apply(
        self,
        logits: torch.Tensor,
        hidden_states: torch.Tensor,
        params: RowParams,
        controls: Controls | None = None,
        key_offsets: torch.Tensor | None = None,
    ) -> None:
        """Guide rows, in place.

        Args:
            logits: [N, V].
            hidden_states: [context rows, hidden_size], of the reward model.
            params: which rows of ``logits``, and what they ask for.
            controls: what their requests did to the logits; None: nothing.
            key_offsets: [R] int64, of :meth:`Contexts.key_offsets`.
        """
        head, rows = self.head, params.layout.rows
        if self.foreign_ids is not None:
            places = rows.unsqueeze(1), self.foreign_ids
            logits[places] = logits[places].masked_fill(params.ints.top_k.unsqueeze(1) > 0, float("-inf"))
        self.guide_(
            logits,
            hidden_states,
            head.weight,
            rows=rows,
            top_k=params.ints.top_k,
            beta=params.beta,
            reference=params.reference,
            end_ids=params.ints.end_id,
            controls=controls,
            mixture=params.contexts.mixture,
            max_top_k=params.max_top_k,
            vocab_size=self.vocab_size,
            bias=head.bias,
            heads=(self.heads.weight, self.heads.bias, params.head_weights) if params.mix_heads else None,
            soft_cap=head.soft_cap,
            scale=head.scale,
            vocab_start=head.vocab_start,
            all_reduce=head.all_reduce,
            **(
                {"no_opinion": self.no_opinion}
                if self.pair is None
                else {"shard": head.shard, "key_offsets": key_offsets}
            ),
        )
