"""The draw of a run's questions against sets of ids, and the configuration's sets against what lies on disk."""

import collections
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.config import PAPER_SETS, ConfigError, base_config, model_card, use_paper_data, validate
from router_r1_jax.data import questions, synthetic
from router_r1_jax.data.draw import Drawn, draw, draw_split, take_turns
from router_r1_jax.data.overlap import text_key
from router_r1_jax.data.prepare import prepare_set
from router_r1_jax.data.questions import DataError, QuestionRecord
from router_r1_jax.data.sets import open_sets


class Stored(list):
    """Records in memory where the code reads them from disk."""

    suite = "some"


def record(i, suite="some", text=None):
    return QuestionRecord(f"{suite}/{i}", suite, text or f"question {i}?", ("a",), 0, (), ())


RECORDS = Stored(map(record, range(50)))


@settings(deadline=None)
@given(count=st.integers(1, 60), more=st.integers(0, 60), seed=st.integers(0, 5), out=st.sets(st.integers(0, 49)))
def test_a_draw_begins_every_larger_one_and_holds_none_that_is_left_out(count, more, seed, out):
    left_out = {text_key(f"QUESTION the {i}") for i in out}
    small, large = (draw(RECORDS, "test", count=n, seed=seed, left_out=left_out) for n in (count, count + more))
    assert small.records == large.records[: len(small.records)]
    everything = draw(RECORDS, "test", count=0, seed=seed, left_out=left_out)
    kept = [r for i, r in enumerate(RECORDS) if i not in out]
    assert list(everything.records) == kept and everything.overlapping == len(out)
    assert len(large.records) == min(count + more, len(kept)) == len(set(large.records) & set(kept))
    assert large.available == 50


def test_draws_differ_by_seed_set_and_split_and_are_even():
    draws = {}
    for seed in range(3):
        for split in ("train", "test"):
            for suite in ("some", "other"):
                stored = Stored(RECORDS)
                stored.suite = suite
                draws[seed, split, suite] = draw(stored, split, count=10, seed=seed, left_out=set()).records
    assert len(set(draws.values())) == len(draws)
    counts = collections.Counter(
        r.id for s in range(500) for r in draw(RECORDS, "t", count=10, seed=s, left_out=set()).records
    )
    assert len(counts) == 50 and all(60 < n < 140 for n in counts.values())  # 100 each, standard deviation 9


def test_sets_take_turns():
    one, two = ([record(i, suite) for i in range(n)] for suite, n in (("one", 3), ("two", 1)))
    drawn = [Drawn("one", 3, 0, tuple(one)), Drawn("two", 1, 0, tuple(two))]
    assert [r.id for r in take_turns(drawn)] == ["one/0", "two/0", "one/1", "one/2"]


@pytest.fixture
def data(prepared_root):
    c = base_config()
    c.data.dir = str(prepared_root)
    use_paper_data(c)
    return c.data


def test_the_papers_protocol_draws_from_the_sets_it_names(data, tmp_path):
    folders = open_sets(data, tmp_path)
    assert set(folders) == set(PAPER_SETS)
    data.per_set.update(dict(train=5, validation=2, test=3))
    drawn = {split: draw_split(data, folders, split) for split in ("train", "validation", "test")}
    sizes = {split: [(one.suite, len(one.records)) for one in sets] for split, sets in drawn.items()}
    assert sizes["train"] == [("nq", 5), ("hotpotqa", 5)]
    assert sizes["validation"] == [("nq", 2), ("hotpotqa", 1)]
    assert sizes["test"] == [(suite, 3) for suite in PAPER_SETS]
    ids = {split: {r.id for one in sets for r in one.records} for split, sets in drawn.items()}
    assert not ids["train"] & ids["validation"] and not ids["validation"] & ids["test"]


def test_the_papers_protocol_is_the_published_one():
    c = base_config()
    use_paper_data(c)
    assert c.data.train == ("nq", "hotpotqa") and len(c.data.test) == 7
    assert (c.data.per_set.train, c.data.per_set.test) == (7000, 500)
    assert c.evaluation.questions >= 7 * 500 and c.data.dir == "data"


@pytest.mark.parametrize("per_test_set", [0, 1])
def test_training_leaves_out_what_evaluation_asks(data, tmp_path, per_test_set):
    """One train question of hotpotqa is a test question of nq, be it drawn there or not."""
    data.per_set.update(dict(train=0, test=per_test_set))
    data.test = ("nq",)
    folders = open_sets(data, tmp_path)
    nq, hotpotqa = draw_split(data, folders, "train")
    asked = {text_key(r.question) for r in questions.StoredQuestions(folders["nq"], "test")}
    assert (nq.overlapping, hotpotqa.overlapping) == (0, 1)
    assert not asked & {text_key(r.question) for r in (*nq.records, *hotpotqa.records)}
    data.drop_overlap = False
    repeated = [r for r in draw_split(data, folders, "train")[1].records if text_key(r.question) in asked]
    assert len(repeated) == 1
    data.drop_overlap, data.test = True, ("popqa",)
    assert draw_split(data, folders | {"popqa": open_sets(data, tmp_path)["popqa"]}, "train")[1].overlapping == 0


