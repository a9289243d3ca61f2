"""What the pictures show, read back from the figures before they are written, and from the PNG files themselves."""

import itertools

import numpy as np
import pytest
from fake_run import PRICES
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from router_r1_jax import report
from router_r1_jax.report.colours import GREY, model_colours
from router_r1_jax.report.learning_curves import running_mean
from router_r1_jax.report.number_format import dollars, percent


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn in a test, in order; nothing is written."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    return drawn


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def test_files_are_pictures_of_readable_size(tmp_path, metrics, results):
    for draw, source in (
        (report.learning_curves, metrics),
        (report.calls_per_model, metrics),
        (report.em_against_cost, results),
    ):
        path = draw(source, tmp_path / "plots" / f"{draw.__name__}.png")
        height, width, _ = imread(path).shape
        assert width > 1000 and height > 600


@pytest.mark.parametrize("draw", [report.learning_curves, report.calls_per_model])
@pytest.mark.parametrize("lines", [[], [{"step": 1, "learning_rate": 0.1}], [{"step": 1, "em": None}]])
def test_nothing_to_draw_writes_nothing(tmp_path, draw, lines):
    assert draw(lines, tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists()


def test_a_run_without_calls_has_no_picture_of_them(tmp_path):
    lines = [{"step": i, "calls/share/a": 0.0, "calls_per_question": 0.0} for i in (1, 2)]
    assert report.calls_per_model(lines, tmp_path / "x.png") is None


def test_curves_show_the_metrics_and_skip_what_was_not_finite(figures, metrics):
    report.learning_curves(metrics, "unused.png")
    raw, smooth, validation = panel(figures[0], "Exact match").lines
    train = [line for line in metrics if "phase" not in line]
    np.testing.assert_array_equal(raw.get_ydata(), [line["em"] for line in train])
    np.testing.assert_array_equal(validation.get_xdata(), [20, 40, 60, 80, 100, 120])
    assert np.abs(np.diff(smooth.get_ydata())).max() < np.abs(np.diff(raw.get_ydata())).max()
    gradient = panel(figures[0], "Gradient norm before clipping").lines[0].get_xdata()
    missing = [line["step"] for line in train if line["grad_norm"] is None]
    assert missing and set(gradient) == {line["step"] for line in train} - set(missing)


def test_a_single_step_is_seen(figures):
    lines = [{"step": 1, "kl": 0.1, "calls/share/Titan": 1.0}]
    report.learning_curves(lines, "unused.png")
    (axes,) = figures[0].axes
    assert any(line.get_marker() == "o" for line in axes.lines)
    figures[0].draw_without_rendering()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    report.calls_per_model(lines, "unused.png")
    assert len(figures) == 1  # a band has no width there; the calls of one step are no development


def test_panels_without_data_are_left_out(figures):
    report.learning_curves([{"step": 1, "kl": 0.1}, {"step": 2, "kl": 0.2, "em": None}], "unused.png")
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["KL to the reference"]


def test_without_validation_no_legend_names_one(figures):
    report.learning_curves([{"step": 1, "em": 0.1}, {"step": 2, "em": 0.2}], "unused.png")
    assert panel(figures[0], "Exact match").get_legend_handles_labels()[1] == ["train, sampled"]


def test_the_most_frequent_faults_have_their_lines(figures):
    """Most frequent first, at most five, and none that never occurred."""
    shares = {"a": 0.1, "no_answer": 0.5, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.05, "never": 0.0}
    lines = [{"step": step, **{f"format/{name}": share for name, share in shares.items()}} for step in (1, 2)]
    report.learning_curves(lines, "unused.png")
    axes = panel(figures[0], "Format faults, most frequent")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["no answer", "d", "c", "b", "a"]


@pytest.mark.parametrize("length", [1, 2, 19, 20, 41, 97])
def test_smoothing_is_the_mean_of_the_window(length):
    values = np.random.default_rng(length).random(length)
    half = length // 20
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(length)]
    np.testing.assert_allclose(running_mean(values), expected, rtol=1e-12)


def test_bands_carry_each_model_share_and_fill_the_height(figures, metrics):
    report.calls_per_model(metrics, "unused.png")
    bands = figures[0].axes[0].collections
    names = sorted(PRICES)
    tops = [band.get_paths()[0].get_extents().y1 for band in bands]
    assert len(bands) == len(names) and tops[-1] == pytest.approx(1.0)
    assert [to_hex(band.get_facecolor()[0]).upper() for band in bands] == list(model_colours(names).values())


def test_of_many_models_the_most_called_have_bands_and_the_others_one(figures):
    lines = [{"step": i} | {f"calls/share/m{j:02}": (30 - j) / 465 for j in range(30)} for i in range(5)]
    report.calls_per_model(lines, "unused.png")
    bands = figures[0].axes[0].collections
    colours = [to_hex(band.get_facecolor()[0]).upper() for band in bands]
    assert len(bands) == 11 == len(set(colours)) and colours[0] == GREY.upper()
    tops = [band.get_paths()[0].get_extents().y1 for band in bands]
    assert tops[0] == pytest.approx(sum(range(1, 21)) / 465) and tops[-1] == pytest.approx(1.0)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[-1] == "20 others  45 %" and labels[-2] == "m00  6 %"  # from top to bottom, as the bands


