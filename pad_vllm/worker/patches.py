"""What is changed in vLLM where the draft model of ``speculative_config`` is the reward model.

Model Runner V2 makes its drafter of the reward engine (:mod:`.adapters.speculator`), and does not refuse a draft model
with another tokenizer, whose drafts vLLM's own speculator could not read. Nothing else is touched, and with any other
draft model vLLM does what it always does.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

MODULES = ("vllm.v1.worker.gpu.spec_decode", "vllm.v1.worker.gpu.model_runner")
"""Where ``init_speculator`` stands, and where the runner has it by its own name once it is imported."""


NO_TRANSLATION = "heterogeneous-vocabulary draft models"
"""What vLLM says of ``use_heterogeneous_vocab`` on Model Runner V2."""


def install() -> None:
    """Put our choices before vLLM's; as often as one likes."""
    _choose_speculator()
    _allow_another_tokenizer()


def _allow_another_tokenizer() -> None:
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "_get_v2_model_runner_unsupported_features", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def unsupported(self: VllmConfig) -> list[str]:
        return [what for what in original(self) if what != NO_TRANSLATION or not reward_model_drafts(self)]

    VllmConfig._get_v2_model_runner_unsupported_features = unsupported


def _choose_speculator() -> None:
    try:
        from vllm.v1.worker.gpu.spec_decode import init_speculator as original
    except ImportError:
        return  # then vLLM's own speculator drafts; `pad-vllm check` says that this has moved
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        if not reward_model_drafts(vllm_config):
            return original(vllm_config, device, req_states)
        from pad_vllm.worker.adapters.speculator import RewardSpeculator

        return RewardSpeculator(vllm_config, device)

    for name in MODULES:
        if name in sys.modules:
            setattr(sys.modules[name], "init_speculator", init_speculator)  # noqa: B010


def reward_model_drafts(vllm_config: VllmConfig) -> bool:
    """Whether an engine's draft model is the reward model that guides it."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return False
    pad = (vllm_config.additional_config or {}).get("pad")
    drafts, guides = speculative.model, pad.get("reward_model") if isinstance(pad, dict) else None
    if not isinstance(drafts, str) or not isinstance(guides, str):
        return False  # what is wrong with the configuration is said at the start
    return drafts == guides or (os.path.isdir(guides) and os.path.realpath(drafts) == os.path.realpath(guides))
