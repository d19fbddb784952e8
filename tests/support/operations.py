"""What a step launches: operations of PyTorch that would run something on a GPU, and Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


def storages(values: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class Launches(TorchDispatchMode):
    """The names of what is launched while it is on: no allocations, and no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_on, self.muted = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = not func._schema.is_mutable and storages(result) <= storages((args, kwargs))
        name = func._schema.name
        if not self.muted and name not in ALLOCATIONS and not is_view:
            # Of tensors unlike each other, as ours would be, "foreach" launches each by itself.
            self.names += [name] * (len(args[0]) if name.startswith("aten::_foreach") else 1)
        return result

    def within(self, function: Callable) -> Callable:
        """A function whose launches count."""

        def counted(*args, **kwargs):
            self.is_on = True
            try:
                with self:
                    return function(*args, **kwargs)
            finally:
                self.is_on = False

        return counted

    def without(self, function: Callable) -> Callable:
        """A function whose launches do not count."""

        def muted(*args, **kwargs):
            self.muted += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.muted -= 1

        return muted


def count(
    llm: Any, params: dict[str, Any], prompts: list[list[int]], num_steps: int, only_drafts: bool = False
) -> list[list[str]]:
    """Of each step: what guidance (unless ``only_drafts``) and drafting launch, the reward model's forwards and logits
    apart. A graph of drafts is one launch."""
    from vllm import SamplingParams

    from pad_vllm import PADLogitsProcessor
    from tests.support.engine import running_guidance
    from tests.support.graphs import Graph

    guidance, launches, steps = running_guidance(llm), Launches(), []
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    adapter = next(p.adapter for p in PADLogitsProcessor.running() if p.adapter.guidance is guidance)
    apart = [(guidance.model, "run"), (guidance.model, "prepare")]
    counted = [] if only_drafts else [(adapter, "apply")]
    if guidance.drafter is not None:
        apart.append((guidance.model.model, "compute_logits"))
        counted.append((runner.speculator, "propose"))
    run, replay = InterpretedFunction.run, launches.without(Graph.replay)

    def replayed(self: Graph) -> None:
        launches.names.append("graph")
        replay(self)

    def launched(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if launches.is_on and not launches.muted:
            launches.names.append(self.fn.__name__)
        return launches.without(functools.partial(run, self))(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(InterpretedFunction, "run", launched))
        stack.enter_context(patch.object(Graph, "replay", replayed))
        for owner, name in apart:
            stack.enter_context(patch.object(owner, name, launches.without(getattr(owner, name))))
        for owner, name in counted:
            stack.enter_context(patch.object(owner, name, launches.within(getattr(owner, name))))
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(f"counted {i}", {"prompt_token_ids": prompt}, SamplingParams(**params))
        for _ in range(num_steps):
            llm.llm_engine.step()
            steps.append(launches.names)
            launches.names = []
    llm.llm_engine.abort_request([f"counted {i}" for i in range(len(prompts))])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return steps
