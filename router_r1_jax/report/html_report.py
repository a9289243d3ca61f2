"""Report page (HTML): one self-contained file made from the metrics, results, plots and episodes of a run.

The Jinja templates hold all tags and format the numbers. Jinja escapes everything that a model, a
provider or a dataset wrote, and the page's security policy runs only the page's own script. A reply that holds markup
is shown, not obeyed.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from router_r1_jax.report.colours import model_colours, model_names
from router_r1_jax.report.documents import render
from router_r1_jax.report.episode_data import Episode, pack_episodes
from router_r1_jax.report.number_format import significant_decimals
from router_r1_jax.report.tables import paired_differences
from router_r1_jax.storage.json_lines import read_episodes, replace_file
from router_r1_jax.storage.metrics_writer import read_metrics

Row = Mapping[str, Any]


def write_report(workdir: str | Path, others: Mapping[str, Sequence[Episode]] | None = None) -> Path:
    """Write `<workdir>/report.html` from results.json, metrics.jsonl, config.json, plots/*.png and episodes/*.jsonl.

    If a file is missing or unreadable, the page says so and shows the rest. `others` are episodes of other runs, by the
    name of their policy. The page shows them beside this run's episodes.

    Raises:
        FileNotFoundError: workdir is not a folder.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder; give the --workdir of a run")
    notices: list[str] = []
    results = _try_read(_read_json, workdir / "results.json", {}, notices)
    config = _try_read(_read_json, workdir / "config.json", {}, notices)
    metrics = _try_read(read_metrics, workdir, [], notices)
    episodes = _try_read(read_episodes, workdir, [], notices)
    if not (workdir / "results.json").exists():
        notices.append("There is no results.json yet: run the evaluation for the table.")
    for name, records in (others or {}).items():
        episodes = [*episodes, *({**record, "policy": name} for record in records)]
    policies, references = results.get("policies") or [], results.get("reference_policies") or []
    first, *rest = [str(policy["name"]) for policy in policies] or [""]
    colours, script = model_colours(model_names(metrics, results)), _resource("page.js")
    costs = [row["dollars_per_question"] for row in (*policies, *references) if row.get("dollars_per_question")]
    pictures = {path.stem: path for path in sorted((workdir / "plots").glob("*.png"))}
    page = render(
        "page.html",
        name=workdir.resolve().name,
        notices=notices,
        style=_resource("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        results=results,
        policies=policies,
        references=references,
        colours=colours,
        cost_decimals=significant_decimals(min(costs, default=1.0)),  # the same for the whole column
        best_em=max((row["em"] or 0.0 for row in references if row["name"].startswith("oracle")), default=0.0),
        dataset_sections=_dataset_sections(policies),
        has_paper=any(policy.get("paper") for policy in policies),
        comparisons=paired_differences(results),
        pictures={name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()},
        episodes=pack_episodes(episodes, colours, [first, *(others or {}), *rest]),
        last_step=max((line["step"] for line in metrics if line.get("phase") != "warmstart"), default=0),
        minutes=sum((line.get("rollout_seconds") or 0) + (line.get("update_seconds") or 0) for line in metrics) / 60,
        spent=[line["spent_dollars"] for line in metrics if line.get("spent_dollars") is not None][-1:],
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )
    path = workdir / "report.html"
    replace_file(path, page.encode("utf-8", errors="replace"))  # external text may hold lone surrogates
    return path


def _resource(name: str) -> str:
    return files("router_r1_jax.report").joinpath(name).read_text(encoding="utf-8")


def _try_read(read: Callable[[Path], Any], path: Path, default: Any, notices: list[str]) -> Any:
    """The contents of a file, or the default and a notice if the file is broken."""
    try:
        return read(path)
    except ValueError as error:
        notices.append(str(error).replace(f"{path}/", ""))
        return default


def _read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file; {} if there is none. Raises ValueError if it is no JSON object."""
    if not path.exists():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error}); write it again.") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path.name} is not a JSON object; write it again.")
    return contents


def _dataset_sections(policies: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Title and rows of every policy's datasets, answered greedily and, if there are samples, at a temperature."""
    sections = []
    for policy in policies:
        tables = {"greedy": policy}
        if samples := policy.get("samples"):
            tables[f"{samples['per_question']} samples at temperature {samples['temperature']:g}"] = samples
        for mode, table in tables.items():
            datasets, paper = table.get("datasets") or {}, table.get("paper") or {}
            rows = [{**entry, "name": name, "paper": paper.get(name)} for name, entry in datasets.items()]
            if len(datasets) > 1:
                rows.append({**table, "name": "mean over datasets", "paper": paper.get("mean")})
            elif table is policy and not paper:
                continue  # the results table shows the same numbers
            sections.append((f"{policy['name']}, {mode}", rows))
    return sections
