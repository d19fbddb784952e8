"""Which reward models fit a base: tokens of one family, and formats of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

from pad_vllm.config import PADConfig
from pad_vllm.worker.compatibility import load_model_config
from pad_vllm.worker.tokens import check_vocabulary, load_tokenizer
from tests.support.models import make_tokenizer

CONTROL = ["<think>", "</think>", "<tool_response>"]
KNOWN = len(make_tokenizer())
"""First id of tokens that are added to the tests' tokenizer."""


def save(path: Path, model: Path, more: tuple[str, ...] = (), renamed: dict[str, str] | None = None, **roles) -> Path:
    """A model's folder with another tokenizer: ``more`` added tokens, some renamed where they are, other roles."""
    path.mkdir()
    for file in model.iterdir():
        if not file.name.startswith("tokenizer"):
            (path / file.name).symlink_to(file)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / name).read_text()
        for old, new in (renamed or {}).items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (path / name).write_text(json.dumps(json.loads(text) | (roles if name == "tokenizer_config.json" else {})))
    return path


def shared(base: Path, reward: Path, num_rows: int = KNOWN):
    """What the start of an engine finds out about two tokenizers."""
    base_config = EngineArgs(str(base)).create_model_config()
    config = PADConfig(reward_model=str(reward))
    reward_config = EngineArgs(str(reward)).create_model_config()
    arguments = {"pretrained_model_name_or_path": str(reward)}
    tokens = load_tokenizer(config, arguments, base_config, reward_config, num_rows)
    assert check_vocabulary(str(reward), num_rows, 520, tokens) == min(num_rows, 520)
    return tokens


@pytest.mark.parametrize(
    ("base", "reward", "foreign", "words"),
    [
        ({}, {"more": ["<extra_pad>"]}, {}, "same tokens"),
        ({"more": ["<extra_pad>"]}, {}, {KNOWN: "<extra_pad>"}, "same tokens but '<extra_pad>'"),
        ({"more": CONTROL}, {"more": CONTROL[:1]}, dict(enumerate(CONTROL, KNOWN)), "'<tool_response>' ("),
        ({"renamed": {"<|user|>": "<|reserved_3|>"}}, {}, {3: "<|reserved_3|>"}, "'<|reserved_3|>' (3)"),
        ({}, {"renamed": {"<|user|>": "<|reserved_3|>"}}, {3: "<|user|>"}, "'<|user|>' (3)"),
        ({}, {"renamed": {"<pad>": "<|padding|>"}}, {}, "same tokens"),
        ({}, {"renamed": {"</s>": "<|end|>"}}, {}, "same tokens"),
    ],
)
def test_tokens_of_one_family(models, tmp_path, base, reward, foreign, words):
    """A reward tokenizer with a pad token of its own and no row for it, a base with one more, a reserved token under
    another name, control tokens of the next generation; a token with the same part to play has a counterpart."""
    tokens = shared(save(tmp_path / "base", models.base, **base), save(tmp_path / "reward", models.reward, **reward))
    assert tokens.foreign == foreign
    assert words in str(tokens)


def test_control_tokens_that_have_rows_are_shared(models, tmp_path):
    base, reward = (save(tmp_path / name, models.base, CONTROL[:n]) for name, n in (("base", 3), ("reward", 2)))
    assert shared(base, reward, num_rows=512).foreign == {KNOWN + 2: "<tool_response>"}


def test_another_end_of_turn_is_refused(models, tmp_path):
    """A guided request would never end."""
    base = save(tmp_path / "base", models.base, renamed={"</s>": "<|end|>"})
    reward = save(tmp_path / "reward", models.reward, eos_token="<|user|>")
    with pytest.raises(ValueError, match=r"none of the base model's end tokens \('<\|end\|>' \(1\)\)"):
        shared(base, reward)


def test_the_bases_format_is_not_the_reward_models(models):
    """A base in Mistral's format beside a reward model in the hub's."""
    base = EngineArgs(str(models.base)).create_model_config()
    base.config_format = "mistral"
    found = load_model_config(PADConfig(reward_model=str(models.reward)), base)
    assert found.get_vocab_size() == 512
    assert AutoTokenizer.from_pretrained(models.reward).get_vocab()["</s>"] == 1
