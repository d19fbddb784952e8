"""What the frontend knows of its engines, and what it refuses."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm

from pad_vllm import PADLogitsProcessor, channel, plugin
from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.frontend import admission
from pad_vllm.reward.template import PromptTemplate
from tests.support.malformed import GOOD, malformed

pytestmark = pytest.mark.every_release

GUIDED = Announcement(
    True, personas=("alice",), num_preferences=(2,), head_names=("a", "b"), max_top_k=20, max_preference_tokens=8
)


class Owner:
    """Something that announcements live as long as."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(ANNOUNCE_DIR, str(tmp_path))
    return tmp_path


def validate(**extra_args) -> None:
    PADLogitsProcessor.validate_params(vllm.SamplingParams(extra_args=extra_args or None))


def test_an_announcement_lives_as_long_as_its_engine():
    owner = Owner()
    channel.announce(GUIDED, owner)
    assert list(channel.announced().values()) == [GUIDED]
    del owner
    gc.collect()
    assert channel.announced() == {}


def test_an_engine_that_was_killed_announces_nothing(folder):
    code = """if True:
        import time
        from pad_vllm.channel import Announcement, announce
        owner = type("Owner", (), {})()
        announce(Announcement(True, personas=("bob",)), owner)
        print("announced", flush=True)
        time.sleep(60)
    """
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert engine.stdout.readline() == "announced\n"
    assert [a.personas for a in channel.announced().values()] == [("bob",)]
    engine.kill()
    engine.wait()
    assert len(list(folder.glob("*.json"))) == 1
    assert channel.announced() == {}


def test_the_hook_makes_one_folder_for_all_processes(monkeypatch):
    monkeypatch.delenv(ANNOUNCE_DIR)
    plugin.register()
    folder = os.environ[ANNOUNCE_DIR]
    assert os.stat(folder).st_mode & 0o077 == 0
    plugin.register()
    assert os.environ[ANNOUNCE_DIR] == folder
    owner = Owner()
    channel.announce(GUIDED, owner)
    code = "from pad_vllm.channel import announced; print(len(announced()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_a_request_that_no_engine_would_guide_is_refused():
    validate()
    validate(other_plugin=1)
    validate(pad_cache_salt="by itself it asks for nothing")
    with pytest.raises(ValueError, match="pad_cache_salt=7: must be a string"):
        validate(pad_cache_salt=7)
    with pytest.raises(ValueError, match="no engine has announced PAD guidance"):
        validate(pad_beta=1.0)
    owner = Owner()
    channel.announce(Announcement(configured=False), owner)
    with pytest.raises(ValueError, match="runs without a reward model"):
        validate(pad_beta=1.0)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"pad_persona": "alise"}, "did you mean 'alice'"),
        ({"pad_top_k": 21}, "pad_top_k=21: must be between 1 and 20"),
        ({"pad_weights": [1.0, 2.0, 3.0]}, "3 weights for 2 value heads .a, b."),
        ({"pad_preference": "x"}, "no tokenizer"),
        ({"pad_beta": "x"}, "must be a number"),
    ],
)
def test_refused_by_what_the_engine_announced(extra_args, message):
    owner = Owner()
    channel.announce(GUIDED, owner)
    validate(pad_persona="alice", pad_top_k=20, pad_weights=[1, 2])
    with pytest.raises(ValueError, match=message):
        validate(**extra_args)


def test_too_many_biased_tokens_are_refused():
    """Model Runner V2 has room for 1024, and would raise in its worker, for everybody."""
    house = Announcement(True, personas=("house",), num_preferences=(1,), default_persona="house")
    for announcement, guided in ((GUIDED, {"extra_args": {"pad_beta": 1.0}}), (house, {})):
        owner = Owner()
        channel.announce(announcement, owner)
        fits, too_many = (dict.fromkeys(range(n), 1.0) for n in (1024, 1025))
        PADLogitsProcessor.validate_params(vllm.SamplingParams(logit_bias=fits, **guided))
        with pytest.raises(ValueError, match="logit_bias: 1025 tokens; a guided request may bias at most 1024"):
            PADLogitsProcessor.validate_params(vllm.SamplingParams(logit_bias=too_many, **guided))


