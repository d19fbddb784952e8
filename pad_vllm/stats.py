"""An engine's numbers, which its worker counts and a frontend shows."""

from __future__ import annotations

from dataclasses import dataclass, fields

LABELS = ("model_name", "engine")
"""As vLLM's own metrics have them."""


@dataclass(slots=True)
class Stats:
    """An engine's guidance: counters since its start, then gauges."""

    guided_requests: float = 0
    guided_tokens: float = 0
    failed_requests: float = 0
    steps: float = 0
    step_seconds: float = 0
    reward_tokens: float = 0
    recomputed_tokens: float = 0
    prefix_hit_tokens: float = 0
    evicted_contexts: float = 0
    contexts: float = 0
    drafted_tokens: float = 0
    steps_without_drafts: float = 0
    plain_prompts: float = 0
    personas_errors: float = 0
    traced_requests: float = 0
    traced_tokens: float = 0
    changed_tokens: float = 0
    divergence_nats: float = 0
    lost_traces: float = 0
    running_requests: float = 0
    running_contexts: float = 0
    kv_cache_usage_perc: float = 0
    personas_version: float = 0


NAMES = tuple(field.name for field in fields(Stats))
GAUGES = ("running_requests", "running_contexts", "kv_cache_usage_perc", "personas_version")
HELP = {
    "guided_requests": "Requests that began to be guided.",
    "guided_tokens": "Rows of logits that were guided: generated tokens, and drafts that were verified.",
    "failed_requests": "Requests that were ended because guidance failed.",
    "steps": "Engine steps with guided rows.",
    "step_seconds": "Host seconds in guidance; on a GPU these are spent giving it work, not waiting for it.",
    "reward_tokens": "Tokens that the reward model computed.",
    "recomputed_tokens": "Of these, tokens computed again for requests that had lost their reward KV blocks.",
    "prefix_hit_tokens": "Prompt tokens found in the reward model's prefix cache.",
    "evicted_contexts": "Contexts whose reward KV blocks were given to others.",
    "contexts": "Contexts that guided requests began: one for each preference, and one for a neutral reference.",
    "drafted_tokens": "Tokens that the reward model drafted, where it is the drafter.",
    "steps_without_drafts": "Steps in which it drafted nothing: its KV cache had no room, or it failed.",
    "plain_prompts": "Guided requests whose prompt begins as a chat and was read as plain text, as it is none that the "
    "chat template writes.",
    "personas_errors": "Versions of the personas' file that were broken, and changed nothing.",
    "traced_requests": "Guided requests whose traces were made, when they were gone.",
    "traced_tokens": "Their guided tokens, of those that they kept.",
    "changed_tokens": "Of these, tokens where guidance changed the first choice.",
    "divergence_nats": "Divergence of the guided from the unguided distribution over the candidates, summed over the "
    "traced tokens, in nats.",
    "lost_traces": "Traces that were lost: too many at once, or they could not be written.",
    "running_requests": "Guided requests in the last step that guided any.",
    "running_contexts": "Contexts of these requests.",
    "kv_cache_usage_perc": "Part of the reward model's KV cache that requests hold, from 0 to 1; on Model Runner V2 "
    "until their slots are reused.",
    "personas_version": "The personas that requests get: the first 48 bits of their SHA-256, so that equal numbers are "
    "equal personas.",
}
