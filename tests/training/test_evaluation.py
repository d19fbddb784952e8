"""A small run of the alignment table through real engines."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from benchmarks import alignment


@pytest.fixture(scope="module")
def small(cache, tmp_path_factory):
    """The alignment table on the synthetic models, small."""
    output = tmp_path_factory.mktemp("alignment")
    results = alignment.run(output, **alignment.SMALL, cache_dir=str(cache))
    return output, results


def test_the_alignment_table(small):
    output, results = small
    (rows,) = results["rows"].values()
    for group in ("seen", "unseen"):
        found = {row["method"]: row for row in rows if row["group"] == group}
        assert set(found) == {"base", "prompting", "best_of_n", *(f"pad, beta {b:g}" for b in alignment.BETAS)} | {
            "pad_weights, true",
            "pad_weights, fit",
            "reward_model",
        }
        base, pad = found["base"], found["pad, beta 1"]
        assert base["win_rate"].mean == 0.5
        assert pad["satisfaction"].mean >= base["satisfaction"].mean + 0.2
        assert pad["win_rate"].mean > 0.7
        assert found["best_of_n"]["satisfaction"].mean > base["satisfaction"].mean
        assert base["well_formed"].mean > 0.8
        assert pad["well_formed"].mean > base["well_formed"].mean - 0.25
        for name in ("true", "fit"):
            assert found[f"pad_weights, {name}"]["satisfaction"].mean >= base["satisfaction"].mean + 0.2
        assert {row["num_answers"] for row in found.values()} == {16}
    text = (output / "alignment.md").read_text()
    assert text.count("intervals apart") + text.count("intervals NOT apart") == 4
    assert text.count("| pad, beta 1 |") == 2
    assert json.loads((output / "alignment.json").read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    for name in ("alignment-beta.png", "alignment-dimensions.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_every_answer_is_kept_and_judged_by_the_checker(small):
    _, results = small
    (answers,) = results["answers"].values()
    for method, records in answers.items():
        assert len(records) == 32, method
        for record in records:
            assert record["satisfaction"] == sum(record["satisfied"].values()) / len(record["satisfied"])
            assert record["nll"] > 0
    assert any(a["text"] != b["text"] for a, b in zip(answers["base"], answers["pad, beta 1"], strict=True))


def test_mixing_heads_moves_every_dimension(small):
    """Weights alone, the true ones and those fitted to 30 comparisons, for users who want two dimensions or more."""
    _, results = small
    (answers,) = results["answers"].values()
    for method in ("pad_weights, true", "pad_weights, fit"):
        shares = defaultdict(list)
        for record in answers[method]:
            if len(record["satisfied"]) >= 2:
                for dimension, satisfied in record["satisfied"].items():
                    shares[record["user"], dimension].append(satisfied)
        assert len(shares) >= 4
        assert all(sum(share) / len(share) >= 0.75 for share in shares.values()), (method, dict(shares))
    for fit in results["fit"].values():
        assert fit["num_comparisons"] == 30
        assert fit["held_out_accuracy"] >= 0.75
