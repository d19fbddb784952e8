"""``pad-vllm check``, and the refusal of a vLLM that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

import pad_vllm
from pad_vllm import internals, releases
from pad_vllm.cli import main
from pad_vllm.commands.check import print_report
from tests.support.models import make_adapter, make_model
from tests.support.tokenizers import CHATML, TURNS, make

pytestmark = pytest.mark.every_release


@pytest.fixture(scope="module")
def config(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("check") / "pad.yaml"
    path.write_text(
        f"reward_model: {models.named}\npersonas:\n  terse: {{preference: concise}}\n  mixed: {{weights: [1, 0, 2]}}\n"
    )
    return path


def test_the_command(models, config, capsys):
    """Everything is there, and so the exit status is 0; `tests/served/test_docs.py` runs it as a user does."""
    with pytest.raises(SystemExit) as ended:
        main(["check", str(config), "--model", str(models.base), "--max-model-len", "256"])
    printed = capsys.readouterr().out
    assert (ended.value.code, "FAILED" in printed) == (0, False), printed
    for words in (
        f"pad-vllm: {pad_vllm.__version__}; Python 3.",
        f"vLLM: {releases.version()}",
        "names that pad-vllm uses are there",
        "guidance kernels: reference",
        "runner: V1",
        "persona 'mixed': pad_weights=[1.0, 0.0, 2.0]",
        "heads: concise, formal, playful",
        "base model: base: same tokens; runner V1; 256 tokens of context",
    ):
        assert words in printed


def test_arguments_that_check_nothing_are_refused(models, config, capsys):
    for arguments, words in (
        ([str(config), "--model", str(models.base), "--engine-args", "[1]"], "--engine-args '[1]': must be an object"),
        ([str(config), "--model", str(models.base), "--engine-args", "{"], "--engine-args '{' is not JSON"),
        (["--model", str(models.base)], "checks that a configuration fits a model; give the configuration too"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["check", *arguments])
        assert ended.value.code == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beat": 1}, "pad.beat: no such key; did you mean 'beta'?"),
        ({"reward_model": "/nowhere"}, "pad.reward_model='/nowhere' cannot be read"),
        ({"personas": {"a": {"weights": [1]}}}, "pad.personas['a']: pad_weights: 1 weights for 3 value heads"),
        ({"personas": {"a": {"preference": "word " * 2000}}}, "pad.personas['a']: pad_preference: "),
        ({"personas": "gone.yaml"}, "pad.personas='gone.yaml': cannot be read"),
        ({"dtype": "float17"}, "cannot be loaded"),
        ({"quantization": "gptqq"}, "cannot be loaded"),
    ],
)
def test_a_bad_configuration_is_named(models, capsys, change, words):
    assert print_report(json.dumps({"reward_model": str(models.named)} | change), None, None) == 1
    assert words in capsys.readouterr().out


def test_one_set_of_weights(models, tmp_path, capsys):
    """An adapter by itself, over the base that it names and over another one; and the served model itself."""
    make_adapter(tmp_path / "adapter", models.base, seed=0, rank=2, targets=["q_proj"])
    named, served = {"reward_model": str(tmp_path / "adapter")}, {"reward_model": "base"}
    shares = "the reward model shares its weights"
    for pad, base, words in (
        (
            named,
            models.base,
            ["the served model itself, through the adapter", f"base model: base: {shares}; same tokens"],
        ),
        (named, models.reward, [f"an adapter for {models.base}: llama", "base model: reward: same tokens"]),
        (served, models.base, ["the served model itself", f"base model: base: {shares}; same tokens"]),
    ):
        assert print_report(json.dumps(pad), str(base), 256) == 0, capsys.readouterr().out
        out = capsys.readouterr().out
        assert all(word in out for word in words), out
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert print_report(json.dumps(named), None, None) == 1
    assert "no weights in this folder" in capsys.readouterr().out


def test_fewer_positions_than_requests_may_have_are_said(models, config, capsys):
    assert print_report(str(config), str(models.base), 1024) == 0
    words = r"1,024 tokens of context, and preferences of up to 4\d\d; a guided request has room for \d\d fewer"
    assert re.search(words, capsys.readouterr().out)


@pytest.mark.one_release
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"personas": {"a": {"preference": "word " * 600}}}, "pad.personas['a']: pad_preference: "),
        ({"kv_cache_memory_bytes": 1}, "pad.kv_cache_memory_bytes=1: one context of 1024 tokens takes"),
        ({"quantization": "gptq"}, "cannot be loaded"),
    ],
)
def test_what_only_the_engine_shows_is_named(models, capsys, change, words):
    assert print_report(json.dumps({"reward_model": str(models.named)} | change), str(models.base), 950) == 1
    assert words in capsys.readouterr().out


@pytest.mark.one_release
def test_the_served_model_and_its_adapters_are_shown(models, tmp_path, capsys):
    """With what serves it, and without."""
    make_adapter(tmp_path / "mine", models.base, seed=1, rank=2, targets=["q_proj"])
    pad = {"reward_model": "base", "adapters": {"mine": str(tmp_path / "mine")}}
    for model in (None, str(models.base)):
        assert print_report(json.dumps(pad), model, 256) == 0
        printed = capsys.readouterr().out
        assert "reward model: the served model itself; adapters: mine" in printed
    assert "base model: base: the reward model shares its weights; same tokens" in printed


def test_an_architecture_that_cannot_be_a_reward_model_is_named(models, tmp_path, capsys):
    config = AutoConfig.for_model("jamba", architectures=["JambaForCausalLM"], vocab_size=512, eos_token_id=1)
    config.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(models.reward / name)
    assert print_report(json.dumps({"reward_model": str(tmp_path)}), None, None) == 1
    assert "JambaForCausalLM cannot be a reward model: its layers, or some, keep a recurrent" in capsys.readouterr().out


def test_broken_folders_are_named(models, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((models.named / name).read_bytes())
    assert print_report(json.dumps({"reward_model": str(tmp_path / "bare")}), None, None) == 1
    assert "no weights in this folder" in capsys.readouterr().out
    (tmp_path / "bare" / "model.safetensors").symlink_to(models.named / "model.safetensors")
    (tmp_path / "bare" / "heads.safetensors").write_bytes(b"no heads")
    assert print_report(json.dumps({"reward_model": str(tmp_path / "bare")}), None, None) == 1
    assert "heads.safetensors cannot be read" in capsys.readouterr().out


def test_what_moved_is_named(monkeypatch, capsys):
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.worker.gpu import attn_utils

    # What is imported only without these names would be missing too.
    assert print_report(None, None, None) == 0
    capsys.readouterr()
    monkeypatch.delattr(BlockPool, "touch")
    monkeypatch.delattr(attn_utils, "init_kv_cache")
    monkeypatch.setattr(attn_utils, "get_kv_cache_spec", lambda config: {})
    assert print_report(None, None, None) == 1
    out = capsys.readouterr().out
    assert "vllm.v1.core.block_pool:BlockPool: has no touch" in out
    assert "vllm.v1.worker.gpu.attn_utils:init_kv_cache: " in out
    assert "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec: takes no vllm_config" in out
    assert out.count("\n          vllm.") == 3


def test_an_untested_vllm_is_refused_unless_allowed(monkeypatch, capsys):
    installed = releases.PARAMETERS[releases.nearest(releases.version())]
    monkeypatch.setitem(releases.PARAMETERS, releases.TESTED[-1], installed)  # by which a newer one is judged
    monkeypatch.delenv(internals.ALLOW_UNTESTED, raising=False)  # as `make vllm-newest` has it
    monkeypatch.setattr(releases, "version", lambda: "0.41.2")
    with pytest.raises(ValueError, match=r"with vLLM 0\.32 and 0\.33, but this is 0\.41\.2\. None of the internals"):
        internals.check_version()
    assert print_report(None, None, None) == 1
    assert "FAILED  vLLM: 0.41.2, but pad-vllm is tested with 0.32 and 0.33" in capsys.readouterr().out
    monkeypatch.setenv(internals.ALLOW_UNTESTED, "1")
    internals.check_version()
    assert print_report(None, None, None) == 0


def test_every_import_from_vllm_is_checked():
    assert {"vllm.v1.core.block_pool:BlockPool", "vllm:envs"} <= internals.imported()
    assert internals.imported() <= set(internals.names())


def test_another_tokenizer_and_a_translated_prompt_are_shown(models, tmp_path, capsys):
    base, reward = make_model(tmp_path / "base", 0, vocab_size=600), make_model(tmp_path / "reward", 1, vocab_size=900)
    make("byte-level", 600, CHATML).save_pretrained(base)
    make("replace", 900, TURNS).save_pretrained(reward)
    assert print_report(json.dumps({"reward_model": str(reward)}), str(base), 256) == 0
    shown = capsys.readouterr().out
    assert "another tokenizer: " in shown
    assert "of the base model's 600 tokens can be candidates" in shown
    assert "reads: '<s><start_of_turn>user\\n[Guidelines] Your task" in shown
    assert "[Instruction] How do I keep tomatoes fresh?<end_of_turn>\\n<start_of_turn>model\\n'" in shown
