"""The report of a run: one self-contained HTML page made of whatever its folder holds.

Everything that a model, a provider or a data set wrote is escaped, and the page's security policy runs no script but
its own: a reply that holds markup is shown, not obeyed.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from router_r1_jax.report.episodes import Episode, Packed, pack
from router_r1_jax.report.style import dollars, model_colours, model_names, percent, significant_decimals
from router_r1_jax.report.writer import read_episodes, read_metrics, replace_file

_CAPTIONS = {
    "em_by_set": "Exact match on every set; orange lines are the published figures.",
    "calls_by_set": "Whom the router asks.",
    "em_against_cost": "Exact match over price: stars are the best possible policies, dots always ask one model, the "
    "arrow leads from the warm start to the trained router. Bars are 95 % intervals.",
    "learning_curves": "Each metric over the training steps: raw values faint, running mean bold.",
    "calls_per_model": "Who is asked as training goes on.",
    "slots_over_time": "What each row of the sampling loop did in one rollout: no row waits for another's reply, and a "
    "free one takes the next question.",
}  # in this order on the page; other pictures follow


def write_report(workdir: str | Path, others: Mapping[str, Sequence[Episode]] | None = None) -> Path:
    """Write `<workdir>/report.html` from results.json, metrics.jsonl, config.json, plots/*.png and episodes/*.jsonl.

    What is missing or unreadable is said on the page, and the rest is shown. `others` are episodes of other runs by the
    name of their policy, to be read beside this run's.

    Raises:
        FileNotFoundError: workdir is not a folder.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder; give the --workdir of a run")
    notices: list[str] = []
    results = _try_json(workdir / "results.json", notices, "run the evaluation for the table")
    config = _try_json(workdir / "config.json", notices, "")
    metrics = _try_lines(read_metrics, workdir, notices)
    episodes = _try_lines(read_episodes, workdir, notices)
    for name, theirs in (others or {}).items():
        episodes = [*episodes, *({**episode, "policy": name} for episode in theirs)]
    own = [str(policy["name"]) for policy in results.get("policies") or ()]
    order = [*own[:1], *(others or {}), *own[1:]]
    colours = model_colours(model_names(metrics, results))
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Template(_resource("page.html")).substitute(
        title=f"Router run: {escape(workdir.resolve().name)}",
        subtitle=escape(_subtitle(results, metrics)),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=_resource("page.css"),
        script=script,
        notices="".join(f'<p class="notice">{escape(notice)}</p>' for notice in notices),
        headline=_headline(results, colours),
        plots=_plots(sorted((workdir / "plots").glob("*.png"))),
        episodes=_episodes(pack(episodes, colours, order)),
        facts=_facts(results, metrics, config),
    )
    path = workdir / "report.html"
    replace_file(path, page.encode("utf-8", errors="replace"))  # external text may hold lone surrogates
    return path


def _resource(name: str) -> str:
    return files("router_r1_jax.report").joinpath(name).read_text(encoding="utf-8")


def _try_json(path: Path, notices: list[str], remedy: str) -> dict[str, Any]:
    """Contents of a JSON file; {} and a notice where it is unreadable, or missing and there is a remedy."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(contents, dict):
            return contents
        notices.append(f"{path.name} is not a JSON object; write it again.")
    except FileNotFoundError:
        if remedy:
            notices.append(f"There is no {path.name} yet: {remedy}.")
    except ValueError as error:
        notices.append(f"{path.name} is not JSON ({error}); write it again.")
    return {}


def _try_lines(read: Callable[[Path], list[dict[str, Any]]], workdir: Path, notices: list[str]) -> list[dict[str, Any]]:
    try:
        return read(workdir)
    except ValueError as error:
        notices.append(str(error).replace(f"{workdir}/", ""))
        return []


def _subtitle(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    steps = [line["step"] for line in metrics if line.get("phase") != "warmstart"]
    if steps:
        parts.append(f"{max(steps)} training steps")
    if results.get("questions"):
        parts.append(f"evaluated on {results['questions']} questions of the {results.get('split')} split")
    if results.get("changes"):
        parts.append(f"with the pool changed: {', '.join(map(str, results['changes']))}")
    return ", ".join(parts)


def _headline(results: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Tiles that compare the first policy with the second, and the table of all policies and references."""
    policies, references = results.get("policies") or [], results.get("references") or []
    if not policies:
        return ""
    costs = [row.get("dollars_per_question") or 0.0 for row in (*policies, *references)]
    decimals = significant_decimals(min((cost for cost in costs if cost > 0), default=1.0))  # one for the whole column
    rows = "".join(_policy_row(policy, colours, decimals) for policy in policies)
    if references:
        rows += '<tr class="section"><td colspan="9">What other ways of choosing would reach, computed</td></tr>'
        rows += "".join(_policy_row(reference, colours, decimals) for reference in references)
    heads = (
        "", "exact match", "F1", "dollars per question", "calls per question", "calls to a best model",
        "two-hop with two calls", "malformed", "calls by model",
    )  # fmt: skip
    legend = "".join(f'<span><i class="dot" style="background:{c}"></i>{escape(n)}</span>' for n, c in colours.items())
    return (
        f'{_tiles(results)}<h2>Results, answered greedily</h2><div class="card"><div class="scroll"><table><thead><tr>'
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<div class="legend">{legend}</div></div>{_sets(results)}{_comparison(results)}'
    )


def _sets(results: Mapping[str, Any]) -> str:
    """Per policy its sets, the published figure beside them, and the samples at a temperature."""
    rows, published = [], any(policy.get("paper") for policy in results["policies"])
    for policy in results["policies"]:
        tables = [(policy, "greedy")]
        if samples := policy.get("samples"):
            tables.append((samples, f"{samples['per_question']} samples at temperature {samples['temperature']:g}"))
        for table, how in tables:
            suites, paper = table.get("suites") or {}, table.get("paper") or {}
            if len(suites) < 2 and how == "greedy" and not paper:
                continue  # the table above says it all
            own = [*suites.items(), *([("mean over sets", table)] if len(suites) > 1 else [])]
            title = f"{escape(str(policy['name']))}, {how}"
            rows.append(f'<tr class="section"><td colspan="10">{title}</td></tr>')
            for name, entry in own:
                beside = (paper.get("mean" if entry is table else name),) if published else ()
                rows.append(_set_row(name, entry, beside))
    if not rows:
        return ""
    heads = (
        "", "questions", "exact match", *(("paper's",) if published else ()), "F1", "sub-EM", "calls", "dollars",
        "malformed", "seconds in calls",
    )  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    model = escape(str(results.get("paper_model")))
    note = (
        f'<p class="muted">The paper\'s exact match is that of {model}; "differs" and "within noise" count the noise '
        "of both. More intervals stand in results.md.</p>"
    )
    return (
        f'<h2>By set</h2><div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note if published else ''}</div>"
    )


def _set_row(name: str, entry: Mapping[str, Any], papers: Sequence[Mapping[str, Any] | None]) -> str:
    """One set; `papers` has one entry where there is a column for the published figure."""
    cells = (
        escape(name),
        str(entry["questions"]),
        _em(entry),
        *(f"{percent(paper['em'])}: {escape(str(paper['verdict']))}" if paper else "" for paper in papers),
        percent(entry["f1"]),
        percent(entry["sub_em"]),
        f"{entry['calls_per_question']:.2f}",
        dollars(entry["dollars_per_question"]),
        percent(entry["malformed_share"]),
        f"{entry['call_seconds_per_question']:.2f}",
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _em(row: Mapping[str, Any]) -> str:
    """Exact match in percent, with its interval where there is one."""
    em = percent(row.get("em"))
    if row.get("em_ci"):
        em += ' <span class="interval">[{:.1f}, {:.1f}]</span>'.format(*(100 * end for end in row["em_ci"]))
    return em


def _comparison(results: Mapping[str, Any]) -> str:
    """What separates the first policy from the baseline and from the other run, question by question."""
    found = []
    if results.get("gain") and len(results["policies"]) > 1:
        found.append((results["policies"][1]["name"], results["gain"]))
    if results.get("comparison"):
        found.append((results["comparison"]["with"], results["comparison"]))
    rows = []
    for name, table in found:
        rows.append(f'<tr class="section"><td colspan="5">minus {escape(str(name))}</td></tr>')
        for key, label, show in _DIFFERENCES:
            if key in table:
                ends, signs = " to ".join(map(show, table[key]["ci"])), table[key]["sign_test"]
                counts = f"{signs['better']} / {signs['worse']}"
                cells = (label, show(table[key]["mean"]), ends, counts, f"{signs['p']:.2g}")
                rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if not rows:
        return ""
    heads = ("", "difference", "95 % interval", "questions higher / lower", "sign test, p")
    head = "".join(f"<th>{name}</th>" for name in heads)
    title = f"{escape(str(results['policies'][0]['name']))} against others, on the same questions"
    return (
        f'<h2>{title}</h2><div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _points(value: float) -> str:
    return f"{_signed(100 * value)} points"


_DIFFERENCES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("em", "exact match", _points),
    ("f1", "F1", _points),
    ("sub_em", "sub-EM", _points),
    ("calls_per_question", "calls per question", lambda value: f"{value:+.2f}".replace("-", "−")),
    ("dollars_per_question", "dollars per question", dollars),
)


def _tiles(results: Mapping[str, Any]) -> str:
    policies = {policy["name"]: policy for policy in results["policies"]}
    now = policies.get("trained", results["policies"][0])
    before = policies.get("warm start") if now["name"] == "trained" else None
    oracles = [row["em"] for row in results.get("references") or () if row["name"].startswith("oracle") and row["em"]]
    gain = (results.get("gain") or {}).get("em")
    tiles = []
    for name, key, show in (
        ("Exact match", "em", percent),
        ("Dollars per question", "dollars_per_question", dollars),
        ("Calls to a best model", "best_model_share", percent),
    ):
        if now.get(key) is not None:
            note = f"{escape(before['name'])}: {show(before.get(key))}" if before else ""
            tiles.append((name, show(now[key]), note))
    if gain:
        low, high = gain["ci"]
        note = f"points, 95 % interval {_signed(100 * low)} to {_signed(100 * high)}"
        tiles.append(("Gain in exact match", _signed(100 * gain["mean"]), note))
    if oracles and now.get("em") is not None:
        note = f"{percent(max(oracles))} is the best possible"
        tiles.append(("Share of the oracle", percent(now["em"] / max(oracles)), note))
    return '<div class="tiles">{}</div>'.format(
        "".join(
            f'<div class="tile"><div class="name">{name}</div><div class="value">{value}</div>'
            f'<div class="before">{note}</div></div>'
            for name, value, note in tiles
        )
    )


def _policy_row(row: Mapping[str, Any], colours: Mapping[str, str], decimals: int) -> str:
    name = escape(str(row["name"]))
    if row.get("checkpoint") is not None:
        name += f' <span class="interval">step {escape(str(row["checkpoint"]))}</span>'
    shares = "".join(
        f'<span title="{escape(model)} {percent(share)}" style="width:{100 * share:.2f}%;background:{colours[model]}">'
        "</span>"
        for model, share in sorted((row.get("calls_share") or {}).items())
        if share
    )
    shown = ("best_model_share", "two_hop_two_calls", "malformed_share")
    cells = (
        name,
        _em(row),
        percent(row["f1"]) if "f1" in row else "",
        dollars(row.get("dollars_per_question"), decimals),
        f"{row['calls_per_question']:.2f}" if row.get("calls_per_question") is not None else "",
        *(percent(row[key]) if key in row else "" for key in shown),
        f'<div class="shares">{shares}</div>' if shares else "",
    )
    kind = ' class="policy"' if "checkpoint" in row else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _plots(paths: Iterable[Path]) -> str:
    pictures = {path.stem: path for path in paths}
    order = [*(name for name in _CAPTIONS if name in pictures), *(name for name in pictures if name not in _CAPTIONS)]
    if not order:
        return ""
    figures = []
    for name in order:
        caption = escape(_CAPTIONS.get(name, name.replace("_", " ")))
        data = base64.b64encode(pictures[name].read_bytes()).decode()
        image = f'<img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{data}">'
        figures.append(f'<figure class="card"><figcaption>{caption}</figcaption>{image}</figure>')
    return f"<h2>Plots</h2>{''.join(figures)}"


_FILTERS = (
    ("split", "questions of"), ("left", "policy"), ("right", "beside"), ("set", "set"), ("hops", "hops"),
    ("outcome", "outcome"), ("model", "asks"), ("stop", "ended by"),
)  # fmt: skip


def _episodes(packed: Packed) -> str:
    """The filters and an empty list, which the script fills from the data block."""
    if not packed.total:
        return ""
    selects = "".join(f'<label>{label} <select name="{name}"></select></label>' for name, label in _FILTERS)
    left_out = f" {packed.total - packed.shown} of {packed.total} are left out for the page's size." * (
        packed.shown < packed.total
    )
    return (
        '<h2 id="episodes">Episodes</h2><p class="muted">Open a question to read what each policy did with it. Kinds '
        f"of outcome take turns in this list, so its order says nothing of their shares.{left_out}</p>"
        f'<div class="filters">{selects}<label>text <input name="words" type="search" size="14"></label>'
        '<span id="count" class="muted"></span></div><noscript><p class="notice">Episodes are drawn by a script of '
        "this page; allow scripts to read them.</p></noscript>"
        '<div id="questions"></div><button id="more" hidden></button>'
        f'<script type="application/json" id="data">{packed.data}</script>'
    )


def _facts(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """Where the numbers come from: code, versions, seeds, prices, time and money, and the whole config."""
    facts = {
        "Commit": results.get("commit"),
        "Config hash": results.get("config_hash"),
        "Versions": _pairs(results.get("versions")),
        "Seeds": _pairs(results.get("seeds")),
        "Prices read on": results.get("price_date"),
    }
    seconds = sum((line.get("rollout_seconds") or 0) + (line.get("update_seconds") or 0) for line in metrics)
    if seconds:
        facts["Rollout and update"] = f"{seconds / 60:.1f} minutes"
    spent = [line["spent_dollars"] for line in metrics if line.get("spent_dollars") is not None]
    if spent:
        facts["Paid to providers in training"] = dollars(spent[-1])
    rows = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    if config:
        dump = escape(json.dumps(config, indent=2, ensure_ascii=False))
        rows += f"<dt>Config</dt><dd><details><summary>show</summary><pre>{dump}</pre></details></dd>"
    return f'<h2>Run</h2><div class="card"><dl>{rows}</dl></div><footer></footer>' if rows else ""


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items())
