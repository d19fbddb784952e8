"""The plugin that one writes first: a transformers reward model with a KV cache for each request, a row at a time.

What pad-vllm is measured against. V1 runner; needs the token history, so no async scheduling.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from .loops import BETA


class NaiveProcessor(AdapterLogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        path = vllm_config.additional_config["naive"]["reward_model"]
        dtype = vllm_config.model_config.dtype
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        self.device = device

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        if not params.extra_args:
            return None
        top_k, cache = params.extra_args["naive_top_k"], None

        @torch.inference_mode()
        def guide(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal cache
            fed = output_ids[-1:] if cache is not None else prompt_ids + output_ids
            step = self.model(
                torch.tensor([fed], device=self.device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = step.past_key_values
            z, candidates = logits.topk(top_k)
            r = step.logits[0, -1].float()[candidates]
            guided = z + BETA * (r.log_softmax(-1) - z.log_softmax(-1))
            return torch.full_like(logits, float("-inf")).scatter(0, candidates, guided)

        return guide
