"""Which pair a user should compare next: what the posterior knows, and what ten such choices are worth."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.language_choices import Users, weights_by_number
from pad_vllm.cli import main
from pad_vllm.training.choosing import information, next_pair
from pad_vllm.training.posterior import SPREAD, TYPICAL_MARGIN, draw_normals, mean_direction, weights_of
from pad_vllm.training.sliders import fit_slider_weights
from tests.support.models import make_adapter
from tests.unit.test_sliders import write_comparisons

NUM_USERS = 40
GAINS = torch.tensor([4.0, 6, 3, 5, 4, 3], dtype=torch.float64)


@pytest.mark.slow
def test_draws_are_from_the_posterior():
    """Means of what the choices say, against sums over a grid of both weights; what a pair tells is their mutual
    information."""
    torch.manual_seed(0)
    features, pairs = torch.randn(6, 2).double(), torch.randn(5, 2).double() * 2
    # The prior of a weight on a grid: of its logarithm the two normals' sum is by convolution.
    sizes = torch.linspace(-6, 6, 601, dtype=torch.float64)
    share = (-(sizes**2) / 2).exp()
    edges = torch.linspace(-60, 60, 481, dtype=torch.float64)
    scale = TYPICAL_MARGIN / 2**0.5 * (SPREAD * sizes).exp()
    cumulative = torch.special.ndtr(edges.unsqueeze(1) / scale) @ (share / share.sum())
    prior, places = cumulative.diff(), (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(places, places)
    p = 0.8 * torch.sigmoid(grid @ features.T) + 0.1
    weight = p.prod(1) * torch.outer(prior, prior).flatten()
    weight /= weight.sum()
    drawn = weights_of(draw_normals(features, num_draws=20_000, mistakes=0.1))
    within = (drawn.abs() < 60).all(1)
    told = 0.8 * torch.sigmoid(grid @ pairs.T) + 0.1

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    expected = entropy(weight @ told) - weight @ entropy(told)
    found = information(pairs, drawn[within], mistakes=0.1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=8e-3)
    assert information(-pairs, drawn[within], mistakes=0.1).tolist() == pytest.approx(found.tolist(), abs=1e-9)
    shares = [(grid > 0, drawn > 0), (grid.abs() > 3, drawn.abs() > 3)]
    for on_grid, among_draws in shares:
        expected = weight @ on_grid.double()
        assert among_draws[within].double().mean(0).tolist() == pytest.approx(expected.tolist(), abs=0.015)


@pytest.mark.slow
def test_users_at_once_are_users_one_by_one():
    """Draws for several users, from where they were before the last choice, are from the same posteriors."""
    torch.manual_seed(0)
    features = torch.randn(2, 8, 3).double()
    together = draw_normals(features, start=draw_normals(features[:, :7], num_draws=4000), num_steps=40)
    for own, found in zip(features, mean_direction(weights_of(together)), strict=True):
        alone = mean_direction(weights_of(draw_normals(own, num_draws=4000)))
        assert found.tolist() == pytest.approx(alone.tolist(), abs=0.04)


def test_what_is_known_is_not_asked():
    """After many choices by one feature the next pair is about another one."""
    chosen = torch.tensor([[1.0, 0.0]] * 30)
    assert next_pair(chosen, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0] == 1
    assert next_pair(chosen[:0], torch.tensor([[0.1, 0.0], [1.0, 1.0], [0.0, 0.0]]))[0] == 1


def users_of_a_small_world() -> Users:
    """Users who want two or three of six things, each of which two attributes ask for, or against."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(NUM_USERS, 6, generator=generator).double()
    for number, user in enumerate(wanted):
        user[torch.randperm(6, generator=generator)[2 + number % 2 :]] = 0

    def pairs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        apart = torch.randint(-1, 2, (NUM_USERS, number, 6), generator=generator).double()
        said = torch.cat([apart * GAINS, -0.7 * apart * GAINS], 2)
        noise = torch.randn(said.shape, generator=generator).double()
        return (said + noise) / 3, torch.einsum("upk,uk->up", apart, wanted)

    return Users(*pairs(120), *pairs(400))


@pytest.mark.slow
def test_such_choices_tell_more_than_random_ones():
    """A tenth of the choices are mistakes; the weights are fitted alike."""
    users = users_of_a_small_world()
    choices = users.choices(0.1)
    found = {
        (is_chosen, number): users.agreement(weights).mean().item()
        for is_chosen, numbers in ((True, (10,)), (False, (10, 30)))
        for number, weights in weights_by_number(users, choices, numbers, is_chosen).items()
    }
    assert found[True, 10] > found[False, 10] + 0.04, found
    assert found[True, 10] > 0.82, found
    assert found[False, 30] > found[True, 10], found


