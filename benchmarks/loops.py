"""PAD in plain transformers: what one writes without vLLM."""

from __future__ import annotations

from typing import Any

import torch

BETA = 1.0


def rule(base_logits: torch.Tensor, reward_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The next tokens, greedily; [N, V] twice -> [N, 1]."""
    z, candidates = base_logits.float().topk(top_k)
    r = reward_logits.float().gather(1, candidates)
    guided = z + BETA * (r.log_softmax(-1) - z.log_softmax(-1))
    return candidates.gather(1, guided.argmax(-1, keepdim=True))


@torch.inference_mode()
def cached_loop(base: Any, reward: Any, ids: torch.Tensor, num_tokens: int, top_k: int) -> torch.Tensor:
    """A batch of prompts of one length, both models with a KV cache; [N, P] -> [N, num_tokens]."""
    caches: list[Any] = [None, None]
    fed, out = ids, []
    for _ in range(num_tokens):
        logits = []
        for i, model in enumerate((base, reward)):
            step = model(fed, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = step.past_key_values
            logits.append(step.logits[:, -1])
        fed = rule(logits[0], logits[1], top_k)
        out.append(fed)
    return torch.cat(out, 1)


@torch.inference_mode()
def published_loop(base: Any, reward: Any, ids: torch.Tensor, num_tokens: int, top_k: int) -> torch.Tensor:
    """The algorithm as the authors published it, from its description (arXiv 2410.04070 and the design of the released
    script): at every step both models read the whole context again. [1, P] -> [1, num_tokens]."""
    context = ids
    for _ in range(num_tokens):
        base_logits = base(context, use_cache=False).logits[:, -1]
        reward_logits = reward(context, use_cache=False).logits[:, -1]
        context = torch.cat([context, rule(base_logits, reward_logits, top_k)], 1)
    return context[:, ids.shape[1] :]
