"""Report page (HTML): one self-contained file made from the metrics, results, plots and episodes of a run.

The Jinja templates hold all tags. Jinja escapes everything that a model, a provider or a dataset wrote, and the page's
security policy runs only the page's own script. A reply that holds markup is shown, not obeyed.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from router_r1_jax.report.colours import model_colours
from router_r1_jax.report.episode_data import Episode, pack_episodes
from router_r1_jax.report.tables import render_results
from router_r1_jax.storage.json_lines import read_episodes, replace_file


def write_report(
    workdir: Path,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    others: Mapping[str, Sequence[Episode]],
) -> Path:
    """Write `<workdir>/report.html`; config.json, plots/*.png and episodes/*.jsonl are read from the workdir.

    Args:
        workdir: folder of the results; its config.json may be missing.
        results: contents of results.json.
        metrics: lines of metrics.jsonl; [] if there was no training.
        others: episodes of other runs, by the name of their policy. The page shows them beside this run's episodes.

    Raises:
        BrokenFileError: a line of an episode file before the last is no JSON object.
    """
    episodes = read_episodes(workdir)
    for name, records in others.items():
        episodes += [{**record, "policy": name} for record in records]
    first, *rest = [policy["name"] for policy in results["policies"]]
    script, config = _resource("page.js"), workdir / "config.json"
    oracles = [row["em"] for row in results["reference_policies"] if row["name"].startswith("oracle")]
    page = render_results(
        "page.html",
        results,
        name=workdir.name,
        style=_resource("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        best_em=max(oracles, default=0.0),
        pictures={
            path.stem: base64.b64encode(path.read_bytes()).decode() for path in sorted(workdir.glob("plots/*.png"))
        },
        episodes=pack_episodes(episodes, model_colours(results["policies"][0]["calls_share"]), [first, *others, *rest]),
        last_step=max((line["step"] for line in metrics if line.get("phase") != "warmstart"), default=0),
        minutes=sum(line.get("rollout_seconds", 0) + line.get("update_seconds", 0) for line in metrics) / 60,
        spent=[line["spent_dollars"] for line in metrics if "spent_dollars" in line][-1:],
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )
    path = workdir / "report.html"
    replace_file(path, page.encode("utf-8", errors="replace"))  # external text may hold lone surrogates
    return path


def _resource(name: str) -> str:
    return files("router_r1_jax.report").joinpath(name).read_text(encoding="utf-8")
