"""Logits processors as other people write them, for both of vLLM's runners: to stand before and behind PAD.

What they do to a request's rows, at every step, is in its ``extra_args``, under the class's name: a list of ``mask``,
tokens to -inf; ``bias``, added to tokens; ``force``, all tokens but one to -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor


def change(row: torch.Tensor, wish: dict[str, Any]) -> torch.Tensor:
    """``row`` [vocab], changed as ``wish`` says."""
    row = row.clone()
    row[wish.get("mask", [])] = float("-inf")
    for token, bias in wish.get("bias", {}).items():
        row[int(token)] += bias
    if "force" in wish:
        kept = row[wish["force"]].clone()
        row.fill_(float("-inf"))
        row[wish["force"]] = kept.clamp(min=-1e30)
    return row


class Foreign(V1LogitsProcessor, V2LogitsProcessor):
    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.wishes: dict[int, dict[str, Any]] = {}  # by row on V1, by slot on V2

    def is_argmax_invariant(self) -> bool:
        return False

    def _wish(self, params: Any, *_: Any) -> dict[str, Any] | None:
        return (params.extra_args or {}).get(type(self).__name__)

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.wishes, batch_update, self._wish)

    def add_request(self, slot: int, params: Any) -> bool:
        self.wishes.pop(slot, None)
        if wish := self._wish(params):
            self.wishes[slot] = wish
        return bool(wish)

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        slots = range(len(logits)) if ctx is None else ctx.expanded_idx_mapping.tolist()
        for row, slot in enumerate(slots):
            if slot in self.wishes:
                logits[row] = change(logits[row], self.wishes[slot])
        return logits


class Before(Foreign):
    pass


class Behind(Foreign):
    pass
