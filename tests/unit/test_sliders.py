"""Sliders: a user's weights over attributes in words, from a few comparisons."""

from __future__ import annotations

import json
import random

import pytest
import torch

from pad_vllm.cli import main
from pad_vllm.params import MAX_PREFERENCES
from pad_vllm.reward.heads import load_heads
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training import sliders
from pad_vllm.training.data import encode, read_comparisons
from pad_vllm.training.fit import load_reward_model, solve
from pad_vllm.training.heads import HeadedModel
from pad_vllm.training.sliders import (
    differentials,
    fit_slider_weights,
    fit_sliders,
    persona_of,
    read_attributes,
    sliders_of,
)
from tests import oracle

TEXTS = ["Be concise.", "Be formal, and say why.", "playful"]


def write_comparisons(path, number: int, **more):
    rng = random.Random(0)

    def words():
        return " ".join(rng.choice(["fox", "dog", "rain", "town", "lazy", "brown"]) for _ in range(rng.randint(2, 9)))

    records = [{"prompt": words(), "chosen": f"{words()} a", "rejected": f"{words()} b"} | more for _ in range(number)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@torch.no_grad()
def logprob(model, prompt: list[int], answer: list[int], head=None) -> float:
    """log p(answer | prompt), a token at a time."""
    total = 0.0
    for i, token in enumerate(answer):
        logits = oracle.reward_logits(model, prompt + answer[:i], head)
        total += logits.double().log_softmax(0)[token].item()
    return total


@pytest.mark.parametrize("beside", ["reward", "released", "named"])
def test_differentials_are_those_of_a_plain_loop(beside, models, tmp_path):
    """A single head applies, as in serving; of several none does, and there may be none."""
    folder = getattr(models, beside)
    comparisons = read_comparisons(write_comparisons(tmp_path / "own.jsonl", 3))
    model, template = load_reward_model(str(folder), None, None)
    scorer = model
    if beside == "released":
        scorer = HeadedModel.of(model, load_heads(folder / "value_head.safetensors", 64))
    pairs = encode(comparisons, template.tokenizer, template, 512)
    found = differentials(scorer, template, pairs, TEXTS)

    tokenizer, compose = models.tokenizer, PromptTemplate(models.tokenizer).compose
    head = models.heads["released"] if beside == "released" else None
    for row, comparison in zip(found, comparisons, strict=True):
        chat = [{"role": "user", "content": comparison.prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for value, text in zip(row, TEXTS, strict=True):
            expected = 0.0
            for sign, answer in ((1, comparison.chosen), (-1, comparison.rejected)):
                ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
                asked = logprob(models.reward_model, compose(prompt, text), ids, head)
                expected += sign * (asked - logprob(models.reward_model, prompt, ids, head))
            assert value.item() == pytest.approx(expected, abs=2e-4)
    assert found.abs().max() > 0.5


@pytest.mark.slow
def test_the_folder_decides_which_head_applies(models, tmp_path):
    """The whole fit, by which of the models it scored as; what comparisons say of a preference is not read."""
    data = write_comparisons(tmp_path / "own.jsonl", 12)
    wordy = write_comparisons(tmp_path / "wordy.jsonl", 12, preference="Be detailed.")
    (tmp_path / "attributes.yaml").write_text(json.dumps(TEXTS))

    def fitted(folder, path=data, **settings):
        return fit_sliders(str(folder), path, tmp_path / "attributes.yaml", **settings)

    plain, released = fitted(models.reward), fitted(models.released)
    assert plain == fitted(models.named) == fitted(models.reward, wordy)
    assert released != plain
    assert released == fitted(models.reward, heads=str(models.released / "value_head.safetensors"))
    assert fitted(models.reward, prompt_template="{preference} {prompt}") != plain


def noisy(differences: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Comparisons by a user of these weights, with as many mistakes as sigmoid makes."""
    chosen = torch.rand(len(differences)) < torch.sigmoid(differences @ weights)
    return torch.where(chosen[:, None], differences, -differences)


def test_weights_are_those_of_nats():
    """Each attribute has a scale of its own, and the weights are what reproduces the user, the largest 1 at most."""
    torch.manual_seed(0)
    scale, true = torch.tensor([4.0, 12.0, 1.0, 5.0]), torch.tensor([0.5, -0.1, 0.0, 0.0])
    differences = noisy(torch.randn(3000, 4) * scale, true)
    found = fit_slider_weights(differences, ("brief", "formal", "odd", "kind"))
    assert found.weights[0] == 1  # four nats where another attribute by itself has twelve
    assert found.weights[1] / found.weights[0] == pytest.approx(-0.2, abs=0.03)
    assert abs(found.weights[2]) < 0.1
    assert abs(found.weights[3]) < 0.03
    by_weights = (differences @ torch.tensor(found.weights) > 0).float().mean().item()
    assert found.accuracy == pytest.approx(by_weights, abs=0.005)
    assert found.held_out_accuracy == pytest.approx((differences @ true > 0).float().mean().item(), abs=0.01)


def test_an_attribute_that_the_model_hardly_reads_weighs_little():
    """Its differences are rounding errors: a weight in nats that made something of them would be enormous."""
    torch.manual_seed(0)
    differences = noisy(torch.randn(30, 3) * torch.tensor([5.0, 5.0, 1e-4]), torch.tensor([0.5, -0.2, 0.0]))
    found = fit_slider_weights(differences, TEXTS)
    assert found.weights[0] > 0.6
    assert abs(found.weights[2]) < 0.01


def test_choices_that_contradict_each_other_are_said_to():
    """Each pair was chosen both ways."""
    torch.manual_seed(0)
    differences = torch.randn(30, 3)
    with pytest.raises(ValueError, match="the choices contradict each other: no attribute has a weight"):
        fit_slider_weights(torch.cat([differences, -differences]), TEXTS)


def test_of_many_attributes_the_largest_are_fitted_again():
    torch.manual_seed(0)
    names = [f"attribute {i}" for i in range(20)]
    true = torch.zeros(20)
    true[[3, 7, 11]] = torch.tensor([2.0, -1.5, 1.0])
    differences = noisy(torch.randn(200, 20), true)
    found = fit_slider_weights(differences, names)
    heaviest = sliders_of(found)
    assert list(heaviest)[:3] == ["attribute 3", "attribute 7", "attribute 11"]
    assert heaviest["attribute 7"] < 0 < heaviest["attribute 11"]
    assert len(heaviest) <= MAX_PREFERENCES
    kept = [i for i, weight in enumerate(found.weights) if weight]
    assert len(kept) == MAX_PREFERENCES
    by_themselves = solve(differences[:, kept].double() / differences.double().square().mean().sqrt(), found.penalty)
    by_themselves = by_themselves / by_themselves.abs().max() * max(map(abs, found.weights))
    assert [found.weights[i] for i in kept] == pytest.approx(by_themselves.tolist(), abs=0.006)


def test_choosing_among_many_attributes_earns_no_accuracy():
    """64 attributes that say nothing: what is left out of a fit has no part in the choice among them."""
    torch.manual_seed(0)
    found = fit_slider_weights(torch.randn(60, 64), [str(i) for i in range(64)])
    assert found.held_out_accuracy < 0.65
    assert found.accuracy > 0.65


def test_an_attribute_of_no_weight_is_not_served():
    torch.manual_seed(0)
    differences = torch.randn(50, 3).abs() * torch.tensor([1.0, 0.0, -1.0])
    found = fit_slider_weights(differences, TEXTS)
    assert found.weights[1] == 0
    persona = persona_of(sliders_of(found))
    assert sorted(persona["pad_preference"]) == [TEXTS[0], TEXTS[2]]
    assert dict(zip(persona["pad_preference"], persona["pad_preference_weights"], strict=True))[TEXTS[2]] < 0
    assert persona["pad_reference"] == "neutral"
    with pytest.raises(ValueError, match="no attribute makes a difference"):
        fit_slider_weights(torch.zeros(50, 3), TEXTS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "None: expected a list of texts"),
        ("[]", r"\[\]: expected a list of texts"),
        ("Be brief.", "'Be brief.': expected a list of texts"),
        ("attributes: {a: 1}", "expected a list of texts"),
        ("texts: [a]", r"\['texts'\]: expected a list of texts, or one under 'attributes'"),
        ("{attributes: [a], beta: 1}", "'beta'"),
        ("[a, 2]", "attribute 2=2: must be a string, not int"),
        ("[a, ' ']", "attribute 2=' ': must not be empty"),
        ("[a, b, ' a ']", "'a' is given twice"),
        (json.dumps([str(i) for i in range(65)]), "65 attributes, at most 64 are allowed"),
        ("[a", "--attributes='.*attributes.yaml': while parsing"),
        (None, "--attributes='.*attributes.yaml': cannot be read"),
    ],
)
def test_attributes_that_cannot_be_used(text, says, tmp_path):
    path = tmp_path / "attributes.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says) as refused:
        read_attributes(path)
    assert "attributes.yaml" in str(refused.value)


@pytest.mark.parametrize("name", ["attributes.yaml", "attributes.json"])
def test_layouts_of_attributes(name, tmp_path):
    for layout in (TEXTS, {"attributes": TEXTS}):
        (tmp_path / name).write_text(json.dumps(layout))
        assert read_attributes(tmp_path / name) == TEXTS


def test_the_command_prints_a_persona(models, tmp_path, capsys):
    own = write_comparisons(tmp_path / "own.jsonl", 20)
    (tmp_path / "attributes.yaml").write_text("".join(f"- attribute {i}\n" for i in range(10)))
    command = ["--reward-model", str(models.reward), "--attributes", str(tmp_path / "attributes.yaml")]
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(own), *command, "--name", "ada"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.startswith("20 comparisons: ")
    assert "2 of 10 attributes are left out: at most 8 are served." in out
    persona = json.loads(out.splitlines()[-1])["ada"]
    texts, weights = persona["pad_preference"], persona["pad_preference_weights"]
    assert len(texts) == len(weights) == MAX_PREFERENCES
    assert 0 < max(map(abs, weights)) <= 1
    assert weights == sorted(weights, key=abs, reverse=True)
    assert f"{weights[0]:+.2f}  {texts[0]}\n" in out
    assert persona["pad_reference"] == "neutral"

    few = write_comparisons(tmp_path / "few.jsonl", 3)
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(few), *command])
    assert ended.value.code == 1
    assert "3 comparisons of at most" in capsys.readouterr().err


def test_a_fit_that_says_nothing_is_called_so(models, tmp_path, capsys, monkeypatch):
    differences = torch.ones(40, 3)
    differences[::2] = -1
    differences[:2] = 1  # or there would be no weights at all
    monkeypatch.setattr(sliders, "differentials", lambda *_: differences)
    own = write_comparisons(tmp_path / "own.jsonl", 40)
    (tmp_path / "attributes.yaml").write_text(json.dumps(TEXTS))
    command = ["fit", str(own), "--reward-model", str(models.reward), "--attributes", str(tmp_path / "attributes.yaml")]
    with pytest.raises(SystemExit):
        main(command)
    assert "Chance might do as well" in capsys.readouterr().out
