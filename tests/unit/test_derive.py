"""The reward model's configuration is the engine's, without what is the base model's alone."""

from __future__ import annotations

import pytest

from tests.support.engine import Worker

pytestmark = [pytest.mark.slow, pytest.mark.every_release]


def connectors(base: str, reward: str, settings: dict) -> tuple:
    """Of the engine's configuration, and of the reward model's."""
    from vllm import EngineArgs

    from pad_vllm.reward.derive import derive_vllm_config, reward_model_config

    arguments = {"model": base, "dtype": "float32", "enforce_eager": True, "max_model_len": 64}
    engine = EngineArgs(**arguments, **settings).create_engine_config()
    derived = derive_vllm_config(engine, reward_model_config(engine.model_config, model=reward), 64)
    return tuple(config.kv_transfer_config and config.kv_transfer_config.kv_connector for config in (engine, derived))


@pytest.mark.parametrize(
    ("settings", "connector"),
    [
        ({"kv_offloading_size": 1}, "OffloadingConnector"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "ExampleConnector"),
    ],
)
def test_the_base_models_keys_and_values_alone_are_moved(models, settings, connector):
    worker = Worker("v1")
    try:
        found = worker.run(connectors, str(models.base), str(models.reward), settings)
    finally:
        worker.close()
    assert found == (connector, None)
