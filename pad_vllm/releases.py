"""What differs between the releases of vLLM: the one place where one is told from another.

:data:`TESTED` names the releases that the tests run. To take in the next one, ``make vllm-newest`` says what moved: a
difference becomes a branch of a function here, and what it calls an entry in :data:`PARAMETERS`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

TESTED = ("0.32", "0.33")
"""Oldest first."""

PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "0.32": {
        "vllm.v1.core.kv_cache_utils:get_kv_cache_configs": ("vllm_config", "kv_cache_specs", "available_memory"),
    },
    "0.33": {
        "vllm.v1.core.kv_cache_planning:get_global_kv_cache_groups": ("vllm_config", "kv_cache_specs"),
        "vllm.v1.core.kv_cache_planning:get_kv_cache_configs": (
            *("vllm_config", "kv_cache_specs", "available_memory", "global_kv_cache_groups"),
        ),
    },
}
"""Release -> what only it is asked for: function -> the parameters that we give it."""


def version() -> str:
    """Of the installed vLLM."""
    import vllm

    return vllm.__version__


def release(number: str) -> tuple[int, ...]:
    """A version's release: (0, 33) of "0.33.1"; () of one that is not numbered."""
    return tuple(int(part) for part in re.findall(r"\d+", number)[:2])


def nearest(number: str) -> str:
    """The release in :data:`TESTED` by which a version is treated: the newest that is not newer."""
    return max((name for name in TESTED if release(name) <= release(number)), key=release, default=TESTED[-1])


def plan_kv_cache(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], num_bytes: int) -> KVCacheConfig:
    """A KV cache of ``num_bytes`` for the layers of one worker.

    Args:
        specs: layer name -> what it keeps.
    """
    if nearest(version()) == "0.32":
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(vllm_config, [specs], [num_bytes])[0]
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

    groups = get_global_kv_cache_groups(vllm_config, [specs])
    return get_kv_cache_configs(vllm_config, [specs], [num_bytes], groups)[0]