def test_few_choices_are_fitted_by_the_posterior():
    """Of ten choices the fit is the posterior's mean, in which an attribute that told nothing apart weighs nothing."""
    torch.manual_seed(0)
    differences = torch.randn(10, 3) * torch.tensor([1.0, 0.0, 1.0])
    differences[:, 0] = differences[:, 0].abs()
    found = fit_slider_weights(differences, ("brief", "odd", "kind"))
    assert found.penalty is None
    assert found.weights[0] > 0.6 > abs(found.weights[2])
    assert found.weights[1] == 0
    assert fit_slider_weights(differences.repeat(2, 1), ("brief", "odd", "kind")).penalty is not None


def test_the_command_names_a_pair(models, tmp_path, capsys):
    pool, own = write_comparisons(tmp_path / "pool.jsonl", 6), tmp_path / "own.jsonl"
    (tmp_path / "attributes.json").write_text(json.dumps(["be brief", "be kind"]))
    command = ["fit", str(own), "--reward-model", str(models.reward), "--next", str(pool)]
    records, asked = [json.loads(line) for line in pool.read_text().splitlines()], []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--attributes", str(tmp_path / "attributes.json")])
        out = capsys.readouterr().out
        assert ended.value.code == 0
        assert out.startswith("The comparison to make next (it should tell ")
        asked.append(json.loads(out.splitlines()[-1]))
        assert asked[-1] in records
        with own.open("a") as file:
            file.write(json.dumps(asked[-1]) + "\n")
    assert asked[0] != asked[1]


def test_a_pair_is_named_in_the_columns_of_the_comparisons(models, tmp_path, capsys):
    """The line that is to be added is one that the same command reads."""
    own = tmp_path / "own.jsonl"
    records = [json.loads(line) for line in write_comparisons(tmp_path / "all.jsonl", 6).read_text().splitlines()]
    names = {"chosen": "better", "rejected": "worse"}
    renamed = [{names.get(key, key): value for key, value in record.items()} for record in records]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(record) + "\n" for record in renamed))
    command = ["fit", str(own), "--reward-model", str(models.named), "--next", str(tmp_path / "pool.jsonl")]
    own.touch()  # no choices yet
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--columns", "chosen=better", "rejected=worse"])
        out = capsys.readouterr().out
        assert ended.value.code == 0, out
        assert json.loads(out.splitlines()[-1]) in renamed
        with own.open("a") as file:
            file.write(out.splitlines()[-1] + "\n")


@pytest.mark.parametrize("over", ["heads", "adapters"])
def test_pairs_are_named_for_other_weights_too(over, models, tmp_path, capsys):
    """The pair that tells most of heads, or of adapters, is named by their features; once it is chosen, another one."""
    pool, own = write_comparisons(tmp_path / "pool.jsonl", 6), tmp_path / "own.jsonl"
    command = ["fit", str(own), "--reward-model", str(models.named), "--next", str(pool)]
    if over == "adapters":
        for seed, name in enumerate("ab"):
            make_adapter(tmp_path / name, models.base, seed, 4, ["q_proj", "v_proj"])
        command[3] = str(models.base)
        command += ["--adapters", *(f"{name}={tmp_path / name}" for name in "ab")]
    asked = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        asked.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        own.write_text("".join(json.dumps(one) + "\n" for one in asked))
    assert asked[0] != asked[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "no value heads beside it, to which weights could be fitted"),
        (["--update", "personas.yaml", "--name", "ada"], "--next: goes without --update"),
        (["--adapters", "a=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_about(more, says, models, tmp_path, capsys):
    pool = write_comparisons(tmp_path / "pool.jsonl", 6)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "own.jsonl", "--reward-model", str(models.reward), "--next", str(pool), *more])
    assert ended.value.code == 1
    assert says in capsys.readouterr().err


def test_a_long_pair_is_passed_over(models, tmp_path, capsys):
    """One that does not fit into the model is no error, as for a fit."""
    pool = write_comparisons(tmp_path / "pool.jsonl", 6)
    long = {"prompt": "fox", "chosen": "fox " * 3000, "rejected": "dog"}
    pool.write_text(json.dumps(long) + "\n" + pool.read_text())
    with pytest.raises(SystemExit) as ended:
        main(["fit", "own.jsonl", "--reward-model", str(models.named), "--next", str(pool)])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) != long
