"""Kernels are compiled side by side, by Triton's own compiler for an H100; there is no GPU to launch them on."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.engine import Worker


class H100:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_and_look(cache: str) -> tuple[int, int, list[str]]:
    """How many kernels a step compiles at once; how many are compiled when it is asked again; and which its launches
    would still compile."""
    os.environ["TRITON_CACHE_DIR"] = cache
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from benchmarks import kernel_problems
    from pad_vllm.kernels import fused
    from pad_vllm.kernels.compiling import compile_together

    driver.set_active(H100())

    def launch() -> None:
        for num_rows in (1, 17):
            of = kernel_problems.problem("guide", num_rows, 512, 64, 10, "cpu")
            of.run(fused.guide_, of.sources[0])

    num = compile_together(launch)
    CompiledKernel.launch_metadata = CompiledKernel.run = lambda *args: None  # nothing is launched
    again, missing = compile_together(launch), []
    knobs.runtime.jit_cache_hook = lambda *, repr, **_: missing.append(repr) or True
    launch()
    return num, again, missing


def test_launches_find_their_kernels_compiled(tmp_path: Path):
    worker = Worker("v1")
    try:
        num, again, missing = worker.run(compile_and_look, str(tmp_path))
    finally:
        worker.close()
    assert num >= 2
    assert (again, missing) == (0, [])
    binaries = {path.name for path in tmp_path.rglob("*.cubin")}
    assert {"select_kernel.cubin", "score_kernel.cubin"} <= binaries
