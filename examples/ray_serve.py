"""A guided model behind Ray Serve: ``serve run examples.ray_serve:app``. docs/deploy.md says what was run of this."""

from __future__ import annotations

ENGINE_KWARGS = {
    "max_model_len": 8192,
    "tensor_parallel_size": 2,
    "logits_processors": ["pad_vllm:PADLogitsProcessor"],
    "additional_config": {"pad": "/models/pad.yaml"},
}
ENVIRONMENT = {"PAD_VLLM_ANNOUNCE_DIR": "/shared/pad/announcements"}
"""Where a model's replica may be on another node than its engine's first rank: a folder that nodes share."""


def __getattr__(name: str):
    if name != "app":
        raise AttributeError(name)
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": "base-model", "model_source": "/models/base-model"},
        engine_kwargs=ENGINE_KWARGS,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    return build_openai_app({"llm_configs": [config]})
