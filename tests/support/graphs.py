"""CUDA graphs of drafts, without a GPU: what was launched while one was captured is launched again.

As on a GPU, a replay knows nothing of Python. Each operation of PyTorch and each Triton kernel runs again on the very
tensors, and with the very numbers, that it had in the capture, and writes where it wrote then. An input that is not
brought up to date, or a number that a step should have chosen, is then as wrong as on a GPU. The reward model's
forward, and what a back end renews of its metadata, are recorded as one call each: those are vLLM's, and CPU attention
plans on the host.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from tests.support.operations import ALLOCATIONS, storages
from tests.support.reads import READING_OPS, Watch


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Records calls while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.muted = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert self.muted or func._schema.name not in READING_OPS, f"{func} waits for the device"
        result = func(*args, **kwargs)
        is_view = not func._schema.is_mutable and storages(result) <= storages((args, kwargs))
        if not self.muted and func._schema.name not in ALLOCATIONS and not is_view:
            self.record(functools.partial(func, *args, **kwargs), result, storages((args, kwargs)))
        return result

    def record(self, call: Callable[[], Any], result: Any, in_place: set[int]) -> None:
        """``in_place``: what the call itself writes to."""
        old = tensors(result)

        def again() -> None:
            for was, now in zip(old, tensors(call()), strict=True):
                if was.untyped_storage()._cdata not in in_place:
                    was.copy_(now)

        self.calls.append(again)

    def whole(self, function: Callable) -> Callable:
        """A function that is recorded as one call."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.muted += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self.muted -= 1
            if not self.muted:
                self.record(functools.partial(function, *args, **kwargs), result, set())
            return result

        return recorded


class Graph:
    """What a GPU would have of ``launch``."""

    def __init__(self, launch: Callable[[], None], model: Any) -> None:
        recorder, run = Recorder(), InterpretedFunction.run
        builders = [group.get_metadata_builder() for group in model.attn_groups]
        with contextlib.ExitStack() as stack:
            for owner, name in ((model, "run"), *((builder, "update_draft_decode_metadata") for builder in builders)):
                stack.enter_context(patch.object(owner, name, recorder.whole(getattr(owner, name))))

            def launched(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
                return recorder.whole(functools.partial(run, kernel))(*args, **kwargs)

            stack.enter_context(patch.object(InterpretedFunction, "run", launched))
            watch = stack.enter_context(Watch())
            stack.enter_context(recorder)
            launch()
        assert watch.reads == [], f"a graph cannot wait for the device: {watch.reads}"
        self.calls = recorder.calls

    def replay(self) -> None:
        for call in self.calls:
            call()


def plan_on_device(model: Any) -> None:
    """Let the CPU's attention be a back end that a graph may have several forwards of: renew its metadata in place."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    for group in model.attn_groups:
        builder = group.get_metadata_builder()

        def renew(metadata: Any, builder: Any = builder) -> None:
            num_seqs = len(metadata.seq_lens)
            common = CommonAttentionMetadata(
                query_start_loc=metadata.query_start_loc,
                query_start_loc_cpu=model.arange_cpu[: num_seqs + 1],
                seq_lens=metadata.seq_lens,
                num_reqs=num_seqs,
                num_actual_tokens=metadata.num_actual_tokens,
                max_query_len=1,
                max_seq_len=metadata.max_seq_len,
                block_table_tensor=metadata.block_table,
                slot_mapping=metadata.slot_mapping,
            )
            metadata.scheduler_metadata = builder.build(0, common).scheduler_metadata

        builder.supports_draft_decode_metadata_update, builder.update_draft_decode_metadata = True, renew


def speculator_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator


def draft_in_graphs(llm: Any) -> None:
    """From now on, in an engine whose reward model drafts in this process: decode steps are padded as on a GPU, and
    drafts are made by graphs."""
    from pad_vllm.reward.decode import Captured
    from pad_vllm.reward.derive import padded_sizes
    from pad_vllm.worker.adapters import draft_graphs
    from tests.support.engine import running_guidance

    guidance, speculator = running_guidance(llm), speculator_of(llm)
    decoder, model = guidance.engine.decoder, guidance.model
    decoder.sizes = padded_sizes(decoder.max_num_rows)
    plan_on_device(model)
    with (
        patch.object(draft_graphs, "graph_capture", lambda device: contextlib.nullcontext()),
        patch.object(draft_graphs, "capture_graph", lambda launch, pool, config: Captured(Graph(launch, model), ())),
    ):
        speculator.graphs = draft_graphs.capture_drafts(guidance.drafter, speculator.buffers, speculator.drafts)
    assert speculator.graphs is not None