def test_preferences_are_bounded_in_the_reward_models_tokens(models):
    owner = Owner()
    tokenizer = {"pretrained_model_name_or_path": str(models.reward)}
    template = "a {preference} b {prompt}"
    announcement = Announcement(True, max_preference_tokens=8, tokenizer=tokenizer, prompt_template=template)
    channel.announce(announcement, owner)
    validate(pad_preference="be concise")
    with pytest.raises(ValueError, match=r"pad_preference: \d+ tokens, at most 8 are allowed"):
        validate(pad_preference="be concise and 12345678")


def test_weights_are_held_against_the_preferences_that_a_persona_has():
    owner = Owner()
    channel.announce(GUIDED, owner)
    validate(pad_persona="alice", pad_preference_weights=[1, -0.5])
    for arguments in ({"pad_persona": "alice", "pad_preference_weights": [1]}, {"pad_preference_weights": [1, 2]}):
        with pytest.raises(ValueError, match="pad_preference_weights: "):
            validate(**arguments)


def test_preferences_are_bounded_together(models):
    owner = Owner()
    tokenizer, template = {"pretrained_model_name_or_path": str(models.reward)}, "a {preference} b {prompt}"
    announcement = Announcement(True, max_preference_tokens=900, tokenizer=tokenizer, prompt_template=template)
    channel.announce(announcement, owner)
    text = "concise " * 140
    validate(pad_preference=[text] * 2)
    with pytest.raises(ValueError, match=r"pad_preference: \d+ tokens in 8 preferences, at most 1024 are allowed"):
        validate(pad_preference=[text] * 8)


def test_several_engines_behind_one_frontend_accept_what_one_of_them_accepts():
    first, second = Owner(), Owner()
    channel.announce(GUIDED, first)
    channel.announce(Announcement(True, personas=("bob",), max_top_k=5), second)
    validate(pad_persona="bob")
    validate(pad_persona="alice")
    with pytest.raises(ValueError, match="pad_persona='carol'"):
        validate(pad_persona="carol")


@pytest.mark.one_release
def test_ten_thousand_malformed_requests_are_refused(models):
    owner, rng = Owner(), random.Random(0)
    tokenizer = {"pretrained_model_name_or_path": str(models.reward)}
    template = "a {preference} b {prompt}"
    announcement = Announcement(True, ("terse",), ("a", "b", "c"), 20, 200, tokenizer, template)
    channel.announce(announcement, owner)
    validate(pad_persona="terse", pad_weights=[1, 2, 3.0], **GOOD)
    for _ in range(10_000):
        arguments = malformed(rng, num_heads=3, max_top_k=20)
        with pytest.raises(ValueError, match=r"(?i)pad"):
            validate(**arguments)
    validate(pad_persona="terse", pad_weights=[1, 2, 3.0], **GOOD)


def test_preferences_that_were_refused_are_not_kept(models):
    template = PromptTemplate(models.tokenizer, "{preference} {prompt}")
    template.max_preference_tokens = 8
    for i in range(20):
        with pytest.raises(ValueError, match="at most 8 are allowed"):
            template.encode_preference("one two three four five " * (9 + i))
    template.encode_preference("be brief")
    assert template.encode_preference.cache_info().currsize == 1


def test_an_engine_is_asked_by_its_own_frontend(monkeypatch):
    first, second = Owner(), Owner()
    channel.announce(GUIDED, first)
    channel.announce(Announcement(True, personas=("bob",), instance_id="second"), second)
    config = SimpleNamespace(instance_id="second", speculative_config=None, use_v2_model_runner=False)
    monkeypatch.setattr(admission, "_engine_of_this_request", lambda: config)
    validate(pad_persona="bob")
    with pytest.raises(ValueError, match="no such persona"):
        validate(pad_persona="alice")
    config.speculative_config = object()
    with pytest.raises(ValueError, match="Speculative decoding on the V1 runner drops logits processors"):
        validate(pad_persona="bob")


def test_folders_of_killed_processes_are_swept(monkeypatch, tmp_path):
    monkeypatch.delenv(ANNOUNCE_DIR)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """if True:
        import os, time
        from pad_vllm.channel import ANNOUNCE_DIR, make_folder
        make_folder()
        print(os.environ[ANNOUNCE_DIR], flush=True)
        time.sleep(60)
    """
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    folder = Path(process.stdout.readline().strip())
    channel._sweep(tmp_path)
    assert folder.is_dir()
    process.kill()
    process.wait()
    channel._sweep(tmp_path)
    assert not folder.exists()
