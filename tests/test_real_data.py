"""Train and evaluate on prepared data sets, end to end: FlashRAG JSONL, models behind HTTP, results by data set."""

import json
from pathlib import Path

import mains
import pytest
from pool.scripted_provider import completion, serving
from tiny_config import get_config

from router_r1_jax.config import PAPER_SETS
from router_r1_jax.data import prepare
from router_r1_jax.synthetic.world import World

pytestmark = pytest.mark.slow

FLASHRAG = Path(__file__).parent / "data" / "flashrag"
WORLD = World(get_config().synthetic.world)
KNOWS_ALL = {domain: 1.0 for domain in ("film", "music", "sport", "people", "places")}


def write_own_set(folder):
    """The world's questions as JSONL, with ids that other sets have too."""
    folder.mkdir()
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        rows = [
            {"id": f"{stem}_{i}", "question": question.text, "golden_answers": list(question.golds), "metadata": {}}
            for i, question in enumerate(WORLD.questions(split))
        ]
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def models():
    """An OpenAI-compatible server whose models know the world, and give one fixed reply to every other question."""

    def answer(number, body):
        if body is None:
            return 200, {}, b"{}"
        query = body["messages"][-1]["content"]
        known = WORLD.lookup(query)
        return completion(WORLD.reply(query, KNOWS_ALL) if known else "The answer is elsewhere.")

    with serving(answer) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def run(finished_run, models, tmp_path_factory):
    """Workdir of a router that was trained and evaluated on prepared sets."""
    root = tmp_path_factory.mktemp("real")
    write_own_set(root / "mine")
    prepare.main(sets="mine", source=str(root), dir=str(root / "data"))
    prepare.main(sets="paper", source=str(FLASHRAG), dir=str(root / "data"))
    mains.succeed("export", finished_run, f"--folder={root / 'router'}", "--checkpoint=first")
    arg = f"data={root / 'data'},pool={models.base_url},source={root / 'router'}"
    config = f"{Path(__file__).with_name('real_config.py')}:{arg}"
    mains.succeed("train", root / "run", config=config)
    mains.succeed("evaluate", root / "run", config=config)
    return root / "run"


def episodes(run, *parts):
    lines = [line for path in (run / "episodes").glob("*.jsonl") for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["split"] in parts]


def test_every_split_asks_the_questions_of_its_sets_and_no_other(run):
    asked = {split: {e["id"] for e in episodes(run, split)} for split in ("train", "validation", "test")}
    datasets = {split: {name.partition("/")[0] for name in ids} for split, ids in asked.items()}
    assert datasets["train"] <= {"mine", "hotpotqa"} and "mine" in datasets["train"]
    assert datasets["validation"] == {"mine", "nq"}
    assert datasets["test"] == {"mine", *PAPER_SETS}
    files = {split: {name.split("/")[1] for name in ids if name.startswith("mine/")} for split, ids in asked.items()}
    assert files == {"train": {"train"}, "validation": {"dev"}, "test": {"test"}}


def test_the_sampled_questions_are_recorded(run):
    recorded = json.loads((run / "data.json").read_text())
    assert {split: list(recorded[split]["sets"]) for split in recorded} == {
        "train": ["mine", "hotpotqa"],
        "validation": ["mine", "nq"],
        "test": ["mine", *PAPER_SETS],
    }
    counts = [one["questions"] for one in recorded["test"]["sets"].values()]
    assert counts == [5, 5, 3, 5, 4, 3, 3, 4]  # at most five of each
    assert recorded["train"]["sets"]["hotpotqa"]["contaminated"] == 1  # a test question of nq repeats it
    assert recorded["train"]["seed"] == 0 and recorded["train"]["per_set"] == 40
    assert json.loads((run / "results.json").read_text())["data"] == recorded["test"]


def test_the_models_behind_http_are_asked_and_paid(run, models):
    called = [e for e in episodes(run, "train", "test") if e["calls"]]
    assert "The answer is elsewhere." in {call["reply"] for e in called for call in e["calls"]}
    queries = {call["query"] for e in called for call in e["calls"] if call["model"]}
    assert queries and queries <= set(models.queries)
    assert all(e["dollars"] > 0 for e in called if any(call["model"] for call in e["calls"]))


def test_answers_are_compared_with_the_gold_answers_in_the_files(run):
    golds = {}
    for path in (*FLASHRAG.glob("*/*.jsonl"), *run.parent.glob("mine/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            golds[f"{path.parent.name}/{path.stem}/{entry['id']}"] = entry["golden_answers"]
    for e in episodes(run, "train", "validation", "test"):
        assert e["golds"] == golds[e["id"]]
        said = e["response"].rpartition("<answer>")[2].partition("</answer>")[0].strip().lower()
        assert e["exact_match"] == float(said in [gold.lower() for gold in golds[e["id"]]])


def test_the_results_count_every_test_question_once(run):
    results = json.loads((run / "results.json").read_text())
    trained = [e for e in episodes(run, "test") if e["policy"] == "trained"]
    assert len(trained) == len({e["id"] for e in trained}) == 32 == results["questions"]
    found = results["policies"][0]
    for dataset, table in found["datasets"].items():
        own = [e["exact_match"] for e in trained if e["dataset"] == dataset]
        assert table["em"] == pytest.approx(sum(own) / len(own)) and table["questions"] == len(own)
    assert found["em"] == pytest.approx(sum(table["em"] for table in found["datasets"].values()) / 8)
    assert set(found["paper"]) == set(PAPER_SETS)  # our own set is none of them, and their mean none of these eight
