"""What tests share: models, the oracle's answers, and this process as they find it."""

from __future__ import annotations

import functools
import logging as std_logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pad_vllm.reward.template import PromptTemplate
from tests import oracle
from tests.support.engine import CORES, preload_processes, set_environment
from tests.support.models import make_heads, make_model

set_environment("v1")
preload_processes()
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each worker's engines on a core of their own
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(CORES[int(worker.removeprefix("gw")) % len(CORES)])
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes to come
logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small lose by sharing

HEADS = ["concise", "formal", "playful"]
MIX = (0.7, -0.2, 0.5)
"""Weights of the named heads, wherever a test mixes them."""

MAX_TOKENS = 40
"""Of an answer where nothing more is wanted of its length: what it asks of a context's blocks, of 32 tokens, is more
than one."""


class Models:
    """Random base and reward models on disk, and as the oracle reads them."""

    def __init__(self, root: Path) -> None:
        self.base = make_model(root / "base", seed=0)
        self.reward = make_model(root / "reward", seed=1)
        self.released = make_model(root / "released", seed=1)
        make_heads(self.released / "value_head.safetensors", ["v_head.summary"])
        self.named = make_model(root / "named", seed=1)
        make_heads(self.named / "heads.safetensors", HEADS)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.base_model = AutoModelForCausalLM.from_pretrained(self.base)
        self.reward_model = AutoModelForCausalLM.from_pretrained(self.reward)
        released = load_file(self.released / "value_head.safetensors")
        named = load_file(self.named / "heads.safetensors")
        self.heads = {
            "released": oracle.mixed_head(released, {"v_head.summary": 1.0}),
            "mixed": oracle.mixed_head(named, dict(zip(HEADS, MIX, strict=True))),
        }

    @functools.cache  # noqa: B019 (one instance, as long as the tests)
    def ask(
        self, prompt: tuple, reward_prompt: tuple | None, head: str | None, guided: bool = True, **settings
    ) -> list[int]:
        return oracle.generate(
            self.base_model,
            list(prompt),
            reward=self.reward_model if guided else None,
            reward_prompt_ids=reward_prompt and [list(ids) for ids in reward_prompt],
            head=self.heads[head] if head else None,
            **settings,
        )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def log(caplog, monkeypatch):
    """``caplog`` of pad-vllm's own lines, whatever vLLM or a command has made of the loggers above."""
    logger = std_logging.getLogger("vllm.pad_vllm")
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(std_logging.INFO, logger=logger.name)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module", params=["v1", "v2"])
def runner(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def compose(models: Models) -> Callable:
    return PromptTemplate(models.tokenizer).compose


@pytest.fixture(scope="session")
def expect(models: Models, compose: Callable) -> Callable[..., list[int]]:
    """What a guided request should generate; the runners are held against the same answers, so each is asked once."""
    return make_expect(models, compose)


def make_expect(models: Models, compose: Callable) -> Callable[..., list[int]]:
    def ask(
        prompt, *, preference=None, preference_weights=None, head=None, max_tokens=MAX_TOKENS, **settings
    ) -> list[int]:
        texts = [preference] if isinstance(preference, str) else preference or []
        reward_prompt = tuple(tuple(compose(prompt, text)) for text in texts) or None
        weights = tuple(preference_weights) if preference_weights else None
        return models.ask(tuple(prompt), reward_prompt, head, max_tokens=max_tokens, weights=weights, **settings)

    return ask


@pytest.fixture(scope="session")
def encode(models: Models) -> Callable[[str], list[int]]:
    """Text -> token ids with a leading BOS, as a prompt."""
    return lambda text: models.tokenizer.encode("<s>" + text)
