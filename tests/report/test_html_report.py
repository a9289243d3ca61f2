"""The report page: what a reader sees, read back with an HTML parser that knows nothing of how it was made."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import fake_datasets

import router_r1_jax.report.html_report as page_module
from router_r1_jax.evaluate import write_results
from router_r1_jax.report.calls_plot import calls_per_model
from router_r1_jax.report.html_report import write_report
from router_r1_jax.storage.json_lines import BrokenFileError
from router_r1_jax.storage.metrics_writer import read_metrics

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Elements in order as (tag, attributes, text inside), and a check that every element is closed."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag, kind=None):
        return [e for e in self.elements if e[0] == tag and (kind is None or kind in e[1].get("class", "").split())]


def page_of(workdir, results, **others):
    return Page(write_report(workdir, results, read_metrics(workdir), others).read_text(encoding="utf-8"))


def rows_of(page):
    """First words of a table row -> its cells' text."""
    rows, cells = {}, []
    for tag, _, text in page.elements:
        if tag == "tr":
            cells = []
        elif tag == "td":
            cells.append(text)
            rows[cells[0]] = cells
    return rows


def test_table_and_tiles_hold_the_results(run, results):
    page = page_of(run, results)
    rows = rows_of(page)
    assert rows["trained"] == [
        "trained",
        "75.3 [70.9, 79.6]",
        "77.1",
        "$0.00001240",
        "1.49",
        "89.1",
        "98.5",
        "0.2",
    ]
    assert rows["Titan alone"][1:4] == ["55.2", "", "$0.00006300"]
    tiles = [tile[2] for tile in page.all("div", "tile")]
    assert "Exact match75.3 %warm start: 23.8 %" in tiles
    assert "Gain in exact match+51.5points, 95 % interval +46.2 to +56.8" in tiles
    assert "Share of the oracle89.4 %84.2 % is the best possible" in tiles


def test_facts_say_where_the_numbers_come_from(run, results):
    page = page_of(run, results)
    facts = dict(zip([e[2] for e in page.all("dt")], [e[2] for e in page.all("dd")], strict=True))
    assert facts["Commit"].startswith("01234567") and facts["Prices read on"] == "2025-05-01"
    assert facts["Versions"] == "python 3.11.9, jax 0.10.2, flax 0.12.8, router_r1_jax 0.1.0"
    assert facts["Seeds"] == "train 0, world 7, bootstrap 0"
    assert '"preset": "official"' in facts["Config"]


