"""The size of the reward model's KV cache, as an engine takes it where nobody says it."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tests.support.engine import Engine, Worker, engine_stats, pad_config, running_guidance, set_environment


def test_the_engine_takes_it_from_its_own_configuration(models):
    """The base has blocks for 16,384 tokens; a typical request has 128 of them, and a preference in the template."""
    engine = Engine("v1", models.base, num_gpu_blocks_override=512, block_size=32, **pad_config(models.reward))
    try:
        stats, num_typical = engine.call(engine_stats), engine.call(typical_tokens)
        lengths, hidden_states = engine.call(partial(warm_up_of, max_model_len=24, num_tokens=60))
        assert lengths == [12, 24, 24]  # kernels of experts take memory for all tokens of a forward
        assert hidden_states[:2] == [pytest.approx(hidden_states[2], rel=1e-4, abs=1e-5)] * 2
        assert 128 + 32 < num_typical < 128 + 96
        assert stats["blocks"] == 16384 * num_typical // 128 // 32
    finally:
        engine.close()


def warm_up_of(llm, max_model_len: int, num_tokens: int) -> tuple[list[int], list[list[float]]]:
    """Lengths of the sequences of the forward that the start runs, and the hidden states of their twelfth tokens."""
    model, batches, found = running_guidance(llm).model, [], []

    def forward(batch):
        batches.append(batch)
        found.append(type(model).forward(model, batch))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", forward)
        patch.setattr(model, "max_model_len", max_model_len)
        model.warm_up(num_tokens)
    begins = batches[0].query_start_loc_cpu[:-1]
    assert batches[0].input_ids.shape[0] == num_tokens
    return batches[0].seq_lens.tolist(), found[0][begins + 11].tolist()


def typical_tokens(llm) -> int:
    """Of a request's context, by which the KV cache is reckoned."""
    base = llm.llm_engine.vllm_config.model_config
    return running_guidance(llm).loaded.fit.typical_context(base.max_model_len).num_tokens


def start_without_sizes(base: str, reward: str) -> dict:
    set_environment("v1")
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]
    from vllm import LLM
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    memory = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory
    llm = LLM(
        base,
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=512,
        max_num_seqs=4096,  # all of them at full length would use more than there is
        gpu_memory_utilization=3 * 2**30 / memory,
        **pad_config(reward),
    )
    base_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return engine_stats(llm) | {"base_blocks": base_blocks, "typical": typical_tokens(llm)}


def test_without_a_base_size_both_take_from_one_budget(models):
    """A CPU's: gpu_memory_utilization of the memory, less what the process has and what the base's weights will."""
    worker = Worker("v1")
    try:
        stats = worker.run(start_without_sizes, str(models.base), str(models.reward))
    finally:
        worker.close()
    base_tokens, reward_tokens = stats["base_blocks"] * 128, stats["blocks"] * 32
    # The base has still to run its first forward, for which it then has less.
    assert reward_tokens / (stats["typical"] / 256) == pytest.approx(base_tokens, rel=0.25)
