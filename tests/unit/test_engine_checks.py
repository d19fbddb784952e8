"""Engines that guidance refuses by their configuration alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pad_vllm.worker.engine_checks import check_engine
from tests.support.engine import PLUGIN


def engine_config(**changes) -> SimpleNamespace:
    """What ``check_engine`` reads of a VllmConfig, for engines that need what is not here: torchvision, a GPU."""
    sections = {
        "model_config": {
            "is_multimodal_model": False,
            "supports_multimodal_inputs": False,
            "is_diffusion": False,
            "enable_prompt_embeds": False,
            "enable_sleep_mode": False,
            "logits_processors": PLUGIN,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "data_parallel_size": 1,
            "is_moe_model": False,
            "enable_batch_sharded_sampling": False,
        },
        "scheduler_config": {"async_scheduling": True},
    }
    for values in sections.values():
        values |= {name: changes.pop(name) for name in list(changes) if name in values}
    assert not changes
    return SimpleNamespace(speculative_config=None, **{name: SimpleNamespace(**v) for name, v in sections.items()})


@pytest.mark.parametrize(
    ("changes", "on_v2", "fragment"),
    [
        ({"is_multimodal_model": True, "supports_multimodal_inputs": True}, True, "add --language-model-only"),
        ({"is_diffusion": True}, True, "diffusion model"),
        ({"prefill_context_parallel_size": 2}, True, "context parallelism"),
        ({"decode_context_parallel_size": 2}, True, "context parallelism"),
        ({"data_parallel_size": 2, "is_moe_model": True}, True, "mixture of experts"),
        ({"enable_batch_sharded_sampling": True}, True, "enable_batch_sharded_sampling"),
        ({"enable_sleep_mode": True}, True, "enable_sleep_mode"),
        ({"logits_processors": None}, False, "--logits-processors pad_vllm:PADLogitsProcessor"),
    ],
)
def test_refused_by_configuration(changes, on_v2, fragment):
    check_engine(engine_config(), on_v2)
    with pytest.raises(ValueError, match=fragment):
        check_engine(engine_config(**changes), on_v2)


@pytest.mark.parametrize(
    "changes", [{"is_multimodal_model": True}, {"data_parallel_size": 2}, {"is_moe_model": True}], ids=str
)
def test_not_refused_by_configuration(changes):
    check_engine(engine_config(**changes), on_v2=True)


def test_a_frontend_without_plugins_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match=r"VLLM_USE_RUST_FRONTEND=1: that frontend runs no Python plugins.*; unset it"):
        check_engine(engine_config(), False)
