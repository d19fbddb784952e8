"""``pad.json``: the defaults that a reward model brings; and the beta that it should not meet untrained."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from pad_vllm.commands.check import print_report
from pad_vllm.config import PADConfig
from pad_vllm.reward.folder import read_defaults, write_defaults
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE
from pad_vllm.worker.compatibility import beta_warning

OWN = {"prompt_template": "{preference}: {prompt}", "insert_after": "<|user|>", "beta": 0.5, "top_k": 20}
OWN["max_divergence"] = 0.3


@pytest.fixture
def folder(tmp_path):
    write_defaults(tmp_path, OWN)
    return tmp_path


def configure(folder, **pad) -> PADConfig:
    return PADConfig.from_additional_config({"pad": {"reward_model": str(folder), **pad}})


def test_the_servers_configuration_overrides_the_reward_models(folder):
    config = configure(folder)
    assert {key: getattr(config, key) for key in OWN} == OWN
    assert (config.reference, config.why_reference) == ("base", "beside it is pad.json: it was made for guidance")
    given = configure(folder, beta=1.5, insert_after=None, prompt_template=None, reference="none")
    assert (given.beta, given.top_k, given.reference) == (1.5, 20, "none")
    assert (given.insert_after, given.prompt_template) == (None, DEFAULT_PROMPT_TEMPLATE)


def test_the_reference_follows_from_what_the_reward_model_says_of_itself(models, folder, tmp_path):
    """Nobody said it: a model that was never made for guidance says only what the preference changes."""
    plain, headed = configure(models.reward), configure(models.named)
    assert (plain.reference, headed.reference) == ("neutral", "base")
    assert plain.why_reference == "neither pad.json nor value heads beside it say that it was made for guidance"
    assert headed.why_reference == "beside it are value heads: it was made for guidance"
    assert configure(models.reward, heads="heads.safetensors").reference == "base"
    assert configure(models.reward, reference=None).reference == "neutral"
    assert configure(models.reward, reference="base").why_reference == "as configured"
    write_defaults(tmp_path, {"reference": "none"})
    said = configure(tmp_path)
    assert (said.reference, said.why_reference) == ("none", "pad.json says so")


def test_the_served_model_is_not_asked_for_at_a_hub(models, monkeypatch):
    """Where none is served yet, as in ``pad-vllm check`` without a base."""

    def asked(*_, **__):
        raise AssertionError("a hub is asked for a model called 'base'")

    monkeypatch.setattr("pad_vllm.reward.folder.cached_file", asked)
    config = configure("base", adapters={"warm": "somewhere"})
    assert (config.source.model, config.source.is_served) == ("base", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "pad.json: cannot be read"),
        ("[]", "pad.json: must be an object, not list"),
        ('{"max_top_k": 3}', "pad.json: max_top_k: no such key; a reward model may set prompt_template, insert_after"),
        ('{"beta": "strong"}', "pad.json: pad.beta='strong'"),
        ('{"prompt_template": "{prompt}"}', "pad.json: pad.prompt_template='{prompt}': must contain {preference}"),
        ('{"max_divergence": -1}', "pad.json: pad.max_divergence=-1: must be between 0 and 1000"),
        ('{"top_k": 65}', "pad.json: pad.top_k=65: must be between 1 and 64"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, words):
    (tmp_path / "pad.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        configure(tmp_path)


def test_what_the_server_got_wrong_is_not_the_files_fault(folder):
    with pytest.raises(ValueError, match=r"^pad\.beta=-1"):
        configure(folder, beta=-1)
    with pytest.raises(ValueError, match=r"^pad\.reward_model=3"):
        PADConfig.from_additional_config({"pad": {"reward_model": 3}})


def test_check_shows_where_the_preference_stands(models, capsys):
    pad = {"reward_model": str(models.reward), "personas": {"terse": {"preference": "be concise"}}, "reference": "base"}
    assert print_report(json.dumps(pad), str(models.base), 256) == 0
    out = capsys.readouterr().out
    assert "reads: '<s><|user|>[Guidelines] Your task" in out, out  # pytest cuts it
    assert "[Principles] be concise [Instruction] How do I keep tomatoes fresh?<|assistant|>'" in out
    assert "warning: With pad.reference 'base' and pad.beta 1, the reward model alone" in out
    assert print_report(json.dumps(pad | {"beta": 0.8}), str(models.base), 256) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pad", "sizes", "is_trained", "words"),
    [
        ({}, (4096, 32, 4096, 32), True, None),
        ({}, (4096, 32, 4096, 32), False, "says that it was trained for this"),
        ({}, (4096, 32, 2048, 16), True, "about 8 times smaller than the base model"),
        ({}, (4096, 32, 2048, 20), True, None),
        ({"beta": 0.8}, (4096, 32, 512, 8), False, None),
        ({"reference": "none"}, (4096, 32, 512, 8), False, None),
    ],
)
def test_who_is_warned_of_beta(pad, sizes, is_trained, words):
    def model(hidden_size, layers):
        text_config = SimpleNamespace(num_hidden_layers=layers)
        return SimpleNamespace(hf_text_config=text_config, get_hidden_size=lambda: hidden_size)

    warning = beta_warning(PADConfig("reward", **pad), model(*sizes[2:]), model(*sizes[:2]), is_trained)
    assert warning is None if words is None else words in warning


def test_defaults_are_read_as_written(folder):
    assert read_defaults(folder / "pad.json") == OWN
