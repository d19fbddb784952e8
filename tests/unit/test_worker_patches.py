"""What is changed in vLLM's engine: its loaders show the model that they have loaded."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from pad_vllm.reward import served
from pad_vllm.worker import patches

pytestmark = pytest.mark.every_release


def test_a_module_is_seen_as_soon_as_it_is_imported(tmp_path, monkeypatch):
    """And is not imported for it."""
    (tmp_path / "seen_by_pad.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list = []
    patches.after_import("seen_by_pad", seen.append)
    patches.after_import("seen_by_pad", seen.append)  # the hook may run twice
    assert (seen, "seen_by_pad" in sys.modules) == ([], False)
    module = importlib.import_module("seen_by_pad")
    assert (seen, module.value) == ([module], 1)
    patches.after_import("seen_by_pad", seen.append)
    assert seen == [module, module]


def test_loaders_show_the_engines_model_and_no_draft_model(monkeypatch):
    from vllm.model_executor.model_loader import BaseModelLoader

    patches.install()
    patches.install()
    assert patches.shows_models()

    class Loader(BaseModelLoader):
        def __init__(self) -> None:
            pass

        def download_model(self, model_config) -> None: ...

        def load_weights(self, model, model_config) -> None: ...

    model, called = nn.Linear(2, 2), []
    original = BaseModelLoader.load_model.__wrapped__
    showing = patches._showing(lambda self, vllm_config, model_config, prefix="": model)
    assert not hasattr(original, "__wrapped_by_pad__")  # wrapped once
    config = SimpleNamespace(model_config=object())
    served.when_loaded(config, lambda: called.append(served.is_loaded(config)))
    assert showing(Loader(), vllm_config=config, model_config=object()) is model
    assert not served.is_loaded(config)
    assert showing(Loader(), vllm_config=config, model_config=config.model_config) is model
    assert called == [True]
    served.when_loaded(config, lambda: called.append(True))
    assert called == [True, True]
