"""Which reward models fit a base: tokens of one family, and formats of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

from pad_vllm.config import PADConfig
from pad_vllm.worker.compatibility import load_model_config
from pad_vllm.worker.tokens import check_vocabulary, load_shared_tokens
from tests.support.models import make_model, make_tokenizer
from tests.support.tokenizers import CHATML, like_gemma, like_qwen

CONTROL = ["<think>", "</think>", "<tool_response>"]
KNOWN = len(make_tokenizer())
"""First id of tokens that are added to the tests' tokenizer."""


def save(path: Path, model: Path, more: tuple[str, ...] = (), renamed: dict[str, str] | None = None, **roles) -> Path:
    """A model's folder with another tokenizer: ``more`` added tokens, some renamed where they are, other roles."""
    path.mkdir()
    for file in model.iterdir():  # what is written to a link would be written to the model of all tests
        if file.suffix == ".safetensors":
            (path / file.name).symlink_to(file)
        else:
            shutil.copy(file, path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / name).read_text()
        for old, new in (renamed or {}).items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (path / name).write_text(json.dumps(json.loads(text) | (roles if name == "tokenizer_config.json" else {})))
    return path


def load(base: Path, reward: Path, num_rows: int):
    base_config = EngineArgs(str(base)).create_model_config()
    reward_config = EngineArgs(str(reward)).create_model_config()
    arguments = {"pretrained_model_name_or_path": str(reward)}
    return load_shared_tokens(PADConfig(reward_model=str(reward)), arguments, base_config, reward_config, num_rows)


def shared(base: Path, reward: Path, num_rows: int = KNOWN):
    """What the start of an engine finds out about two tokenizers."""
    tokens = load(base, reward, num_rows)
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
    with pytest.raises(ValueError, match=r"does not know any end token of the base model \('<\|end\|>' \(1\)\)"):
        shared(base, reward)


def test_the_bases_format_is_not_the_reward_models(models):
    """A base in Mistral's format beside a reward model in the hub's."""
    base = EngineArgs(str(models.base)).create_model_config()
    base.config_format = "mistral"
    found = load_model_config(PADConfig(reward_model=str(models.reward)), base)
    assert found.get_vocab_size() == 512
    assert AutoTokenizer.from_pretrained(models.reward).get_vocab()["</s>"] == 1


def test_what_the_template_writes_behind_an_answer_must_be_known(models, tmp_path):
    """A base fine-tuned to ChatML, beside a sibling that shares another end: guided, its answers would not end."""
    base = save(tmp_path / "base", models.base, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    (base / "chat_template.jinja").write_text(CHATML)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, KNOWN + 1]}))
    reward = save(tmp_path / "reward", models.reward)
    with pytest.raises(ValueError, match=rf"template ends an answer with '<\|im_end\|>' \({KNOWN + 1}\)"):
        shared(base, reward)
    both = save(tmp_path / "both", models.reward, ("<|im_start|>", "<|im_end|>"))
    assert KNOWN + 1 not in shared(base, both, num_rows=512).foreign


def test_with_another_tokenizer_what_the_template_writes_is_an_end(models, tmp_path):
    """Whatever the generation configs name."""
    vocabulary, theirs = like_qwen().get_vocab(), like_gemma().get_vocab()
    base = make_model(tmp_path / "base", seed=0, vocab_size=700, eos_token_id=vocabulary["<|endoftext|>"])
    like_qwen(eos_token="<|endoftext|>").save_pretrained(base)
    reward = make_model(tmp_path / "reward", seed=1, vocab_size=1000)
    like_gemma().save_pretrained(reward)
    tokens = load(base, reward, 1000)
    tables = tokens.pair.tables
    for end in ("<|im_end|>", "<|endoftext|>"):
        assert tables.key[vocabulary[end]] == theirs["</s>"]
    begin, end = tables.member_starts[theirs["</s>"] :][:2]
    assert tables.members[begin:end].tolist() == sorted([theirs["</s>"], theirs["<end_of_turn>"]])
    assert vocabulary["<|im_start|>"] in tokens.no_candidates


@pytest.mark.slow
def test_a_longrope_model_is_taken_at_its_long_length(models, tmp_path):
    """As Phi-3's: vLLM takes it at its first length unless it is asked for more."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 10000.0}
    reward = make_model(
        tmp_path / "reward",
        seed=1,
        model_type="phi3",
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        pad_token_id=2,
        rope_parameters=factors,
    )
    base = EngineArgs(str(models.base)).create_model_config()
    assert EngineArgs(str(reward)).create_model_config().max_model_len == 64
    assert load_model_config(PADConfig(reward_model=str(reward)), base).max_model_len == 512
