"""Weights over adapters: what they are made of, which are found again, and what cannot be an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pad_vllm.cli import main
from pad_vllm.commands.options import assignments
from pad_vllm.config import PADConfig
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import encode, read_comparisons
from pad_vllm.training.fit import load_reward_model
from pad_vllm.training.mixture import fit_adapters, load_adapters, log_ratios
from pad_vllm.training.sliders import scorer_of
from tests.support.models import make_adapter
from tests.unit.test_sliders import logprob, write_comparisons

MADE = {
    "warm": {"seed": 11, "rank": 4, "targets": ["q_proj", "v_proj"]},
    "dry": {"seed": 12, "rank": 8, "targets": ["o_proj", "up_proj"]},
    "odd": {"seed": 13, "rank": 3, "targets": ["down_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    for name, how in MADE.items():
        make_adapter(root / name, models.base, **how)
    return {name: str(root / name) for name in MADE}


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory) -> list:
    root = tmp_path_factory.mktemp("merged")
    return [make_adapter(root / name, models.base, **how) for name, how in MADE.items()]


@torch.no_grad()
@pytest.mark.parametrize("headed", [False, True])
def test_log_ratios_are_those_of_merged_models(headed, models, adapters, merged, tmp_path):
    """By a plain loop, a token at a time; a single head applies, as in serving."""
    comparisons = read_comparisons(write_comparisons(tmp_path / "own.jsonl", 3))
    model, template = load_reward_model(str(models.base), None, None)
    pairs = encode(comparisons, template.tokenizer, template, 512)
    file, head = None, None
    if headed:
        file, head = str(models.released / "value_head.safetensors"), models.heads["released"]
    scorer = scorer_of(model, str(models.base), file)
    found = log_ratios(scorer, load_adapters(model, adapters), pairs)
    for row, pair in zip(found, pairs, strict=True):
        for value, theirs in zip(row, merged, strict=True):
            expected = 0.0
            for sign, answer in ((1, pair.chosen), (-1, pair.rejected)):
                ratio = logprob(theirs, pair.ref_prompt, answer, head)
                expected += sign * (ratio - logprob(models.base_model, pair.ref_prompt, answer, head))
            assert value.item() == pytest.approx(expected, abs=1e-3)
    assert found.abs().max() > 0.5


def choose(path: Path, file: Path, models, merged, weights: list[float]) -> Path:
    """Comparisons of a user of these weights, who chooses by the sum of the merged models' log-ratios."""
    tokenizer = models.tokenizer
    template = PromptTemplate(tokenizer)
    pairs = encode(read_comparisons(file), tokenizer, template, 512)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record, pair in zip(records, pairs, strict=True):

        def reward(answer, context=pair.ref_prompt):
            ids = torch.tensor([context + answer])

            def total(model):
                logprobs = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
                return logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()

            return sum(w * (total(m) - total(models.base_model)) for w, m in zip(weights, merged, strict=True))

        if reward(pair.chosen) < reward(pair.rejected):
            record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@torch.no_grad()
def test_the_command_finds_a_mixture_again(models, adapters, merged, tmp_path, capsys):
    """Of which one weighs nothing, and one less than nothing; what it prints is a persona of a server's."""
    true = [1.0, -0.5, 0.0]
    data = choose(tmp_path / "own.jsonl", write_comparisons(tmp_path / "all.jsonl", 60), models, merged, true)
    named = [f"{name}={path}" for name, path in adapters.items()]
    with pytest.raises(SystemExit) as ended, torch.enable_grad():
        main(["fit", str(data), "--reward-model", str(models.base), "--adapters", *named, "--name", "ada"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    persona = json.loads(out.splitlines()[-1])
    found = dict(zip(persona["ada"]["pad_adapter"], persona["ada"]["pad_preference_weights"], strict=True))
    assert list(found)[:2] == ["warm", "dry"]
    assert found["dry"] / found["warm"] == pytest.approx(-0.5, abs=0.15)
    assert abs(found.get("odd", 0)) < 0.15 * found["warm"]
    held_out = int(out.partition(" and in ")[2].partition("%")[0])
    assert held_out >= 85
    pad = PADConfig.from_pad({"reward_model": "base", "adapters": adapters, "personas": persona})
    assert pad.personas["ada"].adapters == tuple(found)
    assert pad.personas["ada"].reference == "neutral"


def test_what_cannot_be_weighed(models, adapters, tmp_path):
    data = write_comparisons(tmp_path / "own.jsonl", 8)
    other = tmp_path / "other"
    shutil.copytree(adapters["dry"], other)
    tensors = load_file(other / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(renamed, other / "adapter_model.safetensors", {"format": "pt"})
    nothing = tmp_path / "nothing"
    shutil.copytree(adapters["dry"], nothing)
    none = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(none, nothing / "adapter_model.safetensors", {"format": "pt"})
    kind = tmp_path / "kind"
    shutil.copytree(adapters["dry"], kind)
    config = json.loads((kind / "adapter_config.json").read_text())
    (kind / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    for path, says in (
        (other, r"--adapters: x='.*other' does not fit this model: .*layers\.7\."),
        (nothing, "no adapter makes a difference"),
        (kind, "of the type .*LOHA; only LORA is supported"),
        (tmp_path / "nowhere", "x='.*nowhere' does not fit this model: Can't find"),
    ):
        with pytest.raises(ValueError, match=says):
            fit_adapters(str(models.base), data, {"x": str(path)})
    with pytest.raises(ValueError, match="--adapters: 'x' is given twice"):
        assignments("--adapters", ["x=a", "y=b", "x=c"])
    with pytest.raises(ValueError, match="no model is served here"):
        fit_adapters("base", data, adapters)
