"""Decode steps on buffers that stay where they are, padded as for CUDA graphs; without a GPU, a graph is a call."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.support.engine import PLUGIN, Engine, guided, pad_config, running_guidance

pytestmark = pytest.mark.every_release

BATCHES = [*range(1, 10), 15, 16, 17, 3]
MAX_TOKENS = 6
STEPS = 40
LOOKS: list[int] = []
"""In the engine's process."""
SEEN: dict[int, set[tuple[int, ...]]] = {}
"""In the engine's process: rows of a decode forward -> where its tensors and the kernels' hidden states were."""


def pad(llm, graphs: bool) -> None:
    """Pad from now on; with graphs, run them."""
    from pad_vllm.reward.derive import padded_sizes

    guidance = running_guidance(llm)
    decoder, model = guidance.engine.decoder, guidance.model
    assert not decoder.sizes, "on a CPU nothing is padded"
    decoder.sizes = padded_sizes(decoder.max_num_rows)
    decoding: list = []

    def run(batch, attn_metadata, _run=model.run):
        if any(batch is own for own in decoder._batches.values()):
            decoding.append(batch)
            # Padding stands in the null block alone.
            assert not batch.slot_mapping[decoder._num_rows :].any()
            assert not batch.block_table[decoder._num_rows :].any()
        return _run(batch, attn_metadata)

    def guide(logits, hidden_states, *args, _guide=guidance.rule.apply, **kwargs):
        for batch in decoding:
            tensors = [value for value in vars(batch).values() if hasattr(value, "data_ptr")]
            at = tuple(tensor.data_ptr() for tensor in (*tensors, hidden_states))
            SEEN.setdefault(len(batch.input_ids), set()).add(at)
        decoding.clear()
        return _guide(logits, hidden_states, *args, **kwargs)

    if graphs:
        capture(decoder)
    model.run, guidance.rule.apply = run, guide


def count_looks(llm) -> None:
    """Of all steps from now on, those in which the reward engine looks at lengths and blocks."""
    blocks = running_guidance(llm).engine.blocks
    blocks._look = lambda *args, _look=blocks._look: LOOKS.append(1) or _look(*args)


def looks(llm) -> int:
    return len(LOOKS)


def capture(decoder) -> None:
    from unittest.mock import patch

    from vllm.v1.worker import workspace

    from pad_vllm.reward import decode

    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(decoder.model.device)
    scratch = torch.empty(8, dtype=torch.uint8)
    workspace.current_workspace_manager()._current_workspaces[0] = scratch

    class Graph:
        """Replays by calling what was captured with it."""

        def __init__(self) -> None:
            self.size = decoder.sizes[-1 - len(decoder._graphs)]  # the largest is captured first

        def replay(self) -> None:
            batch = decoder._batches[self.size]
            decoder._keep(decoder.model.run(batch, decoder.model.prepare(batch)))

    with (
        patch.object(decode, "graph_capture", lambda device: contextlib.nullcontext()),
        patch.object(decode, "capture_pool", lambda pool, config: contextlib.nullcontext(pool)),
        patch.object(decode, "current_stream", lambda: None),
        patch("torch.cuda.graph_pool_handle", lambda: None),
        patch("torch.cuda.CUDAGraph", Graph),
        patch("torch.cuda.graph", lambda graph, pool, stream: contextlib.nullcontext()),
    ):
        decoder._capture()
    assert list(decoder._graphs) == list(reversed(decoder.sizes))
    assert all(captured.scratch[0] is scratch for captured in decoder._graphs.values())  # whatever vLLM does with it


def seen(llm) -> dict[int, set[tuple[int, ...]]]:
    return SEEN


@pytest.mark.parametrize(
    ("runner", "graphs"),
    [
        pytest.param("v1", False, id="v1-padded"),
        pytest.param("v2", True, id="v2-graphs", marks=pytest.mark.one_release),
    ],
)
def test_padded_steps_use_the_same_storage_and_equal_the_oracle(models, encode, expect, runner, graphs):
    engine = Engine(runner, models.base, max_num_seqs=18, logits_processors=PLUGIN, **pad_config(models.named))
    try:
        engine.call(pad, graphs)
        for batch in BATCHES:
            prompts = [encode(f"answer {i % 5} " + "and so on " * (i % 3)) for i in range(batch)]
            asked = [{"preference": "formal"} if i % 2 else {"beta": 0.5} for i in range(batch)]
            params = [{"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | guided(**a) for a in asked]
            expected = [expect(p, max_tokens=MAX_TOKENS, **a) for p, a in zip(prompts, asked, strict=True)]
            assert engine.generate(prompts, params) == expected, batch
        places = engine.call(seen)
        engine.call(count_looks)
        prompts, asked = (
            [encode(f"answer {i}") for i in range(3)],
            [{"preference": "formal"}, {"beta": 0.5}, {"top_k": 5}],
        )
        params = [{"temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True} | guided(**a) for a in asked]
        expected = [expect(p, max_tokens=STEPS, **a) for p, a in zip(prompts, asked, strict=True)]
        assert engine.generate(prompts, params) == expected
        num_looks = engine.call(looks)
    finally:
        engine.close()
    assert sorted(places) == [1, 2, 4, 8, 16, 24]
    assert len(set.union(*places.values())) == 1, "all sizes are the first rows of the same buffers"
    # As they begin, and where one of two lengths of contexts goes into another block and the step after.
    assert 0 < num_looks <= 2 + 2 * 2 * (1 + STEPS // 32), "in other steps the host only counts"
