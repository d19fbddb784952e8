"""The internals of vLLM that pad-vllm uses, and whether the installed vLLM still has them.

Logits processors are a public interface of vLLM. A second model with its own paged KV cache is not. The imported names
are read from pad-vllm's own sources; which members and parameters it uses is listed here, and differences between
releases of vLLM are in :mod:`.releases`.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from pad_vllm import releases
from pad_vllm.errors import one_line

logger = logging.getLogger(f"vllm.{__name__}")

ALLOW_UNTESTED = "PAD_VLLM_ALLOW_UNTESTED_VLLM"
"""Environment variable: 1 starts guidance on a vLLM that pad-vllm was not tested with."""

PARAMETERS = {
    "vllm.compilation.cudagraph_pool:capture_pool": ("pool", "vllm_config"),
    "vllm.distributed.parallel_state:graph_capture": ("device",),
    "vllm.distributed.kv_transfer.kv_connector.utils:get_current_attn_backends": ("vllm_config",),
    "vllm.entrypoints.launchers.app:init_entrypoints_middleware": ("args", "app"),
    "vllm.forward_context:set_forward_context": ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    "vllm.lora.model_manager:create_lora_manager": (
        *("model", "max_num_seqs", "max_num_batched_tokens", "vocab_size", "lora_config", "vllm_config", "device"),
    ),
    "vllm.model_executor.layers.utils:apply_penalties": (
        *("logits", "prompt_tokens_tensor", "output_tokens_tensor"),
        *("presence_penalties", "frequency_penalties", "repetition_penalties"),
    ),
    "vllm.model_executor.layers.utils:get_token_bin_counts_and_mask": ("tokens", "vocab_size", "num_seqs"),
    "vllm.utils.torch_utils:async_tensor_h2d": ("data", "device", "dtype"),
    "vllm.utils.torch_utils:make_tensor_with_pad": ("x", "pad", "dtype", "device"),
    "vllm.v1.attention.backends.utils:resolve_kv_cache_layout": (),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len", "num_reqs"),
        *("num_actual_tokens", "max_query_len", "block_table_tensor", "slot_mapping", "positions"),
    ),
    "vllm.v1.core.kv_cache_utils:hash_block_tokens": (
        *("hash_function", "parent_block_hash", "curr_block_token_ids", "extra_keys"),
    ),
    "vllm.v1.sample.logits_processor:process_dict_updates": ("req_entries", "batch_update", "new_state"),
    "vllm.v1.worker.gpu.sample.gumbel:gumbel_noised_argmax": (
        *("logits", "keys", "mask", "seed", "pos", "temp", "IS_DRAFTING", "USE_FP64"),
    ),
    "vllm.v1.worker.gpu.spec_decode:init_speculator": ("vllm_config", "device", "req_states"),
    "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec": ("vllm_config",),
    "vllm.v1.worker.gpu.attn_utils:init_attn_backend": ("kv_cache_config", "vllm_config", "device"),
    "vllm.v1.worker.gpu.attn_utils:init_kv_cache": ("kv_cache_config", "device", "attn_groups"),
}
"""Function -> the parameters that we give it, on every release; :mod:`.releases` has what is asked of one alone."""

MEMBERS = {
    "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper": ("compiled", "vllm_config"),
    "vllm.config:CompilationConfig": ("static_forward_context", "static_all_moe_layers"),
    "vllm.distributed.kv_transfer:kv_transfer_state": ("_KV_CONNECTOR_AGENT",),
    "vllm.lora.model_manager:LoRAModelManager": (
        *("add_adapter", "activate_adapter", "modules", "packed_modules_mapping", "supported_lora_modules"),
        "punica_wrapper_mapping",
    ),
    "vllm.lora.lora_model:LoRAModel": ("from_local_checkpoint", "loras"),
    "vllm.lora.peft_helper:PEFTHelper": ("from_dict", "validate_legal", "get_rank_and_scaling", "rank_pattern"),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": (
        *("_token_lora_indices", "indices_len", "is_prefill", "no_lora"),
    ),
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU": ("token_mapping_meta",),
    "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta": (
        *("token_lora_mapping", "token_indices_sorted_by_lora_ids", "active_lora_ids", "num_tokens_per_lora"),
        *("lora_token_start_loc", "no_lora_flag_cpu", "num_active_loras_cpu"),
    ),
    "vllm.model_executor.model_loader:BaseModelLoader": ("load_model",),
    "vllm.v1.worker.gpu_worker:Worker": ("execute_model", "reload_weights", "finish_weight_update"),
    "vllm.v1.core.sched.output:SchedulerOutput": ("finished_req_ids",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("requests", "vllm_config"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": ("req_states", "vllm_config"),
    "vllm.v1.worker.gpu.states:RequestState": ("index_to_req_id",),
    "vllm.sampling_params:SamplingParams": ("stop_token_ids", "eos_token_id", "max_tokens"),
    "vllm.v1.core.block_pool:BlockPool": (
        *("get_new_blocks", "free_blocks", "touch", "get_cached_block", "cache_full_blocks", "reset_prefix_cache"),
        *("get_num_free_blocks", "get_usage"),
    ),
    "vllm.forward_context:ForwardContext": ("attn_metadata", "moe_layer_index"),
    "vllm.model_executor.offloader.base:BaseOffloader": ("sync_prev_onload", "join_after_forward"),
    "vllm.v1.attention.backend:AttentionCGSupport": ("NEVER",),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": ("block_id",),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("num_blocks", "kv_cache_groups"),
    "vllm.v1.sample.logits_processor:LogitsProcessor": (
        *("validate_params", "update_state", "apply", "is_argmax_invariant"),
    ),
    "vllm.v1.sample.logits_processor:BatchUpdate": ("batch_size", "removed", "added", "moved"),
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor": (
        *("validate_params", "add_request", "apply_staged_writes", "apply"),
    ),
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsContext": (
        *("idx_mapping_np", "expanded_idx_mapping", "expanded_local_pos", "pos", "input_ids"),
        *("seq_lens_upper_bound_np",),
    ),
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcRequestState": (
        *("device", "max_num_reqs", "prefill_len", "prompt_len", "total_len", "all_token_ids"),
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "num_reqs",
        "idx_mapping",
        "idx_mapping_np",
        "seq_lens_cpu_upper_bound",
    ),
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": ("init_cudagraph_manager", "capture", "propose"),
    "vllm.v1.worker.gpu.attn_utils:AttentionCGSupportInfo": ("min_cg_support", "min_cg_attn_backend"),
    "vllm.v1.worker.workspace:WorkspaceManager": ("_current_workspaces",),
    "vllm.v1.worker.utils:AttentionGroup": (
        *("layer_names", "backend", "build_metadata", "build_metadata_for_cudagraph_capture"),
        *("supports_draft_decode_metadata_update", "update_draft_decode_metadata"),
    ),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": ("soft_cap", "scale"),
    "vllm.config:ModelConfig": (
        *("is_attention_free", "is_hybrid", "is_encoder_decoder", "attention_chunk_size"),
        *("architectures", "try_get_generation_config", "get_and_verify_max_len"),
    ),
    "vllm.config:VllmConfig": (
        *("additional_config", "use_v2_model_runner", "num_speculative_tokens"),
        "_get_v2_model_runner_unsupported_features",
    ),
    "vllm.model_executor.model_loader:DefaultModelLoader": ("_prepare_weights", "_get_weights_iterator"),
    "vllm.v1.engine.input_processor:InputProcessor": ("process_inputs", "_validate_params", "vllm_config"),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": (
        *("to_sampling_params", "to_beam_search_params", "vllm_xargs", "cache_salt"),
    ),
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest": (
        *("to_sampling_params", "to_beam_search_params", "vllm_xargs", "cache_salt"),
    ),
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest": ("to_sampling_params", "vllm_xargs", "cache_salt"),
    "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens": ("serve_tokens",),
}
"""Class or module -> the methods and fields that we use."""


def parameters() -> dict[str, tuple[str, ...]]:
    """Function -> the parameters that we give it, on the installed release."""
    return PARAMETERS | releases.PARAMETERS[releases.nearest(releases.version())]


@cache
def imported() -> frozenset[str]:
    """``module:name`` of all that our sources import from every vLLM."""
    sources = set(Path(__file__).parent.rglob("*.py")) - {Path(releases.__file__)}
    trees = (ast.parse(path.read_text("utf-8")) for path in sorted(sources))
    return frozenset(
        f"{node.module}:{alias.name}"
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm" and not node.level
        for alias in node.names
    )


def names() -> list[str]:
    """``module:name`` of everything that is checked."""
    return sorted(imported() | parameters().keys() | MEMBERS.keys())


def moved() -> Iterator[str]:
    """What the installed vLLM no longer has, one line each."""
    wanted = parameters()
    for name in names():
        try:
            found = _find(name)
        except Exception as error:
            yield f"{name}: {one_line(error)}"
            continue
        if missing := [parameter for parameter in wanted.get(name, ()) if not _takes(found, parameter)]:
            yield f"{name}: takes no {', '.join(missing)}"
        if missing := [member for member in MEMBERS.get(name, ()) if not _has(found, member)]:
            yield f"{name}: has no {', '.join(missing)}"


def is_tested(number: str) -> bool:
    """Whether pad-vllm was tested with this version of vLLM."""
    return ".".join(number.split(".")[:2]) in releases.TESTED


def check_version() -> None:
    """Refuse to guide on an untested vLLM.

    Raises:
        ValueError: what is tested, what moved, and how to start all the same.
    """
    number = releases.version()
    if is_tested(number):
        return
    lost = "; ".join(moved())
    words = f"pad-vllm is tested with vLLM {' and '.join(releases.TESTED)}, but this is {number}. " + (
        f"These internals of vLLM that it uses have moved: {lost}."
        if lost
        else "None of the internals that it uses has moved."
    )
    if os.environ.get(ALLOW_UNTESTED) != "1":
        raise ValueError(f"{words} Set {ALLOW_UNTESTED}=1 to start anyway")
    logger.warning(words)


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except AttributeError:
        return import_module(f"{module}.{attribute}")  # a module, as `from vllm import envs`


def _takes(function: Any, parameter: str) -> bool:
    function = getattr(function, "fn", function)  # of a Triton kernel
    return parameter in inspect.signature(function).parameters


def _has(cls: Any, member: str) -> bool:
    bases = getattr(cls, "__mro__", ())  # none of a module
    if hasattr(cls, member) or any(member in vars(base).get("__annotations__", {}) for base in bases):
        return True
    return bool(re.search(rf"self\.{member}(:| =|\[:\] =)", inspect.getsource(cls)))  # assigned when an object is made
