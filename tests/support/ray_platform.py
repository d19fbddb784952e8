"""A platform plugin of vLLM's, for tests: the CPU platform with the resource key that vLLM's Ray executor asks for, and
of which vLLM gives its CPU platform none. Ray is told that each of its nodes has one such device."""

from __future__ import annotations

from pathlib import Path

RESOURCE = "GPU"
"""Ray numbers no others but accelerators that it knows, and vLLM wants the numbers."""


def register() -> str:
    return f"{__name__}.RayPlatform"


def install(folder: Path) -> str:
    """Make ``folder`` one from which Python takes the plugin; returns what goes into PYTHONPATH."""
    metadata = folder / "ray_platform-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\nray = {__name__}:register\n")
    return f"{folder}:{Path(__file__).parents[2]}"


def __getattr__(name: str):
    """vLLM asks for the class once it knows that there is one."""
    if name != "RayPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    return type(name, (CpuPlatform,), {"ray_device_key": RESOURCE, "__module__": __name__})
