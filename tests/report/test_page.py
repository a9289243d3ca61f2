"""The report page: what a reader sees, read back with an HTML parser that knows nothing of how it was made."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.report.episodes import choose_questions, render_question
from router_r1_jax.report.page import write_report
from router_r1_jax.report.plots import calls_per_model
from router_r1_jax.report.writer import EpisodeWriter

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


def page_of(workdir):
    return Page(write_report(workdir).read_text(encoding="utf-8"))


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


def test_table_and_tiles_hold_the_results(run):
    page = page_of(run)
    rows = rows_of(page)
    assert rows["trained step 120"][:8] == [
        "trained step 120", "75.3 % [70.9, 79.6]", "77.1 %", "$0.00001240", "1.49", "89.1 %", "98.5 %", "0.2 %",
    ]  # fmt: skip
    assert rows["Titan alone"][1:4] == ["55.2 %", "", "$0.00006300"]
    tiles = [tile[2] for tile in page.all("div", "tile")]
    assert "Exact match75.3 %warm start: 23.8 %" in tiles
    assert "Gain in exact match+51.5points, 95 % interval +46.2 to +56.8" in tiles
    assert "Share of the oracle89.4 %84.2 % is the best possible" in tiles


def test_facts_say_where_the_numbers_come_from(run):
    page = page_of(run)
    facts = dict(zip([e[2] for e in page.all("dt")], [e[2] for e in page.all("dd")], strict=True))
    assert facts["Commit"].startswith("01234567") and facts["Prices read on"] == "2025-05-01"
    assert facts["Versions"] == "python 3.11.9, jax 0.10.2, flax 0.12.8, router_r1_jax 0.1.0"
    assert facts["Seeds"] == "train 0, world 7, bootstrap 0"
    assert '"preset": "official"' in facts["Config"]


def test_the_page_is_self_contained_and_runs_only_its_own_script(run, metrics):
    picture = calls_per_model(metrics, run / "plots/calls_per_model.png")
    page = page_of(run)
    (image,) = page.all("img")
    assert base64.b64decode(image[1]["src"].removeprefix("data:image/png;base64,")) == picture.read_bytes()
    for _, attributes, _ in page.elements:
        assert not {"href", "onclick", "onerror", "onload"} & set(attributes)
    (script,) = page.all("script")
    policy = next(e[1]["content"] for e in page.all("meta") if e[1].get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script[2].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def test_an_episode_shows_its_segments_calls_and_score(run):
    episodes = page_of(run).all("section", "episode")
    assert len(episodes) == 80 and {e[1]["data-policy"] for e in episodes} == {"warm start", "trained"}
    record = json.loads((run / "episodes/trained.jsonl").read_text().split("\n")[1])
    page = Page(render_question([record], {"Aria": "#000"}))
    kinds = [e[1]["class"].split()[1] for e in page.all("div", "segment")]
    assert kinds == ["think", "search", "information", "think", "search", "information", "think", "answer"]
    assert len(page.all("li")) == len(record["calls"]) == 2
    assert page.all("span", "gold")[0][2] == f"gold: {record['golds'][0]}"
    assert page.all("span", "verdict")[0][2] == ("right" if record["exact_match"] else "wrong")
    score = page.all("p", "score")[0][2]
    shown = float(re.search(r"cost \$([\d.]+)", score)[1])
    assert shown == pytest.approx(sum(call["charged"] for call in record["calls"]), rel=0.01)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;$title</bdi></div>\ud800\u202e\x00"


def test_hostile_text_is_shown_and_never_becomes_markup(run):
    clean = [(tag, sorted(attributes)) for tag, attributes, _ in page_of(run).elements]
    results = json.loads((run / "results.json").read_text())
    results["commit"] = results["versions"]["jax"] = HOSTILE
    (run / "results.json").write_text(json.dumps(results))
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
    page = page_of(run)

    def skeleton(elements):  # model names are no longer known: their coloured dots and bold names go
        return [(tag, attrs) for tag, attrs in elements if tag not in ("i", "span", "label", "select", "option")]

    assert skeleton([(t, sorted(a)) for t, a, _ in page.elements]) == skeleton(clean)
    segments = [e[2] for e in page.all("div", "segment")]
    assert any("<script>alert(1)</script>" in text for text in segments)
    assert len(page.all("script")) == 1 and not page.all("img")


PIECES = (
    "<think>", "</think>", "<search>", "</search>", "<information>", "</answer>", "Aria", ":", "<b>", "'", '"', "&",
    " ", "x", "\u2028",
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text(max_size=10))
def test_any_response_gives_balanced_html_with_all_its_text(response, model):
    page = Page(render_question([{"response": response, "calls": [{"model": model}]}], {"Aria": "#000"}))
    shown = "".join(e[2] for e in page.all("bdi"))
    stripped = re.sub(r"</?(think|search|information|answer)>", "", response)
    for word in ("Aria", "<b>", "x", "&"):
        assert shown.count(word) >= stripped.count(word)


def test_an_empty_folder_still_gives_a_page(tmp_path):
    page = page_of(tmp_path)
    assert "There is no results.json yet" in page.all("p", "notice")[0][2]
    assert not page.all("table") and not page.all("img") and not page.all("article")


@pytest.mark.parametrize("missing", ["results.json", "metrics.jsonl", "config.json", "episodes"])
def test_what_is_missing_takes_nothing_else_away(run, missing):
    path = run / missing
    path.rename(run / "elsewhere")
    page = page_of(run)
    assert bool(page.all("table")) == (missing != "results.json")
    assert bool(page.all("article")) == (missing != "episodes")


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl", "episodes/trained.jsonl"])
def test_what_is_broken_is_named_and_the_rest_is_shown(run, name):
    (run / name).write_text('{"half": \n{}\n')
    notice = page_of(run).all("p", "notice")[0][2]
    assert notice.startswith(name)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="--workdir"):
        write_report(tmp_path / "nowhere")


def test_real_data_have_no_references(run):
    results = json.loads((run / "results.json").read_text())
    results |= {"references": [], "policies": results["policies"][:1], "gain": {}}
    (run / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    assert len(rows_of(page)) == 1 and "oracle" not in page.all("main")[0][2].split("Episodes")[0]


def episode(number, policy, step, right, hops=1, split="test"):
    return {"id": number, "split": split, "policy": policy, "step": step, "exact_match": right, "hops": hops}


def test_the_sample_shows_rare_outcomes_and_compares_first():
    episodes = [episode(n, "warm start", 0, n % 2) for n in range(300)]
    episodes += [episode(n, "trained", 50, 1) for n in range(298)]  # two questions have one policy only
    episodes += [episode(298, "trained", 50, 0), episode(900, "train", 10, 0, split="train")]
    questions = choose_questions(episodes, per_split={"test": 6, "train": 5})
    assert [len(question) for question in questions] == [2] * 6 + [1]
    outcomes = [tuple(e["exact_match"] for e in question) for question in questions[:6]]
    assert outcomes[:3] == [(0, 1), (1, 1), (0, 0)]
    assert questions[-1][0]["split"] == "train" and len(questions) == 7


def test_a_question_keeps_first_middle_and_last_of_many_checkpoints():
    episodes = [episode(1, "validation", step, 0) for step in (60, 20, 80, 40, 100)]
    episodes += [episode(1, "validation", 20, 1)]  # a second episode of one policy at one step
    (question,) = choose_questions(episodes, per_split={"test": 9})
    assert [(e["step"], e["exact_match"]) for e in question] == [(20, 0), (60, 0), (100, 0)]


def test_five_hundred_episodes_give_a_page_of_moderate_size(run):
    lines = (run / "episodes/trained.jsonl").read_text().splitlines()
    writer = EpisodeWriter(run, "trained")
    writer.write(json.loads(lines[n % len(lines)]) | {"id": f"test-{n}"} for n in range(500))
    writer.close()
    path = write_report(run)
    assert len(Page(path.read_text()).all("article")) == 60
    assert path.stat().st_size < 1_000_000
