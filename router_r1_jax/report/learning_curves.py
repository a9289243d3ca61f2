"""Learning curves: small plots of reward, exact match, KL, entropy, format faults and speed over the training steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from router_r1_jax.report.colours import INK, PALETTE
from router_r1_jax.report.plot_style import dress, new_figure, save_figure

Metrics = Sequence[Mapping[str, Any]]

VALIDATION_PREFIX = "val/"


class _Panel(NamedTuple):
    """One small plot: its title, the unit of its y axis, and the keys of its metrics."""

    title: str
    unit: str
    keys: Sequence[str]


_PANELS = (
    _Panel("Reward per episode", "", [f"reward/{part}" for part in ("total", "cost", "outcome", "format")]),
    _Panel("Exact match", "%", ["em", "val/em"]),
    _Panel("Calls to a model that is best for the domain", "%", ["best_model_share", "val/best_model_share"]),
    _Panel("Dollars per question", "$", ["dollars_per_question", "val/dollars_per_question"]),
    _Panel("Calls per question", "", ["calls_per_question", "val/calls_per_question"]),
    _Panel("Malformed episodes", "%", ["malformed_share"]),
    _Panel("KL to the reference", "nats per token", ["kl"]),
    _Panel("Entropy of the sampler", "nats per token", ["entropy"]),
    _Panel("Gradient norm before clipping", "", ["grad_norm"]),
    _Panel("Tokens whose ratio was clipped", "%", ["clip_share"]),
    _Panel("Questions without a learning signal", "groups", ["zero_variance_groups"]),
    _Panel("Log-prob: sampler against learner", "nats", ["logp_diff_mean", "logp_diff_max"]),
    _Panel("Seconds per step", "s", ["rollout_seconds", "update_seconds"]),
    _Panel("Sampled tokens per second", "", ["tokens_per_second"]),
    _Panel("Sampled tokens per episode", "", ["response_tokens"]),
)
_PREFIXES = {"Reward hacking, most frequent": "reward_hacking/", "Format faults, most frequent": "format/"}
_WARMSTART_PANEL = _Panel("Warm start: supervised loss", "nats per token", ["warmstart/loss"])


def learning_curves(metrics: Metrics, path: str | Path) -> Path | None:
    """Small plots of the training metrics over the steps: raw values faint, running means bold.

    Args:
        metrics: lines of metrics.jsonl. A panel without any value is left out, and a null is skipped.
        path: PNG to write; its folder is made if it is missing.

    Returns:
        The path, or None if there is nothing to draw.
    """
    prefixed = (_prefix_panel(title, prefix, metrics) for title, prefix in _PREFIXES.items())
    panels = [*_PANELS, *prefixed, _WARMSTART_PANEL]
    panels = [panel for panel in panels if any(len(curve(metrics, key)[0]) for key in panel.keys)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.3 * columns, 2.7 * rows)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        dress(axes, panel.title, panel.unit, "step" if i >= len(panels) - columns else "")
        _draw_curves(axes, panel, metrics)
    return save_figure(figure, path)


def _prefix_panel(title: str, prefix: str, lines: Metrics) -> _Panel:
    """The shares whose keys begin with this prefix and whose means are highest, without those that are always 0."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith(prefix))
    means = {key: float(np.mean(curve(lines, key)[1])) for key in keys}
    found = sorted((key for key, mean in means.items() if mean > 0), key=lambda key: -means[key])
    return _Panel(title, "%", found[: len(PALETTE)])


def _label(panel: _Panel, key: str) -> str:
    if VALIDATION_PREFIX + key in panel.keys:
        return "train, sampled"
    return "validation" if key.startswith(VALIDATION_PREFIX) else key.rpartition("/")[2].replace("_", " ")


def _draw_curves(axes: Axes, panel: _Panel, lines: Metrics) -> None:
    for colour, key in zip(PALETTE, panel.keys, strict=False):
        label, (steps, values) = _label(panel, key), curve(lines, key)
        if not len(steps):
            continue
        if key.startswith(VALIDATION_PREFIX):  # only on a few steps, so the values are dots and no mean is taken
            axes.plot(steps, values, "o-", color=colour, markersize=3.5, linewidth=1.2, label=label)
        else:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            marker = {"marker": "o", "markersize": 3.5} if len(steps) == 1 else {}  # a line of one point is invisible
            axes.plot(steps, running_mean(values), color=colour, linewidth=1.7, label=label, **marker)
    axes.margins(y=0.12)
    if panel.unit == "%":  # no share lies below 0
        bottom, _ = axes.get_ylim()
        top = axes.dataLim.ymax * 1.12 or 0.01
        axes.set_ylim(max(bottom, -0.04 * top), top)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=7.5, frameon=True, framealpha=0.8, edgecolor="none", labelcolor=INK, borderpad=0.2)


def curve(lines: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, wherever it is a number."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a tenth of the run. At the ends the window is shorter, not padded."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)
