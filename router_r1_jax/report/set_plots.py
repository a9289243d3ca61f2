"""Pictures of an evaluation per data set: exact match beside the published one, and who was asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from router_r1_jax.report.plots import DPI, dress, save
from router_r1_jax.report.style import BLUE, GREY, INK, MUTED, ORANGE, model_colours, model_names, most_called

_POLICY_COLOURS = (BLUE, "#8a8a8a", "#009E73", "#CC79A7")


def em_by_set(results: Mapping[str, Any], path: str | Path) -> Path | None:
    """Exact match of every policy on every set with its 95 % interval, and the paper's figure where it has one.

    Args:
        results: contents of results.json.
        path: PNG to write; its folder is made.

    Returns:
        The path, or None where fewer than two sets were asked.
    """
    policies = results.get("policies") or []
    if not policies or len(policies[0].get("suites") or {}) < 2:
        return None
    names = [*policies[0]["suites"], "mean"]
    figure = Figure(figsize=(max(6.0, 1.25 * len(names) + 1.5), 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(policies)
    for i, policy in enumerate(policies):
        rows = [*policy["suites"].values(), policy]
        em = np.array([row["em"] for row in rows])
        places = np.arange(len(names)) + (i - (len(policies) - 1) / 2) * width
        error = np.abs(np.array([row["em_ci"] for row in rows]).T - em)
        style = {"ecolor": INK, "error_kw": {"linewidth": 1.0}, "capsize": 2}
        colour = _POLICY_COLOURS[i % len(_POLICY_COLOURS)]
        axes.bar(places, em, 0.92 * width, yerr=error, color=colour, label=policy["name"], **style)
    published = policies[0].get("paper") or {}
    shown = [(place, published[name]["em"]) for place, name in enumerate(names) if name in published]
    for number, (place, em) in enumerate(shown):
        label = f"paper, {results['paper_model']}" if number == 0 else None
        axes.hlines(em, place - 0.46, place + 0.46, color=ORANGE, linewidth=2.0, zorder=5, label=label)
    dress(axes, "Exact match per set, 95 % intervals", "%")
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 5 else 0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)


def calls_by_set(results: Mapping[str, Any], path: str | Path) -> Path | None:
    """Share of the calls by model: a bar per set of the first policy, or per policy where there is a single set.

    Arguments as for `em_by_set`; None where nothing was called.
    """
    policies = results.get("policies") or []
    if not policies:
        return None
    suites = policies[0].get("suites") or {}
    bars = suites if len(suites) > 1 else {policy["name"]: policy for policy in policies}
    shares = {name: entry.get("calls_share") or {} for name, entry in bars.items()}
    called = model_names((), results)
    models, others = most_called({name: sum(share.get(name, 0.0) for share in shares.values()) for name in called})
    if not models:
        return None
    colours = model_colours(models if others else called)
    if others:
        rest = {bar: sum(v for name, v in share.items() if name not in models) for bar, share in shares.items()}
        shares = {bar: share | {others: rest[bar]} for bar, share in shares.items()}
        models, colours = [*models, others], colours | {others: GREY}
    figure = Figure(figsize=(8.4, 1.3 + 0.42 * len(bars)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(bars))
    for model in models:
        own = np.array([share.get(model, 0.0) for share in shares.values()])
        axes.barh(range(len(bars)), own, 0.72, left, color=colours[model], label=model, edgecolor="white")
        for row, (start, size) in enumerate(zip(left, own, strict=True)):
            if size >= 0.06:
                middle = {"ha": "center", "va": "center", "fontsize": 8, "color": "white"}
                axes.text(start + size / 2, row, f"{100 * size:.0f}", **middle)
        left += own
    title = f"Which model is asked, by set: {policies[0]['name']}" if len(suites) > 1 else "Which model is asked"
    dress(axes, f"{title} (% of the calls)", "")
    axes.grid(visible=False)
    axes.set_yticks(range(len(bars)), list(bars), color=MUTED)
    axes.set_xticks([])
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=5, loc="upper left", bbox_to_anchor=(0.0, 0.0))
    return save(figure, path)
