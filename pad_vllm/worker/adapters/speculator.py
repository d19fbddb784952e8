"""The reward model as Model Runner V2's drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from pad_vllm.kernels import pad_k
from pad_vllm.reward.device import to_device
from pad_vllm.worker.adapters.draft_graphs import DraftGraphs, capture_drafts
from pad_vllm.worker.adapters.draft_kernel import DraftBuffers
from pad_vllm.worker.batch import GuidedBatch
from pad_vllm.worker.drafter import Proposals
from pad_vllm.worker.slots import RowParams

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from pad_vllm.worker.adapters.v2 import V2Adapter
    from pad_vllm.worker.guidance import Guidance

logger = init_logger(f"vllm.{__name__}")


class StepDraws(NamedTuple):
    """:class:`~pad_vllm.worker.drafter.Draws` of a step on Model Runner V2."""

    buffers: DraftBuffers
    graphs: DraftGraphs | None
    temperature: torch.Tensor
    """[max_num_reqs] float32, by slot"""
    seeds: torch.Tensor
    """[max_num_reqs] int64, by slot"""
    drafts: torch.Tensor
    """[num_reqs, num_speculative_steps] int64, out"""
    keep: bool
    """Whether any request is sampled, and verification asks what drafts were drawn from."""

    def draw(self, j: int, proposals: Proposals, positions: torch.Tensor) -> torch.Tensor:
        return self.buffers.draw(
            *(j, proposals, positions, self.temperature, self.seeds, self.drafts, proposals.places), keep=self.keep
        )

    def draw_all(self, batch: GuidedBatch, params: RowParams, num_drafts: int) -> bool | None:
        if self.graphs is None or not self.graphs.fits(params, num_drafts):
            return None
        return self.graphs.replay(batch, params, self.temperature, self.seeds)


class RewardSpeculator(BaseSpeculator):
    """Hands vLLM the drafts of :class:`~pad_vllm.worker.drafter.Drafter`.

    The distribution that a draft was drawn from goes to the rejection sampler, whatever ``draft_sample_method`` says;
    greedy requests are drafted greedily. A row without a draft gets its last token over again, as the certain draft of
    a distribution that has nothing else.

    vLLM makes it before the logits processors, which then find it by the engine's configuration (:meth:`of`). It drafts
    once it has an adapter.
    """

    supports_mm_inputs = False
    _made: ClassVar[WeakValueDictionary[int, RewardSpeculator]] = WeakValueDictionary()

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        model, config = vllm_config.model_config, vllm_config.speculative_config
        self.num_speculative_steps: int = config.num_speculative_tokens
        self.use_fp64_gumbel = model.use_fp64_gumbel
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        shape = max_num_reqs, self.num_speculative_steps, model.get_vocab_size()
        self.draft_logits = torch.full(shape, float("-inf"), dtype=model.head_dtype, device=device)
        """[max_num_reqs, num_speculative_steps, vocab_size], by slot, before temperature"""
        self.buffers: DraftBuffers | None = None
        self.graphs: DraftGraphs | None = None
        self.drafts = torch.zeros(max_num_reqs, self.num_speculative_steps, dtype=torch.int64, device=device)
        self.adapter: V2Adapter | None = None
        self._made[id(vllm_config)] = self
        logger.info(
            "PAD: the reward model drafts %d tokens at a time, in each request's own context.",
            self.num_speculative_steps,
        )

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RewardSpeculator | None:
        """An engine's, where it has one."""
        return cls._made.get(id(vllm_config))

    @torch.inference_mode()
    def begin(self, guidance: Guidance) -> None:
        """The reward model is there: make and compile what drafts take, and capture them where they can be."""
        drafter = guidance.drafter
        assert drafter is not None  # of an engine in which the reward model drafts
        self.buffers = DraftBuffers(self.draft_logits, pad_k(drafter.max_top_k), self.use_fp64_gumbel)
        one = torch.zeros(1, dtype=torch.int64, device=self.drafts.device)
        cold = torch.zeros(len(self.draft_logits), device=one.device)
        seeds, proposals = cold.long(), drafter.warm_up(guidance.loaded.hidden_states, 1)
        self.buffers.draw(0, proposals, one, cold, seeds, self.drafts, one, keep=True)  # as requests would compile it
        self.graphs = capture_drafts(drafter, self.buffers, self.drafts)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """The start captures its own (:mod:`pad_vllm.reward.decode`, :mod:`.draft_graphs`)."""

    def capture(self) -> None:
        """See :meth:`init_cudagraph_manager`."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[num_reqs, num_speculative_steps] int64, in the batch's order; the arguments are vLLM's."""
        drafts = self.drafts[: input_batch.num_reqs]
        if dummy_run or self.adapter is None or self.buffers is None:
            return drafts
        num_drafts = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        any_sampled = bool(self.adapter.sampled[input_batch.idx_mapping_np].any())
        draws = StepDraws(self.buffers, self.graphs, temperature, seeds, drafts, any_sampled)
        slots, last = input_batch.idx_mapping_np, last_sampled.view(-1)
        places, found = self.adapter.draft(slots, last, num_drafts, draws)
        if not found or len(places) < len(slots):
            without = np.setdiff1d(np.arange(len(slots)), places if found else ())
            self._fill(drafts, to_device(without, drafts.device, torch.int64), input_batch.idx_mapping, last)
        return drafts

    def _fill(
        self, drafts: torch.Tensor, places: torch.Tensor, idx_mapping: torch.Tensor, last_sampled: torch.Tensor
    ) -> None:
        slots = idx_mapping[places].long()
        tokens = last_sampled[slots].long().clamp(0, self.draft_logits.shape[2] - 1)
        drafts[places] = tokens.unsqueeze(1)
        assert self.buffers is not None  # something was to be drafted
        self.buffers.fill(slots, tokens)
