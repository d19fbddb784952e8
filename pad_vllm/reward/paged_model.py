"""The reward model as vLLM runs models: its loader, its attention back ends, its paged KV cache.

An upgrade of vLLM edits this file and :mod:`.derive`; :mod:`.block_manager`, which uses vLLM's block pool;
:mod:`pad_vllm.worker.adapters`, to which the runners speak; :mod:`pad_vllm.frontend.patches`; and, where releases
differ, :mod:`pad_vllm.releases`. ``vllm/v1/worker/gpu/spec_decode/standalone_ar`` is vLLM's own example of a second
model in a worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache

from pad_vllm.kernels.types import OutputHead
from pad_vllm.releases import plan_kv_cache
from pad_vllm.reward.adapters import AdapterFolder, Adapters
from pad_vllm.reward.derive import base_memory, least_of_ranks
from pad_vllm.reward.memory import TypicalContext, derive_kv_cache_bytes
from pad_vllm.reward.merging import Merge

logger = init_logger(f"vllm.{__name__}")


class _BackboneLoader(DefaultModelLoader):
    """vLLM's loader, past the value heads that lie among the checkpoint's tensors."""

    not_backbone: frozenset[str]
    adapter: Merge | None

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module):
        weights = super().get_all_weights(model_config, model)
        backbone = ((name, tensor) for name, tensor in weights if name not in self.not_backbone)
        return backbone if self.adapter is None else self.adapter.apply(backbone)


def load_model(vllm_config: VllmConfig, not_backbone: frozenset[str], adapter: AdapterFolder | None) -> nn.Module:
    """The reward model's weights, by vLLM's loader.

    Args:
        not_backbone: names of tensors that are left alone.
        adapter: what is merged into the others.
    """
    loader = get_model_loader(vllm_config.load_config)
    if type(loader) is DefaultModelLoader:
        loader = _BackboneLoader(vllm_config.load_config)
        loader.not_backbone, loader.adapter = not_backbone, None if adapter is None else Merge(adapter)
    with set_model_tag("pad_reward_model"):  # a compilation cache of its own
        return loader.load_model(vllm_config=vllm_config, model_config=vllm_config.model_config)


@contextlib.contextmanager
def without_kv_connector() -> Iterator[None]:
    """Attention layers tell the engine's KV connector of what they computed, by names that the reward model's share
    with the base's: on Model Runner V2, where a step of the connector lasts until after sampling, it would send the
    one's keys and values for the other's. vLLM's runner silences its warm-up in the same way."""
    connector, kv_transfer_state._KV_CONNECTOR_AGENT = kv_transfer_state._KV_CONNECTOR_AGENT, None
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = connector


@dataclass
class ForwardBatch:
    """One forward of the reward model over several sequences; the field names are vLLM's.

    Tensors are on the device unless it says otherwise. Sequences of one token come first, as back ends with a decode
    path want it; several of them may be tokens of one context.
    """

    input_ids: torch.Tensor
    """[num_tokens] int32"""
    positions: torch.Tensor
    """[num_tokens] int64"""
    slot_mapping: torch.Tensor
    """[num_tokens] int64: where in the KV cache each token's keys and values go"""
    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32"""
    query_start_loc_cpu: torch.Tensor
    """The same, on the host"""
    max_query_len: int
    seq_lens: torch.Tensor
    """[num_seqs] int32: tokens of each sequence once this batch is computed"""
    seq_lens_upper_bound: torch.Tensor
    """[num_seqs] int32, on the host: the same or more"""
    seq_lens_known: bool
    """Whether it is the same"""
    max_seq_len: int
    """At least the largest of them"""
    block_table: torch.Tensor
    """[num_seqs, max_num_blocks] int32"""
    context: ForwardContext | None = None
    """vLLM's, of a batch that is run again and again"""
    adapters: torch.Tensor | None = None
    """[num_tokens] int64: :meth:`~pad_vllm.reward.adapters.Adapters.select`"""


