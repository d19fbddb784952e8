"""Registers, shared memory and spills of the kernels, compiled ahead of time: no GPU is needed.

    python -m benchmarks.kernel_resources [--output benchmarks/results/kernel-resources.json]

For A100 (sm_80), H100 and H200 (sm_90), B200 (sm_100) and MI300 (gfx942), with the sizes that the launcher takes by
default. ``ptxas`` and the AMD back end, as Triton brings them, report the figures.
"""

from __future__ import annotations

import argparse
import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pad_vllm.kernels import controls as undoing
from pad_vllm.kernels import (
    fused,
    fused_groups,
    fused_large_groups,
    fused_selection,
    fused_tracing,
    large_groups,
    mixture,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOP_KS = (16, 64)
"""What the launcher rounds k of 10, and the default max_top_k, up to; the larger one takes more, and is compiled for
all targets."""
WHOLE = "sm_90"
HELD = {"select", "score", "score groups"}
"""`make test` compiles every kernel for sm_90, with the larger K, and of the other targets the two whose registers are
limited, and one of groups; `make test-all` compiles all of all, which takes minutes."""
TRACE_VALUES = 12
"""Of a row, where requests may have nine contexts."""
SLICES = 32
"""Of 256,000 logits."""
TYPES = {
    **dict.fromkeys(("logits_ptr", "beta_ptr", "reference_ptr", "scores_ptr", "y_ptr", "mixed_ptr"), "*fp32"),
    **dict.fromkeys(("penalties_ptr", "logit_bias_ptr", "weights_ptr", "max_divergence_ptr"), "*fp32"),
    **dict.fromkeys(("rows_ptr", "top_k_ptr", "keys_ptr", "end_ids_ptr", "slots_ptr", "contexts_ptr"), "*i64"),
    **dict.fromkeys(("kept_ptr", "candidates_ptr", "out_ptr"), "*i64"),
    **dict.fromkeys(("output_rows_ptr", "output_begin_ptr", "output_end_ptr"), "*i64"),
    **dict.fromkeys(("num_bias_ptr", "bias_ids_ptr", "prompt_mask_ptr", "output_ptr", "draft_ids_ptr"), "*i32"),
    "arrivals_ptr": "*i32",
    **dict.fromkeys(("key_ptr", "groups_ptr", "members_ptr", "starts_ptr"), "*i32"),
    **dict.fromkeys(("large_ptr", "large_starts_ptr", "wanted_ptr", "blocks_ptr"), "*i32"),
    **dict.fromkeys(("large_scores_ptr",), "*fp32"),
    **dict.fromkeys(("hidden_ptr", "lm_head_ptr", "more_ptr", "bias_ptr"), "*bf16"),
    **dict.fromkeys(("soft_cap", "scale"), "fp32"),
    "no_opinion_ptr": "*i1",
    "key_offsets_ptr": "*i64",
    "values_ptr": "*fp32",
    **dict.fromkeys(("row_positions_ptr", "positions_ptr", "references_ptr"), "*i64"),
}
"""Of the arguments; all others are int32."""
SIZES = {"vocab_size", "num_cols", "hidden_size", "shard_size", "logits_stride", "hidden_stride", "lm_head_stride"}


def configurations(K: int):
    """(name, kernel, compile-time arguments, warps), as the launcher calls them."""
    one = {"HAS_MIXTURE": False, "HAS_SOFT_CAP": False, "weights_ptr": None, "no_opinion_ptr": None}
    no_more = dict.fromkeys(("more_ptr", "more_stride", "num_more"))
    capacity = 2 * K
    sizes = fused_selection.merge_constants(SLICES * capacity, capacity)
    score = {
        "K": K,
        "FEW": fused.FEW,
        **sizes,
        "BLOCK_D": fused.BLOCK_D,
        "HAS_BIAS": False,
        "OVERLAP": False,
        "contexts_ptr": None,
        **one,
        **no_more,
    }
    whole = score | {"bias_ptr": None, "NORMALIZE": True}
    mixed = {k: v for k, v in whole.items() if k not in ("contexts_ptr", "weights_ptr")} | {"HAS_MIXTURE": True}
    select = {"CAPACITY": capacity, "HEIGHT": fused_selection.HEIGHT, "WIDTH": fused_selection.WIDTH}
    select["OVERLAP"] = False
    yield "select", fused_selection.select_kernel, select, fused_selection.SELECT_WARPS
    yield "merge", fused_selection.merge_kernel, sizes, fused_selection.MERGE_WARPS
    yield "score", fused.score_kernel, whole, fused.SCORE_WARPS
    yield "mix", mixture.mix_kernel, {"BLOCK": mixture.BLOCK}, mixture.WARPS
    capped = mixed | {"HAS_SOFT_CAP": True, "BLOCK_D": fused.BLOCK_D // 2}
    yield "score, mixed, cap", fused.score_kernel, capped, fused.SCORE_WARPS
    silent = {k: v for k, v in capped.items() if k != "no_opinion_ptr"}
    yield "score, mixed, cap, silent", fused.score_kernel, silent, fused.SCORE_WARPS
    adapted = {name: value for name, value in whole.items() if name not in no_more}
    yield "score, adapters", fused.score_kernel, adapted, fused.SCORE_WARPS
    few = {"FEW": fused.FEW_OF_FEW, "BLOCK_D": fused.BLOCK_D_OF_FEW}
    yield "score, few rows", fused.score_kernel, whole | few, fused.SCORE_WARPS
    sharded = score | {"bias_ptr": None, "NORMALIZE": False}
    yield "score, sharded", fused.score_kernel, sharded, fused.SCORE_WARPS
    undo = {"K": K, "NUM_KEYS": K, "BLOCK": undoing.TILE // K, "HAS_PENALTIES": True}
    yield "undo controls", undoing.undo_controls_kernel, undo, undoing.WARPS
    for name, controls in (
        ("reweight, sharded", {"HAS_CONTROLS": False, "y_ptr": None}),
        ("reweight", {"HAS_CONTROLS": True}),
    ):
        yield name, fused.reweight_kernel, {"K": K} | controls | one, fused.REWEIGHT_WARPS
    yield from group_configurations(K, sizes)
    yield from trace_configurations(K)


def group_configurations(K: int, sizes: dict):
    """As :func:`configurations`, for a reward model with another tokenizer."""
    yield (
        "gather groups",
        fused_groups.gather_groups_kernel,
        {"K": K, "key_offsets_ptr": None} | sizes,
        fused_selection.MERGE_WARPS,
    )
    score = {"K": K, "PARTS": 1, "BLOCK_M": fused_groups.BLOCK_M, "BLOCK_D": fused_groups.BLOCK_D, "HAS_BIAS": False}
    score |= {"HAS_MIXTURE": False, "HAS_SOFT_CAP": False, "bias_ptr": None, "contexts_ptr": None, "weights_ptr": None}
    score |= dict.fromkeys(("more_ptr", "more_stride", "num_more"))
    yield "score groups", fused_groups.score_groups_kernel, score, fused_groups.SCORE_WARPS
    large = {name: value for name, value in score.items() if name != "PARTS"} | {"BLOCK_M": large_groups.BLOCK_M}
    large |= {"BLOCK_C": fused_large_groups.BLOCK_C, "BLOCK_D": fused_large_groups.BLOCK_D}
    for precision in ("tf32", "ieee"):
        name = f"score large groups, {precision}"
        yield name, fused_large_groups.score_large_kernel, large | {"PRECISION": precision}, fused_large_groups.WARPS
    reweight = {"K": K, "BLOCK_K": fused_groups.BLOCK_K, "HAS_CONTROLS": False, "HAS_MIXTURE": False}
    reweight |= {"ANY_SILENT": True, "y_ptr": None, "weights_ptr": None}
    yield "reweight groups", fused_groups.reweight_groups_kernel, reweight, fused_groups.REWEIGHT_WARPS


def trace_configurations(K: int):
    """As :func:`configurations`, where requests are traced."""
    no_more = dict.fromkeys(("more_ptr", "more_stride", "num_more"))
    score = {"K": K, "SCORED": fused_tracing.SCORED, "BLOCK_D": fused_tracing.BLOCK_D, "HAS_BIAS": False}
    score |= {"bias_ptr": None, **no_more}
    yield "score contexts", fused_tracing.score_contexts_kernel, score, fused_tracing.SCORE_WARPS
    trace = {"K": K, "VALUES": TRACE_VALUES, "WIDTH": 16, "BY_LOGITS_ROW": False, "HAS_CONTROLS": True}
    tokens = trace | {"HAS_SOFT_CAP": False, "no_opinion_ptr": None}
    yield "trace", fused_tracing.trace_kernel, tokens, fused_tracing.TRACE_WARPS
    groups = trace | {"NUM_OTHERS": fused_tracing.NUM_OTHERS}
    yield "trace groups", fused_tracing.trace_groups_kernel, groups, fused_tracing.TRACE_WARPS


def is_aligned(kernel: Any, name: str) -> bool:
    """Whether the launcher finds an argument divisible by 16, and has that compiled in: whatever PyTorch allocates, and
    the sizes of vocabularies and hidden states, as a rule."""
    parameter = next(parameter for parameter in kernel.params if parameter.name == name)
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return name.endswith("_ptr") or name in SIZES


def compile_ahead(kernel, constants: dict, num_warps: int, target: GPUTarget) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas said of it."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in names if name not in constants and is_aligned(kernel, name)]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": num_warps}
    limits = {
        fused_selection.select_kernel: fused_selection.SELECT_REGISTERS,
        fused.score_kernel: fused.SCORE_REGISTERS,
    }
    if kernel in limits and target.backend == "cuda":
        options["maxnreg"] = limits[kernel]
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(StringIO()) as said:
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel says nothing
        compiled = triton.compile(source, target=target, options=options)
    return compiled, said.getvalue()


def resources(compiled: Any, said: str, target: GPUTarget) -> dict[str, int]:
    """Registers of a thread, bytes that it spills to memory, bytes of shared memory of a program."""
    if target.backend == "hip":  # scalars are spilled to lanes of vector registers, and are none of memory
        figures = dict(re.findall(r"\.(\w+): +(\d+)", compiled.asm["amdgcn"]))
        registers, spilled = int(figures["vgpr_count"]), int(figures["private_segment_fixed_size"])
    else:
        registers = int(re.findall(r"Used (\d+) registers", said)[0])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)[0]))
    return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}


def is_held(target: str, kernel_name: str, K: int) -> bool:
    """Whether `make test` compiles a kernel."""
    return TOP_KS[-1] == K and (target == WHOLE or kernel_name in HELD)


def resources_of_all(all_of_all: bool = True) -> dict:
    rows = [
        {"target": name, "kernel": kernel_name, "K": K, "warps": warps}
        | resources(*compile_ahead(kernel, constants, warps, target), target)
        for name, target in TARGETS.items()
        for K in (TOP_KS if name == WHOLE else TOP_KS[-1:])
        for kernel_name, kernel, constants, warps in configurations(K)
        if all_of_all or is_held(name, kernel_name, K)
    ]
    return {"triton": triton.__version__, "unit": "registers a thread, bytes", "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    record = resources_of_all()
    columns = ("target", "kernel", "K", "warps", "registers", "spilled", "shared")
    print(("{:>22}" * len(columns)).format(*columns))
    for row in record["results"]:
        print("".join(f"{row[column]!s:>22}" for column in columns))
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
