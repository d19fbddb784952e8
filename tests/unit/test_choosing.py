"""Which pair a user should compare next: what the posterior knows, and what ten such choices are worth."""

from __future__ import annotations

import json

import pytest
import torch

from pad_vllm.cli import main
from pad_vllm.training.choosing import PRIOR_SPREAD, information, next_pair, posterior
from tests.unit.test_sliders import write_comparisons

NUM_USERS = 40
GAINS = torch.tensor([4.0, 6, 3, 5, 4, 3], dtype=torch.float64)


def test_information_is_that_of_sampled_weights():
    """The mutual information of choice and weights, by a hundred thousand draws from the posterior."""
    torch.manual_seed(0)
    features, pairs = torch.randn(6, 3).double(), torch.randn(5, 3).double() * 2
    known = posterior(features, 0.5)
    drawn = torch.distributions.MultivariateNormal(known.mean, known.covariance).sample((100_000,))
    p = 0.8 * torch.sigmoid(drawn @ pairs.T) + 0.1

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    expected = entropy(p.mean(0)) - entropy(p).mean(0)
    found = information(pairs, known, mistakes=0.1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=3e-3)
    assert information(-pairs, known, mistakes=0.1).tolist() == pytest.approx(found.tolist(), abs=1e-9)
    gradient = (features * torch.sigmoid(-features @ known.mean).unsqueeze(1)).sum(0) - 0.5 * known.mean
    assert gradient.abs().max() < 1e-4  # the mode


def test_what_is_known_is_not_asked():
    """After many choices by one feature the next pair is about another one."""
    chosen = torch.tensor([[1.0, 0.0]] * 30)
    assert next_pair(chosen, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0] == 1
    assert next_pair(chosen[:0], torch.tensor([[0.1, 0.0], [1.0, 1.0], [0.0, 0.0]]))[0] == 1


def accuracy(user: torch.Tensor, num_choices: int, asks_next: bool, seed: int) -> float:
    """How often weights after so many choices, a tenth of them mistakes, say what the user wants of other pairs. Six
    things may be wanted, each of which two attributes ask for, or against."""
    generator = torch.Generator().manual_seed(seed)

    def pairs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        apart = torch.randint(-1, 2, (number, 6), generator=generator).double()
        said = torch.cat([apart * GAINS, -0.7 * apart * GAINS], 1)
        return apart @ user, said + torch.randn(number, 12, generator=generator).double()

    (wanted, features), (tested, others) = pairs(120), pairs(400)
    left, chosen = torch.randperm(120, generator=generator).tolist(), features[:0]
    for _ in range(num_choices):
        one = left.pop(next_pair(chosen, features[left])[0] if asks_next else 0)
        likes = wanted[one] > 0 if wanted[one] else torch.rand(1, generator=generator) < 0.5
        if torch.rand(1, generator=generator) < 0.1:
            likes = not likes
        chosen = torch.cat([chosen, features[one : one + 1] * (1 if likes else -1)])
    scale = chosen.square().mean().sqrt()
    weights = posterior(chosen / scale, 12 / PRIOR_SPREAD**2).mean
    return ((others @ weights) * tested > 0)[tested != 0].double().mean().item()


def test_such_choices_tell_more_than_random_ones():
    """Simulated users who want two or three things, on average: ten tell 6 points more than ten random ones, which
    thirty random ones tell 12 more than."""
    found = {}
    for name, number, asks_next in (("ten", 10, False), ("thirty", 30, False), ("next", 10, True)):
        scores = []
        for seed in range(NUM_USERS):
            generator = torch.Generator().manual_seed(100 + seed)
            user = torch.zeros(6, dtype=torch.float64)
            things = torch.randperm(6, generator=generator)[: 2 + seed % 2]
            user[things] = torch.randn(len(things), generator=generator).double()
            scores.append(accuracy(user, number, asks_next, seed))
        found[name] = sum(scores) / NUM_USERS
    assert found["next"] > found["ten"] + 0.04, found
    assert found["thirty"] > found["next"], found


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
    with pytest.raises(SystemExit):
        main(command)
    assert "--next: goes with --attributes" in capsys.readouterr().err