def labels_of(figure):
    """Name -> pixel box of every label in the exact-match plot."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in texts}


POLICY = {"name": "trained", "em": 0.5, "em_ci": [0.46, 0.55], "dollars_per_question": 1e-5}
POLICY |= {"calls_share": {f"Model-{i}": 0.0 for i in range(6)} | {"Titan": 1.0}}
points = st.tuples(st.floats(1e-6, 1e-3), st.floats(0, 1))


@settings(max_examples=12, deadline=None)
@given(st.lists(points, min_size=1, max_size=8), st.booleans())
def test_labels_never_overlap_and_stay_inside(places, crowded):
    if crowded:
        places = [(2e-5 * (1 + cost), 0.3 + 0.02 * em) for cost, em in places]
    names = ["oracle (alpha 0)", "random choice", *(f"Model-{i} alone" for i in range(6))]
    rows = [
        {"name": name, "em": em, "dollars_per_question": cost} for name, (cost, em) in zip(names, places, strict=False)
    ]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
        report.em_against_cost({"policies": [POLICY], "reference_policies": rows}, "unused.png")
    rows.append(POLICY)
    boxes = labels_of(drawn[0])
    assert set(boxes) == {row["name"] for row in rows}
    for (_, one), (_, two) in itertools.combinations(boxes.items(), 2):
        assert not one.padded(-1).overlaps(two.padded(-1))
    axes = drawn[0].axes[0]
    for row in rows:
        x, y = axes.transData.transform((row["dollars_per_question"], row["em"]))
        assert not any(box.padded(-1).contains(x, y) for box in boxes.values())
    frame = axes.get_window_extent()
    assert all(frame.padded(2).contains(*corner) for box in boxes.values() for corner in (box.min, box.max))


def test_the_arrow_leads_from_the_warm_start_to_the_trained_router(figures, results):
    report.em_against_cost(results, "unused.png")
    arrow = next(text for text in figures[0].axes[0].texts if not text.get_text())
    trained, warm = results["policies"]
    assert arrow.xy == (trained["dollars_per_question"], trained["em"])
    assert arrow.xyann == (warm["dollars_per_question"], warm["em"])


def test_a_policy_that_never_calls_is_shown_and_marked(figures, results):
    results["policies"][1]["dollars_per_question"] = 0.0
    report.em_against_cost(results, "unused.png")
    assert "warm start · $0" in labels_of(figures[0])


@pytest.mark.parametrize("references", [[], [{"name": "Titan alone", "em": 0.0, "dollars_per_question": 0.0}]])
def test_one_policy_is_enough(tmp_path, references):
    policy = POLICY | {"em": 0.0, "em_ci": [0.0, 0.0], "dollars_per_question": 0.0}
    assert report.em_against_cost({"policies": [policy], "reference_policies": references}, tmp_path / "x.png").exists()


def test_a_model_has_one_colour_in_all_plots(figures, metrics, results):
    report.calls_per_model(metrics, "unused.png")
    report.calls_by_dataset(results, "unused.png")
    report.em_against_cost(results, "unused.png")
    bands, bars, _ = (figure.axes[0] for figure in figures)
    in_bands = {to_hex(band.get_facecolor()[0]) for band in bands.collections}
    in_bars = [to_hex(container[0].get_facecolor()) for container in bars.containers]
    dots = {to_hex(line.get_color()) for line in figures[2].axes[0].lines if line.get_markersize() == 8}
    assert in_bands == set(in_bars) == dots and len(dots) == 5
    assert len(model_colours([f"m{i}" for i in range(23)])) == 23


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.234e-5, "$0.00001234"),
        (0.5, "$0.5000"),
        (12.3456, "$12.35"),
        (2500, "$2,500.00"),
        (0, "$0"),
        (-1.3e-5, "-$0.00001300"),
    ],
)
def test_dollars(value, text):
    assert dollars(value) == text


def test_percent():
    assert (percent(0.7345), percent(1)) == ("73.5 %", "100.0 %")


def test_slots_show_each_span_where_it_lies(figures):
    spans = [[0, "prefill", 0.0, 1.0], [0, "decode", 1.0, 2.5], [0, "wait", 2.5, 4.0], [2, "decode", 0.5, 3.0]]
    report.slots_over_time({"step": 7, "seconds": 4.0, "rows": 3, "idle_share": 0.25, "spans": spans}, "unused.png")
    (axes,) = figures[0].axes
    bars = {(round(b.get_y() + 0.42), b.get_x(), b.get_x() + b.get_width()) for c in axes.containers for b in c}
    assert bars == {(row, start, end) for row, _, start, end in spans}
    assert axes.get_title(loc="left") == "Slots in the rollout of step 7" and "25.0 %" in axes.get_xlabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["decode 33 %", "prefill 8 %", "wait for a reply 12 %"]
    assert axes.get_ylim() == (2.5, -0.5)  # row 0 on top


def test_slots_without_a_span_draw_nothing(tmp_path):
    assert report.slots_over_time({}, tmp_path / "x.png") is None and not (tmp_path / "x.png").exists()


def test_a_sweep_has_a_dot_per_run_and_a_bar_per_setting(figures):
    run = {"em": 0.4, "dollars_per_question": 1e-5}
    runs = [run | {"overrides": {"reward.alpha": a, "seed": s}, "em": a + s / 10} for a in (0.0, 0.6) for s in (1, 2)]
    mean = {"dollars_per_question": {"mean": 1e-5, "ci": None}}
    settings = [mean | {"setting": {"reward.alpha": a}, "em": {"mean": a + 0.15, "ci": None}} for a in (0.0, 0.6)]
    report.sweep_plot({"runs": runs, "settings": settings}, "unused.png")
    bars, dots = figures[0].axes[0].lines
    assert list(bars.get_xdata()) == [0.15, 0.75] and list(bars.get_ydata()) == [0, 1]
    assert list(dots.get_xdata()) == [0.1, 0.2, 0.7, 0.8] and list(dots.get_ydata()) == [0, 0, 1, 1]
    assert [text.get_text() for text in figures[0].axes[0].get_yticklabels()] == [
        "reward.alpha=0.0",
        "reward.alpha=0.6",
    ]