class PagedModel:
    """A causal LM on its own paged KV cache, beside the base model.

    Args:
        vllm_config: its own (:mod:`.derive`): its ``max_model_len`` is the longest context that it must hold, its
            ``max_num_batched_tokens`` the most tokens in one forward.
        base: the engine's.
        kv_cache_memory_bytes: size of the KV cache; derived when None (:mod:`pad_vllm.reward.memory`).
        typical: what it is derived from.
        make: makes the model, of its configuration: :func:`load_model` or
            :func:`~pad_vllm.reward.served.instance_of`.
        adapters: that contexts may be read through.

    Raises:
        ValueError: the KV cache cannot hold one context, or the architecture needs more than one KV cache group.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        base: VllmConfig,
        device: torch.device,
        kv_cache_memory_bytes: int | None,
        typical: TypicalContext,
        make: Callable[[VllmConfig], nn.Module],
        adapters: tuple[AdapterFolder, ...] = (),
    ) -> None:
        self.device = device
        self.vllm_config = vllm_config
        with set_current_vllm_config(self.vllm_config):
            self.model = make(self.vllm_config)
            self.adapters = Adapters(self.model, adapters, vllm_config, device) if adapters else None
            self._init_kv_cache(kv_cache_memory_bytes, base, typical)
        # Its kernel multiplies what is behind a sequence's end in its last block by 0, and NaN stays NaN. Those of GPUs
        # do not load it.
        self.attends_behind_end = current_platform.is_cpu()
        self.max_model_len = vllm_config.model_config.max_model_len
        max_num_batched_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.arange_cpu = torch.arange(max_num_batched_tokens + 1, dtype=torch.int32)
        self.arange = self.arange_cpu.to(device)

    def _init_kv_cache(self, memory_bytes: int | None, base: VllmConfig, typical: TypicalContext) -> None:
        config = self.vllm_config
        spec = get_kv_cache_spec(config)
        if not spec or not all(isinstance(s, (FullAttentionSpec, SlidingWindowSpec)) for s in spec.values()):
            raise ValueError(
                f"pad.reward_model={config.model_config.model!r}: its layers keep "
                f"{', '.join(sorted({type(s).__name__ for s in spec.values()})) or 'no cache'}; only attention with a "
                "paged KV cache is supported"
            )
        backends = get_current_attn_backends(config)
        self.plans_by_bound = any("FLASHINFER" in backend.get_name() for backend in backends)
        """Whether attention takes the bounds of sequences' lengths for the lengths themselves"""
        layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
        resolve_kv_cache_layout(config, [layouts], list(spec.values()))
        # What is behind a sliding window is kept too, so every layer needs every block of a context.
        block_bytes = sum(s.page_size_bytes for s in spec.values())
        self.block_size = config.cache_config.block_size
        self.max_num_blocks = -(-config.model_config.max_model_len // self.block_size)
        one_context = self.max_num_blocks * block_bytes
        self.bytes_per_token = block_bytes / self.block_size
        if memory_bytes is None:
            memory_bytes = derive_kv_cache_bytes(
                base_memory(base), self.bytes_per_token, typical, one_context, base.scheduler_config.max_num_seqs
            )
        memory_bytes = least_of_ranks(memory_bytes)
        if memory_bytes < one_context:
            raise ValueError(
                f"pad.kv_cache_memory_bytes={memory_bytes}: one context of {config.model_config.max_model_len} tokens "
                f"takes {one_context} bytes of the reward model's KV cache, the least that can work"
            )
        # One block more than asked: vLLM's pool holds its first block back as the null block.
        kv_cache_config = plan_kv_cache(config, spec, memory_bytes + block_bytes)
        num_groups = len(kv_cache_config.kv_cache_groups)
        if num_groups != 1:
            raise ValueError(
                f"pad.reward_model={config.model_config.model!r}: its layers need {num_groups} KV cache groups; one is "
                "supported"
            )
        self.kv_cache_config: KVCacheConfig = kv_cache_config
        self.layer_names = kv_cache_config.kv_cache_groups[0].layer_names
        (self.attn_groups,), self.cg_support, kernel_block_sizes = init_attn_backend(
            kv_cache_config, config, self.device
        )
        if kernel_block_sizes != [self.block_size] or kv_cache_config.num_blocks <= self.max_num_blocks:
            raise ValueError(
                f"pad.reward_model={config.model_config.model!r}: its attention back end wants KV cache blocks of "
                f"{kernel_block_sizes} tokens and got {kv_cache_config.num_blocks} of {self.block_size}, where a "
                f"context takes {self.max_num_blocks}"
            )
        self.kv_caches = init_kv_cache(
            config.compilation_config.static_forward_context,
            kv_cache_config,
            self.device,
            kernel_block_sizes,
            config,
            attn_groups=self.attn_groups,
        )
        if any(cache.shape[0] != kv_cache_config.num_blocks for cache in self.kv_caches.values()):
            raise ValueError("pad: this vLLM's KV caches do not begin with their blocks")

    @property
    def num_blocks(self) -> int:
        return self.kv_cache_config.num_blocks

    @property
    def graph_sizes(self) -> list[int]:
        """Sequences of one token, for which CUDA graphs are to be captured, ascending; none where it cannot be done."""
        compilation = self.vllm_config.compilation_config
        if not compilation.cudagraph_mode.has_full_cudagraphs():
            return []
        if self.cg_support.min_cg_support is AttentionCGSupport.NEVER:
            logger.info(
                "PAD: the attention back end %s supports no CUDA graphs, so the reward model runs eagerly.",
                self.cg_support.min_cg_attn_backend,
            )
            return []
        return compilation.cudagraph_capture_sizes

    @torch.inference_mode()
    def output_head(self, hidden_states: torch.Tensor) -> OutputHead:
        """What the architecture makes its logits with: whatever it hands to vLLM's LogitsProcessor, which in some is
        not called ``lm_head`` (tied embeddings).

        Args:
            hidden_states: [1, hidden_size], to see it being done.

        Raises:
            ValueError: it has no such matrix.
        """
        calls: list[tuple[LogitsProcessor, tuple, dict]] = []
        hooks = [
            module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
            for module in self.model.modules()
            if isinstance(module, LogitsProcessor)
        ]
        try:
            self.model.compute_logits(hidden_states)
        finally:
            for hook in hooks:
                hook.remove()
        name = type(self.model).__name__
        if len(calls) != 1:
            raise ValueError(
                f"pad.reward_model: {name} computes its logits in its own way, and PAD cannot compute them for "
                "candidates alone"
            )
        processor, args, kwargs = calls[0]
        head, _, bias = (*args, *[None] * 3)[:3]
        weight = getattr(head, "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"pad.reward_model: the output head of {name} is not a plain [vocabulary, hidden] matrix; PAD needs "
                "the rows of its candidates"
            )
        num_shards = get_tensor_model_parallel_world_size()
        whole_or_shard = OutputHead(
            weight[: head.num_org_embeddings_per_partition],
            kwargs.get("embedding_bias", bias),
            processor.soft_cap,
            processor.scale,
            head.shard_indices.org_vocab_start_index,
            (get_tensor_model_parallel_rank(), num_shards),
            tensor_model_parallel_all_reduce if num_shards > 1 else None,
        )
        if self.adapters is None:
            return whole_or_shard
        return whole_or_shard._replace(adapters=self.adapters.of_head(whole_or_shard))

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int) -> torch.Tensor:
        """Run the largest forward once, so that its memory is taken while vLLM still counts, and before vLLM locks the
        workspaces in which kernels of experts compute. On a CPU vLLM counts what the process holds, and a forward gives
        back what it took: there a small one compiles as well, and sooner.

        Args:
            max_num_batched_tokens: most tokens in one forward, of as many contexts as it takes.

        Returns:
            [1, hidden_size] a hidden state.

        Raises:
            ValueError: the model needs other inputs than tokens.
        """
        num_tokens = max_num_batched_tokens
        if current_platform.is_cpu():
            num_tokens = min(num_tokens, 64)
        num_full, rest = divmod(num_tokens, self.max_model_len)
        lengths = torch.tensor([rest] * (rest > 0) + [self.max_model_len] * num_full, dtype=torch.int32)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
        # All in the same blocks: they say the same.
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths.tolist()])
        blocks = torch.arange(1, self.max_num_blocks + 1, dtype=torch.int32, device=self.device)
        longest = int(lengths.max())
        batch = ForwardBatch(
            input_ids=torch.zeros(num_tokens, dtype=torch.int32, device=self.device),
            positions=positions,
            slot_mapping=positions + self.block_size,
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            max_query_len=longest,
            seq_lens=lengths.to(self.device),
            seq_lens_upper_bound=lengths,
            seq_lens_known=True,
            max_seq_len=longest,
            block_table=blocks.expand(len(lengths), -1).contiguous(),
            adapters=None if self.adapters is None else torch.zeros_like(positions),
        )
        try:
            # Compilation reads the current configuration. It is done here once, for all sizes, as by vLLM itself.
            with set_current_vllm_config(self.vllm_config):
                return self.forward(batch)[-1:]
        except Exception as error:
            raise ValueError(
                f"pad.reward_model: {type(self.model).__name__} cannot be run on token ids alone: {error}"
            ) from error

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute a batch, writing its keys and values into the KV cache. To be called in inference mode.

        Returns:
            [num_tokens, hidden_size] final hidden states, in the model's dtype.
        """
        return self.run(batch, self.prepare(batch))

    def prepare(self, batch: ForwardBatch, for_capture: bool = False) -> dict[str, Any]:
        """Tell adapters which tokens a batch has; returns what attention needs to know of it, by layer.

        ``for_capture``: in a CUDA graph.
        """
        if self.adapters is not None:
            self.adapters.select(batch.adapters)
        # FlashInfer plans by the bound as by the lengths themselves; without it, it reads those back.
        give_bound = batch.seq_lens_known or not self.plans_by_bound
        common = CommonAttentionMetadata(
            query_start_loc=batch.query_start_loc,
            query_start_loc_cpu=batch.query_start_loc_cpu,
            seq_lens=batch.seq_lens,
            seq_lens_cpu_upper_bound=batch.seq_lens_upper_bound if give_bound else None,
            max_seq_len=batch.max_seq_len,
            num_reqs=batch.seq_lens.shape[0],
            num_actual_tokens=batch.input_ids.shape[0],
            max_query_len=batch.max_query_len,
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slot_mapping,
            positions=batch.positions,
        )
        metadata: dict[str, Any] = {}
        for group in self.attn_groups:
            build = group.build_metadata_for_cudagraph_capture if for_capture else group.build_metadata
            metadata.update(dict.fromkeys(group.layer_names, build(common)))
        return metadata

    def run(self, batch: ForwardBatch, attn_metadata: dict[str, Any]) -> torch.Tensor:
        """:meth:`forward`, with the metadata at hand."""
        context = batch.context or self.forward_context(batch)
        context.attn_metadata, context.moe_layer_index = attn_metadata, 0  # what a forward changes in it
        with override_forward_context(context), without_kv_connector():
            hidden_states = self.model(input_ids=batch.input_ids, positions=batch.positions)
        return hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states

    def forward_context(self, batch: ForwardBatch) -> ForwardContext:
        """All of it that is the same whenever a batch is run."""
        with set_forward_context(
            {},
            self.vllm_config,
            num_tokens=batch.input_ids.shape[0],
            slot_mapping=dict.fromkeys(self.layer_names, batch.slot_mapping),
        ):
            return get_forward_context()
