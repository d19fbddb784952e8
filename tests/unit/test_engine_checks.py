"""Engines that guidance refuses by their configuration alone."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from vllm import device_allocator
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.platforms import current_platform

from pad_vllm.worker import sleep
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


class Allocator:
    """vLLM's allocator, as far as it can be followed without a GPU: which tags a sleep is told to keep."""

    def __init__(self, tag: str = sleep.KEPT_TAG) -> None:
        self.kept: tuple[str, ...] = ()
        self.tag = tag
        self.pointer_to_data: dict[int, SimpleNamespace] = {}

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        self.kept = offload_tags

    @contextlib.contextmanager
    def use_memory_pool(self, tag: str):
        assert tag == sleep.KEPT_TAG
        yield

    def holds(self, tensor: torch.Tensor) -> torch.Tensor:
        handle = (0, tensor.nbytes, 0, 0)
        self.pointer_to_data[tensor.data_ptr()] = SimpleNamespace(handle=handle, tag=self.tag)
        return tensor


@pytest.mark.parametrize("level", [1, 2])
def test_vllm_keeps_what_has_the_reward_models_tag(level, monkeypatch):
    """At every level, and no waking leaves it asleep."""
    allocator = Allocator()
    monkeypatch.setattr(device_allocator, "get_mem_allocator_instance", lambda: allocator)
    CuMemBackend().suspend(level)
    assert sleep.KEPT_TAG in allocator.kept
    assert sleep.KEPT_TAG not in device_allocator.DEFERRABLE_TAGS


@pytest.mark.parametrize(("tag", "is_kept"), [(sleep.KEPT_TAG, True), ("weights", False)])
def test_a_reward_model_that_a_sleep_would_discard_is_refused(tag, is_kept, monkeypatch):
    """Wherever its memory came from."""
    allocator = Allocator(tag)
    monkeypatch.setattr(sleep, "get_mem_allocator_instance", lambda: allocator)
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    config = SimpleNamespace(model_config=SimpleNamespace(enable_cumem_allocator=True))
    model = torch.nn.Linear(4, 4)
    loaded = SimpleNamespace(own_parameters=model.parameters)
    outside = SimpleNamespace(loaded=loaded, model=SimpleNamespace(kv_caches={}))
    inside = SimpleNamespace(loaded=loaded, model=SimpleNamespace(kv_caches={"layer": torch.zeros(8)}))
    assert sleep.make_kept(lambda: outside, config, in_pools=True) is outside
    allocator.holds(inside.model.kv_caches["layer"])
    if is_kept:
        assert sleep.make_kept(lambda: inside, config, in_pools=True) is inside
    else:
        with pytest.raises(ValueError, match=r"a sleep of level 2 discards the reward model.*start without --enable"):
            sleep.make_kept(lambda: inside, config, in_pools=True)
    assert sleep.make_kept(lambda: inside, config, in_pools=False) is inside  # vLLM makes it outside its pools


def test_sleep_is_for_gpus(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    check_engine(engine_config(enable_sleep_mode=True), on_v2=True)
    check_engine(engine_config(enable_sleep_mode=True), on_v2=False)
