"""The reward model's configuration and memory, derived from those of the engine."""

from __future__ import annotations

import copy
import os
from typing import Any

import psutil
import torch
from vllm.config import CompilationConfig, LoadConfig, LoRAConfig, ModelConfig, VllmConfig
from vllm.config import replace as replace_config
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.reward.memory import BaseMemory


def reward_model_config(base: ModelConfig, **overrides: Any) -> ModelConfig:
    """The reward model's ModelConfig, in the base model's dtype and seed unless overridden. In which format it is
    stored is its own affair.

    Raises ValueError (or what vLLM raises) when the model cannot be found or read.
    """
    settings: dict[str, Any] = {
        "dtype": base.dtype,
        "seed": base.seed,
        "runner": "generate",
        "enforce_eager": base.enforce_eager,
        "skip_tokenizer_init": True,
        "disable_cascade_attn": True,
    }
    model_config = ModelConfig(**settings | {"tokenizer": overrides["model"]} | overrides)
    # vLLM takes a longrope model at the length that it was first trained with, unless it is asked for more.
    original = getattr(model_config.hf_text_config, "original_max_position_embeddings", None)
    if model_config.max_model_len == original:
        model_config.max_model_len = max(original, getattr(model_config.hf_text_config, "max_position_embeddings", 0))
    return model_config


def served_model_config(base: ModelConfig) -> ModelConfig:
    """The served model's ModelConfig as a reward model's: as many positions as the model has, not as it is served
    with."""
    model_config = copy.copy(base)
    model_config.disable_cascade_attn = True
    model_config.max_model_len = max(base.max_model_len, base.get_and_verify_max_len(-1))
    return model_config


def uniform_sliding_window(model_config: ModelConfig) -> int | None:
    """The window that all layers share, by the rule of vLLM's EngineArgs; None where layers have their own."""
    layer_types = getattr(model_config.hf_text_config, "layer_types", None)
    if layer_types is not None and any(layer_type != "sliding_attention" for layer_type in layer_types):
        return None
    return model_config.get_sliding_window()


def derive_vllm_config(
    base: VllmConfig,
    model_config: ModelConfig,
    max_num_batched_tokens: int,
    rows_per_token: int = 1,
    is_served: bool = False,
    lora_config: LoRAConfig | None = None,
) -> VllmConfig:
    """A VllmConfig for the reward model: the engine's, with everything that belongs to the base model taken out.

    Args:
        rows_per_token: into how many of the reward model's tokens one of the base's may go.
        is_served: the reward model is the served one, with its attention and its quantization.
        lora_config: of the reward model's adapters.
    """
    cache_config = replace_config(
        base.cache_config,
        cache_dtype=base.cache_config.cache_dtype if is_served else "auto",
        # CPU attention shares no finer than 32 tokens; 16 is what every GPU back end has.
        block_size=32 if current_platform.is_cpu() else 16,
        sliding_window=uniform_sliding_window(model_config),
        is_attention_free=model_config.is_attention_free,
        enable_prefix_caching=True,
        num_gpu_blocks_override=None,
        kv_cache_memory_bytes=None,
        kv_sharing_fast_prefill=False,
        kv_offloading_size=None,  # of which vLLM would make a KV connector
    )
    # Resolved by the engine core for the base model; the reward model's is resolved for its own back ends.
    cache_config.kv_cache_layout = None
    cache_config.num_gpu_blocks = None
    max_num_rows = base.scheduler_config.max_num_seqs * (1 + base.num_speculative_tokens) * rows_per_token
    scheduler_config = replace_config(
        base.scheduler_config,
        max_model_len=model_config.max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        # A row of a context is a sequence, and so is what the context lacks.
        max_num_seqs=min(2 * max_num_rows * MAX_CONTEXTS, max_num_batched_tokens),
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        # One KV cache group: a block table serves every layer, sliding windows included.
        disable_hybrid_kv_cache_manager=True,
    )
    # Compiled as the base model is. A platform chooses its own form of this mode, from this mode alone.
    compiled = base.compilation_config.mode not in (None, CompilationMode.NONE)
    mode = CompilationMode.VLLM_COMPILE if compiled else CompilationMode.NONE
    compilation_config = CompilationConfig(mode=mode, cudagraph_mode=CUDAGraphMode.NONE)
    if base.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):  # graphs of decoding alone
        compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation_config.cudagraph_capture_sizes = padded_sizes(min(max_num_rows, max_num_batched_tokens))
    # The reward model's files are its own; only that there are none to be read (to measure) holds for both.
    load_format = "dummy" if base.load_config.load_format == "dummy" else "auto"
    # VllmConfig writes into what it is given (jit warmup, MoE), and these are the engine's own: copies.
    attention_config = copy.copy(base.attention_config)
    if not is_served:
        attention_config.backend = None
    return replace_config(
        base,
        model_config=model_config,
        cache_config=cache_config,
        scheduler_config=scheduler_config,
        load_config=LoadConfig(load_format=load_format, download_dir=base.load_config.download_dir),
        compilation_config=compilation_config,
        attention_config=attention_config,
        parallel_config=copy.copy(base.parallel_config),
        kernel_config=copy.copy(base.kernel_config),
        quant_config=base.quant_config if is_served else None,
        lora_config=lora_config,
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        additional_config={},
    )


def padded_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, ... and ``most``: from 8 on at most half as many again as there are rows."""
    sizes, step = [1, 2, 4], 8
    while step < most:
        sizes += [step] if step == 8 else [step, step + step // 2]
        step *= 2
    return [size for size in sizes if size < most] + [most]


def base_memory(base: VllmConfig) -> BaseMemory:
    """The size of the base model's KV cache on this rank. Call it once the reward model's weights are loaded."""
    model, cache = base.model_config, base.cache_config
    dtype = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model)
    entries = model.get_num_kv_heads(base.parallel_config) * model.get_head_size() * (1 if model.use_mla else 2)
    bytes_per_token = entries * dtype.itemsize * model.get_num_layers(base.parallel_config)
    if cache.num_gpu_blocks_override is not None:
        return BaseMemory(bytes_per_token, cache.num_gpu_blocks_override * cache.block_size, 0)
    if cache.kv_cache_memory_bytes is not None:
        return BaseMemory(bytes_per_token, cache.kv_cache_memory_bytes // bytes_per_token, 0)
    if current_platform.is_cpu():
        total = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory
        used = psutil.Process().memory_info().rss
    else:
        free, total = torch.cuda.mem_get_info()
        used = total - free
    if not base.compilation_config.static_forward_context:
        used += unloaded_weight_bytes(base)
    return BaseMemory(bytes_per_token, None, int(total * cache.gpu_memory_utilization) - used)


def is_first_rank() -> bool:
    """Whether this is the tensor-parallel rank that announces and logs for its engine."""
    return get_tp_group().rank_in_group == 0


def least_of_ranks(number: int) -> int:
    """The smallest of the tensor-parallel ranks' numbers. Pools of one size make all ranks take the same decisions."""
    group = get_tp_group()
    if group.world_size == 1:
        return number
    least = torch.tensor([number])
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(least)


def unloaded_weight_bytes(base: VllmConfig) -> int:
    """Size of the base model's weights on this rank: the V1 runner loads them after its logits processors."""
    loader = get_model_loader(base.load_config)
    if not isinstance(loader, DefaultModelLoader):
        return 0
    model = base.model_config
    files = loader._prepare_weights(model.model, None, model.revision, True, None)[1]
    return sum(os.path.getsize(file) for file in files) // base.parallel_config.tensor_parallel_size
