from __future__ import annotations

from pathlib import Path

import pytest

from pad_vllm.demo import recipe
from tests.support import synthetic


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache of models that has the trained synthetic ones."""
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.put_into(folder)
    return folder


@pytest.fixture
def short_contexts(monkeypatch):
    """A start runs a reward model's longest context once, which here is longer than all that is answered."""
    for name, value in {
        "max_model_len": 256,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 256 << 20,
    }.items():
        monkeypatch.setitem(recipe.ENGINE, name, value)
