"""Folders that are no reward model, as transformers and PEFT write them: said in one paragraph, by their files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pad_vllm.commands.check import print_report
from pad_vllm.reward.kind import check_causal_lm
from pad_vllm.training.fit import load_reward_model
from pad_vllm.training.settings import TrainingConfig
from pad_vllm.training.train import train

FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "gemma3_text", "opt", "bloom", "phi")


def copy(models, folder: Path) -> Path:
    """The reward model's folder, to take something away from."""
    shutil.copytree(models.reward, folder)
    return folder


def classifier(models, folder: Path) -> Path:
    copy(models, folder)
    AutoModelForSequenceClassification.from_pretrained(models.reward, num_labels=1).save_pretrained(folder)
    return folder


def backbone(models, folder: Path) -> Path:
    copy(models, folder)
    AutoModel.from_pretrained(models.reward).save_pretrained(folder)
    return folder


def headless(models, folder: Path) -> Path:
    """One that says that it is a causal language model, and has lost its head."""
    tensors = load_file(copy(models, folder) / "model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if "lm_head" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def adapter(models, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(models.reward)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def gguf(models, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(models.reward / "config.json", folder)
    (folder / "model.Q4_1.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    return folder


def value_head(models, folder: Path) -> Path:
    tensors = load_file(copy(models, folder) / "model.safetensors")
    tensors["v_head.summary.weight"] = torch.zeros(64, 64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def damaged(models, folder: Path) -> Path:
    whole = (copy(models, folder) / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


KINDS = [
    (classifier, "is a classifier (LlamaForSequenceClassification), and its weights hold 'score.weight'"),
    (
        backbone,
        "is a backbone without an output head (LlamaModel): none of its 20 tensors is one, such as lm_head.weight",
    ),
    (headless, "is a backbone without an output head (LlamaForCausalLM)"),
    (gguf, "is in GGUF, which is not read here"),
    (value_head, "is a checkpoint with a value head among its weights (v_head.summary); `pad-vllm convert"),
    (damaged, "model.safetensors: cannot be read (Error while deserializing header"),
]


@pytest.mark.parametrize(("make", "words"), KINDS, ids=[make.__name__ for make, _ in KINDS])
def test_the_check_says_what_it_is_instead(make, words, models, tmp_path, capsys):
    folder = make(models, tmp_path / "reward")
    assert print_report(json.dumps({"reward_model": str(folder)}), None, None) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert line.startswith("FAILED  reward model: ")
    assert words in line
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_reward_model(str(folder), None, None)  # pad-vllm fit
    assert "\n" not in str(error.value)
    config = TrainingConfig(str(tmp_path / "none.jsonl"), str(models.reward), str(tmp_path / "out"), str(folder))
    with pytest.raises(ValueError, match=re.escape(words)):
        train(config, quiet=True)


def test_an_adapter_is_a_reward_model_and_no_base_to_train(models, tmp_path):
    """The check and fit read it, training says how it becomes a model."""
    folder = adapter(models, tmp_path / "reward")
    assert print_report(json.dumps({"reward_model": str(folder)}), None, None) == 0
    load_reward_model(str(folder), None, None)
    config = TrainingConfig(str(tmp_path / "none.jsonl"), str(folder), str(tmp_path / "out"))
    words = f"is an adapter (adapter_config.json), which holds what training added to {models.reward} and not"
    with pytest.raises(ValueError, match=re.escape(words)):
        train(config, quiet=True)


def test_gguf_may_be_named_by_its_file(models, tmp_path):
    file = gguf(models, tmp_path / "reward") / "model.Q4_1.gguf"
    with pytest.raises(ValueError, match=r"gguf' is in GGUF"):
        check_causal_lm(str(file))


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_told_apart_in_every_family(family, is_tied, is_sharded, tmp_path):
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=is_tied,
        **{"gpt2": {"n_head": 2}, "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16}}.get(family, {}),
    )
    for kind in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        folder = tmp_path / kind.__name__
        kind.from_config(config).save_pretrained(folder, **({"max_shard_size": "3KB"} if is_sharded else {}))
        assert (folder / "model.safetensors.index.json").exists() == is_sharded
        if kind is AutoModelForCausalLM:
            check_causal_lm(str(folder))
        else:
            says = "a backbone without an output head" if kind is AutoModel else "a classifier"
            with pytest.raises(
                ValueError, match=f"is {says} .{json.loads((folder / 'config.json').read_text())['architectures'][0]}"
            ):
                check_causal_lm(str(folder))


def test_what_cannot_be_told_is_for_who_loads_it(models, tmp_path):
    check_causal_lm("/nowhere")
    check_causal_lm(str(tmp_path))
    for model in (models.base, models.reward, models.released, models.named):
        check_causal_lm(str(model))
    old = copy(models, tmp_path / "old")
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (old / "model.safetensors").unlink()
    check_causal_lm(str(old))
