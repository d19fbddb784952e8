"""The rule for the rows of a step whose hidden states are there: candidates, rewards, the logits rewritten."""

from __future__ import annotations

import torch

from pad_vllm.kernels import Controls, Trace, implementation, load_guide
from pad_vllm.worker.device_tables import device_vocabulary, foreign_candidates
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.slots import RowParams


class Rule:
    """PAD on tensors, for one reward model.

    Args:
        loaded: the reward model.
    """

    def __init__(self, loaded: Loaded) -> None:
        tokens, vocab_size, device = loaded.fit.tokens, loaded.fit.vocab_size, loaded.device
        self.head, self.vocabulary = loaded.head, device_vocabulary(tokens, vocab_size, device)
        self.foreign_ids = foreign_candidates(tokens, vocab_size, loaded.vocab_size, device)
        self.kernels = implementation(device)
        self.guide_ = load_guide(self.kernels)

    def apply(
        self,
        logits: torch.Tensor,
        hidden_states: torch.Tensor,
        params: RowParams,
        controls: Controls | None = None,
        key_offsets: torch.Tensor | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Guide rows, in place.

        Args:
            logits: [N, V].
            hidden_states: [context rows, hidden_size], of the reward model.
            params: which rows of ``logits``, and what they ask for.
            controls: what their requests did to the logits; None: nothing.
            key_offsets: [R] int64, of :meth:`Contexts.key_offsets`.
            trace: gets what guidance did in the rows; None: nobody asks.
        """
        rows = params.rows
        if key_offsets is not None:
            rows = rows._replace(key_offsets=key_offsets)
        if self.foreign_ids is not None:
            places = rows.index.unsqueeze(1), self.foreign_ids
            logits[places] = logits[places].masked_fill(rows.top_k.unsqueeze(1) > 0, float("-inf"))
        self.guide_(
            logits,
            hidden_states,
            params.contexts.ints.of_head(self.head),
            rows,
            self.vocabulary,
            controls=controls,
            mixture=params.contexts.mixture,
            head_mix=params.head_mix,
            trace=trace,
        )
