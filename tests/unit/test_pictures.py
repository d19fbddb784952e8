"""Pictures of results: they show what the committed records say, and no label of theirs covers another."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import cost_plot, language_plot, pictures

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LANGUAGE = [name for name in language_plot.MODELS if (RESULTS / f"{name}.json").exists()]


def record(name):
    return json.loads((RESULTS / name).read_text())


def costs():
    return record("throughput.json"), json.loads(max(RESULTS.glob("h200/cost-*.json")).read_text())


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of files."""
    figures = []
    for module in (cost_plot, language_plot):
        monkeypatch.setattr(module, "save", lambda figure, path, shown: figures.append(figure))
    return figures


def unclear(figure) -> list[tuple[str, ...]]:
    """Texts of a figure that cover each other, or are cut off."""
    figure.draw_without_rendering()
    texts = [text for axis in figure.axes for text in [*axis.texts, *ticks(axis), axis._left_title]]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    page = figure.bbox.padded(1)
    cut = [(text,) for text, box in boxes if not all(page.contains(*corner) for corner in box.corners())]
    return cut + [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


def ticks(axis):
    """Labels of the ticks that are shown."""
    for side, (low, high) in ((axis.xaxis, sorted(axis.get_xlim())), (axis.yaxis, sorted(axis.get_ylim()))):
        yield from (
            tick.label1
            for tick in side.get_major_ticks()
            if low <= tick.get_loc() <= high and tick.label1.get_visible()
        )


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_language_picture_on_file_is_of_the_record_on_file(name):
    """Made by `python -m benchmarks.language_plot`."""
    shown = pictures.shown_in(RESULTS / f"{name}.png")
    assert shown == language_plot.shown_points(record(f"{name}.json")["rows"])


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_language_picture_has_every_method_and_its_interval(name, drawn):
    rows = record(f"{name}.json")["rows"]
    language_plot.plot_language(rows, RESULTS / f"{name}.png")
    (figure,) = drawn
    lines = [tuple(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines]
    drawn_points = {point for line in lines for point in line}
    of_all = [row for row in rows if row["group"] == "one" and not row["method"].startswith(("DPO", "sliders"))]
    assert len(of_all) > 5
    for row in of_all:
        mean, low, high = (100 * value for value in row["satisfied"])
        assert {(row["nll"], mean), (row["nll"], low), (row["nll"], high)} <= drawn_points
    assert unclear(figure) == []


def test_a_model_tuned_per_user_is_an_upper_line(drawn):
    rows = record("language.json")["rows"]
    language_plot.plot_language(rows, RESULTS / "language.png")
    tuned = [100 * row["satisfied"][0] for row in rows if row["method"].startswith("DPO")]
    mean = sum(tuned) / len(tuned)
    dashed = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [pytest.approx([mean, mean])]
    assert f"DPO per user: {mean:.0f}%" in [note.get_text() for note in drawn[0].axes[0].texts]


def test_the_cost_picture_on_file_is_of_the_records_on_file():
    """Made by `python -m benchmarks.cost_plot`."""
    assert pictures.shown_in(RESULTS / "cost.png") == cost_plot.shown_costs(*costs())


def test_each_bar_of_the_cost_is_as_long_as_it_says_and_of_its_panel_s_machine(drawn):
    cpu, card = costs()
    cost_plot.plot_cost(cpu, card, RESULTS / "cost.png")
    (figure,) = drawn
    measured = {row["label"]: row["ratio"] for row in cpu["results"]["baselines"]["rows"]}
    milliseconds = {(row["mode"], row["batch"]): row["ms_per_token"] for row in card["results"]}
    by_batch = [
        milliseconds["pad", batch]["unguided"] / milliseconds[mode, batch]["guided"]
        for batch in dict.fromkeys(batch for mode, batch in milliseconds if mode == "draft")
        for mode in ("pad", "draft")
    ]
    expected = [[measured[label] for label in ("guided", "transformers loop, cached", "naive plugin")], by_batch]
    for axis, bars, of in zip(figure.axes, expected, (cpu, card), strict=True):
        assert [patch.get_width() for patch in axis.patches] == pytest.approx(bars)
        said = [note.get_text() for note in axis.texts if note.get_text()[0].isdigit()]
        assert said == [f"{bar:.2f}" for bar in bars]
        assert of["hardware"] in axis.get_title(loc="left")
    assert unclear(figure) == []


def test_a_repeat_lost_in_noise_gives_no_spread():
    """Time of a token is a difference of two runs: at batch 32 with drafts one was negative."""
    card = record("h200/cost-2026-11-28.json")
    spreads = {bar.name: bar.between for bar in cost_plot.card_bars(card)}
    assert spreads["pad-vllm, drafts, batch 32"] is None
    low, high = spreads["pad-vllm, batch 32"]
    assert low <= 0.747
    assert high < 1


def test_a_label_covers_another_only_where_no_place_is_left():
    figure = pictures.new_figure(2)
    axis = figure.subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    figure.draw_without_rendering()
    crowd = [(f"label {i}", (0.5, 0.5 + i / 1000), "black") for i in range(4)]
    pictures.label_points(axis, crowd, [], [])
    assert len(axis.texts) == 4
    assert unclear(figure) == []
    pictures.label_points(axis, [("long " * 60, (0.5, 0.5), "black")], [], [])
    assert unclear(figure) != []