def test_the_page_is_self_contained_and_runs_only_its_own_script(run, metrics, results):
    picture = calls_per_model(metrics, run / "plots/calls_per_model.png")
    page = page_of(run, results)
    (image,) = page.all("img")
    assert base64.b64decode(image[1]["src"].removeprefix("data:image/png;base64,")) == picture.read_bytes()
    for _, attributes, _ in page.elements:
        assert not {"href", "onclick", "onerror", "onload"} & set(attributes)
    (script,) = (e for e in page.all("script") if e[1].get("type") != "application/json")
    policy = next(e[1]["content"] for e in page.all("meta") if e[1].get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script[2].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def data_of(page):
    """What the data block holds, read as a browser would."""
    (block,) = (e for e in page.all("script") if e[1].get("type") == "application/json")
    return json.loads(block[2])


def test_a_question_holds_its_policies_episodes(run, results):
    data = data_of(page_of(run, results))
    assert data["policies"] == ["trained", "warm start"] and len(data["questions"]) == 40
    records = [json.loads(line) for line in (run / "episodes/trained.jsonl").read_text().splitlines()]
    questions = {question["id"]: question for question in data["questions"]}
    for record in records:
        question = questions[record["id"]]
        assert (question["question"], question["golds"]) == (record["question"], record["golds"])
        (episode,) = (e for e in question["episodes"] if e["policy"] == 0)
        assert (episode["right"], episode["dollars"]) == (record["exact_match"], record["dollars"])
        assert [call[0] for call in episode["calls"]] == [call["model"] for call in record["calls"]]
        kinds = [kind for kind, _ in episode["segments"]]
        assert kinds == ["think", "search", "information"] * record["hops"] + ["think", "answer"]


def test_other_runs_stand_beside_the_first_policy(run, results):
    records = [json.loads(line) for line in (run / "episodes/trained.jsonl").read_text().splitlines()]
    data = data_of(page_of(run, results, **{"trained of other": records[:7]}))
    assert data["policies"] == ["trained", "trained of other", "warm start"]
    assert sum(e["policy"] == 1 for q in data["questions"] for e in q["episodes"]) == 7
    assert [len(q["episodes"]) for q in data["questions"]][:8] == [3] * 7 + [2]  # what can be compared comes first


def test_a_picture_of_an_earlier_evaluation_is_not_shown(tmp_path, results):
    table, titles = fake_datasets(), []
    for datasets in (table["datasets"], {"nq": table["datasets"]["nq"]}):
        results["policies"] = [policy | table | {"datasets": datasets} for policy in results["policies"]]
        page = Page(write_results(tmp_path, results, {}).read_text())
        titles.append({image[1]["alt"] for image in page.all("img")})
    assert titles[0] - titles[1] == {"em by dataset"} and "calls by dataset" in titles[1]


def test_datasets_samples_and_the_papers_results_are_shown(run, results):
    results["policies"][0] |= fake_datasets() | {
        "samples": {"per_question": 5, "temperature": 0.7, **fake_datasets(0.2)}
    }
    page = page_of(run, results)
    titles = [e[2] for e in page.all("h3")]
    assert titles == [
        "trained, step 120: greedy",
        "trained, step 120: 5 samples a question at temperature 0.7",
        "warm start, step 0: greedy",
    ]
    assert "trained minus warm start, on the same questions" in [e[2] for e in page.all("h2")]
    cells = [[]]
    for tag, _, text in page.elements:
        cells.append([]) if tag == "tr" else cells[-1].append(text) if tag == "td" else None
    nq = next(row for row in cells if row[:1] == ["nq"])
    assert nq[1:3] == ["500", "40.0 [36.0, 44.0]"] and nq[-3:] == ["41.0", "-1.0 [-6.0, +4.0]", "within noise"]
    assert sum(row[:1] == ["mean over datasets"] for row in cells) == 2
    gain = next(row for row in cells if row[:2] == ["all", "EM"])
    assert gain[2:] == ["+51.5 [+46.2, +56.8]", "220 / 14 / 166", "3.4e-49"]


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;$title</bdi></div>\ud800\u202e\x00"


def test_hostile_text_is_shown_and_never_becomes_markup(run, results):
    clean = [(tag, sorted(attributes)) for tag, attributes, _ in page_of(run, results).elements]
    results["commit"] = results["versions"]["jax"] = HOSTILE
    for path in (run / "episodes").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record["question"], record["golds"] = HOSTILE, [HOSTILE]
            record["policy"] += HOSTILE
            record["stop"] = record["split"] = HOSTILE
            record["response"] = re.sub(r">([^<]+)</", lambda m: f"> {HOSTILE} </", record["response"])
            for call in record["calls"]:
                call["model"] = call["outcome"] = call["query"] = call["reply"] = HOSTILE
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = page_of(run, results)

    def skeleton(elements):  # model names are no longer known: their coloured dots and bold names go
        return [(tag, attrs) for tag, attrs in elements if tag not in ("i", "span", "label", "select", "option")]

    assert skeleton([(t, sorted(a)) for t, a, _ in page.elements]) == skeleton(clean)
    texts = [text for q in data_of(page)["questions"] for e in q["episodes"] for _, text in e["segments"]]
    assert any("<script>alert(1)</script>" in text for text in texts)
    assert len(page.all("script")) == 2 and not page.all("img")


def test_the_script_writes_text_and_never_markup():
    script = Path(page_module.__file__).with_name("page.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "setAttribute", "srcdoc"):
        assert way not in script, way


def test_a_router_that_was_not_trained_here_has_a_page_without_configuration(run, results):
    """As `evaluate` makes it of weights in Hugging Face format, which are at no step."""
    (run / "config.json").unlink()
    (run / "metrics.jsonl").unlink()
    results |= {"policies": [results["policies"][0] | {"checkpoint": None}], "gain": {}}
    page = page_of(run, results)
    assert "Config" not in [e[2] for e in page.all("dt")] and page.all("select")
    assert [e[2] for e in page.all("h3")] == ["trained: greedy"]
    assert page.all("p", "muted")[0][2] == "evaluated on 400 questions of the test split"


def test_a_broken_episode_file_is_named(run, results):
    (run / "episodes/trained.jsonl").write_text('{"half": \n{}\n')
    with pytest.raises(BrokenFileError, match="trained.jsonl, line 1 is not JSON"):
        page_of(run, results)


def test_real_data_have_no_references(run, results):
    results |= {"reference_policies": [], "policies": results["policies"][:1], "gain": {}}
    page = page_of(run, results)
    assert set(rows_of(page)) == {"trained", "synthetic"}
    assert "oracle" not in page.all("main")[0][2].split("Episodes")[0]