def write_set(folder, **texts):
    """A set of one's own: for each file its questions."""
    folder.mkdir()
    for stem, questions_of_file in texts.items():
        rows = [{"id": str(i), "question": text, "golden_answers": ["a"]} for i, text in enumerate(questions_of_file)]
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_validation_leaves_out_what_the_test_asks(data, tmp_path):
    """Also what another set's test asks: the checkpoint that validation chooses must not know test questions."""
    write_set(tmp_path / "one", train=["who is a?"], dev=["who is b?", "who is c?"], test=["who is d?"])
    write_set(tmp_path / "other", test=["Who is the C"])
    folders = {name: prepare_set(name, str(tmp_path), tmp_path / "out") for name in ("one", "other")}
    data.train = data.validation = ("one",)
    data.test = ("one", "other")
    (validation,) = draw_split(data, folders, "validation")
    assert [r.question for r in validation.records] == ["who is b?"] and validation.overlapping == 1
    assert [len(one.records) for one in draw_split(data, folders, "test")] == [1, 1]
    data.drop_overlap = False
    assert len(draw_split(data, folders, "validation")[0].records) == 2


def test_a_split_of_which_nothing_is_left_is_named(data, tmp_path):
    write_set(tmp_path / "one", train=["who is a?"], dev=["who is b?"], test=["who is d?", "who is B?"])
    folders = {"one": prepare_set("one", str(tmp_path), tmp_path / "out")}
    data.train = data.validation = data.test = ("one",)
    message = r"data\.validation is \('one',\), of which test asks every question too; name other sets"
    with pytest.raises(DataError, match=message):
        draw_split(data, folders, "validation")


def test_the_summary_tells_draws_apart(data, tmp_path):
    folders = open_sets(data, tmp_path)
    data.per_set.test = 3
    first = draw_split(data, folders, "test")[0].summary()
    assert json.loads(json.dumps(first)) == draw_split(data, folders, "test")[0].summary()
    assert (first["available"], first["questions"], first["overlapping"]) == (6, 3, 0)
    data.seed = 1
    assert draw_split(data, folders, "test")[0].summary()["ids_sha256"] != first["ids_sha256"]


def test_the_synthetic_world_is_a_set_among_others(data, tmp_path):
    data.dir = str(tmp_path)
    data.test = data.train = data.validation = ("synthetic",)
    data.per_set.update(dict(train=0, validation=0, test=0))
    folders = open_sets(data, "/nowhere")
    (train,) = draw_split(data, folders, "train")
    assert list(train.records) == list(questions.StoredQuestions(synthetic.prepare(data, "/nowhere"), "train"))
    assert train.overlapping == 0 and len(train.records) == 1274


def test_a_set_that_is_not_prepared_is_named_with_the_command(data, tmp_path):
    data.dir = ""
    data.test = ("nq", "popqa")
    with pytest.raises(ConfigError, match=f"no set 'nq' is prepared; run .* --sets=nq .* --dir={tmp_path}/data"):
        open_sets(data, tmp_path)


def test_of_several_versions_the_newest_whole_one_is_opened(data, prepared_root, tmp_path):
    data.train = data.validation = data.test = ("nq",)
    data.dir = str(shutil.copytree(prepared_root, tmp_path / "copy"))
    folder = tmp_path / "copy" / "open_qa" / "nq"
    for name in ("0.9.12", "incomplete.ABCDEF_1.0.1", "1.0.0.incompleteABCDEF"):  # as TFDS names what it has begun
        (folder / name).mkdir()
    assert open_sets(data, tmp_path) == {"nq": folder / "1.0.0"}
    (folder / "1.0.10").mkdir()
    assert open_sets(data, tmp_path) == {"nq": folder / "1.0.10"}


def test_a_split_that_a_set_does_not_have_is_named(data, tmp_path):
    data.train = ("popqa",)
    with pytest.raises(
        DataError, match="data.train names 'popqa': .*popqa/1.0.0 has no split 'train'; choose one of test"
    ):
        draw_split(data, open_sets(data, tmp_path), "train")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train", (), r"data\.train is \(\); name one or more sets"),
        ("test", ("nq", "nq"), r"data\.test is \('nq', 'nq'\); name one or more sets, none twice"),
        ("validation", ("nq", ""), r"data\.validation is \('nq', ''\)"),
        ("validation", (3,), r"data\.validation is \(3,\)"),
    ],
)
def test_wrong_sets_are_refused(field, value, message):
    c = base_config()
    c.pool.models = (model_card(name="A"),)
    c.data[field] = value
    with pytest.raises(ConfigError, match=message):
        validate(c)


def test_simulated_models_are_refused_for_real_questions():
    c = base_config()
    use_paper_data(c)
    c.pool.models = (model_card(name="A"),)
    validate(c)
    c.pool.simulate = True
    with pytest.raises(ConfigError, match="simulated models only know the set 'synthetic'"):
        validate(c)
