"""The sampling of a run's questions against sets of ids, and the configuration's data sets against those on disk."""

import collections
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.config import PAPER_SETS, SYNTHETIC, ConfigError, base_config, model_card, use_paper_data
from router_r1_jax.config_checks import validate
from router_r1_jax.data import questions
from router_r1_jax.data.decontamination import question_key
from router_r1_jax.data.prepare import prepare_dataset
from router_r1_jax.data.questions import DataError, QuestionRecord
from router_r1_jax.data.splits import SampledDataset, find_datasets, interleave, sample_dataset, sample_split
from router_r1_jax.synthetic import tfds_builder


class Stored(list):
    """Records in memory where the code reads them from disk."""

    dataset = "some"


def record(i, dataset="some", text=None):
    return QuestionRecord(f"{dataset}/{i}", dataset, text or f"question {i}?", ("a",), 0, (), ())


RECORDS = Stored(map(record, range(50)))


@settings(deadline=None)
@given(count=st.integers(1, 60), more=st.integers(0, 60), seed=st.integers(0, 5), out=st.sets(st.integers(0, 49)))
def test_a_sample_begins_every_larger_one_and_holds_no_excluded_question(count, more, seed, out):
    excluded = {question_key(f"QUESTION the {i}") for i in out}
    small, large = (
        sample_dataset(RECORDS, "test", count=n, seed=seed, excluded=excluded) for n in (count, count + more)
    )
    assert small.records == large.records[: len(small.records)]
    everything = sample_dataset(RECORDS, "test", count=0, seed=seed, excluded=excluded)
    kept = [r for i, r in enumerate(RECORDS) if i not in out]
    assert list(everything.records) == kept and everything.contaminated == len(out)
    assert len(large.records) == min(count + more, len(kept)) == len(set(large.records) & set(kept))
    assert large.available == 50


def test_samples_differ_by_seed_dataset_and_split_and_are_uniform():
    samples = {}
    for seed in range(3):
        for split in ("train", "test"):
            for dataset in ("some", "other"):
                stored = Stored(RECORDS)
                stored.dataset = dataset
                samples[seed, split, dataset] = sample_dataset(
                    stored, split, count=10, seed=seed, excluded=set()
                ).records
    assert len(set(samples.values())) == len(samples)
    counts = collections.Counter(
        r.id for s in range(500) for r in sample_dataset(RECORDS, "t", count=10, seed=s, excluded=set()).records
    )
    assert len(counts) == 50 and all(60 < n < 140 for n in counts.values())  # 100 each, standard deviation 9


def test_sets_interleave():
    one, two = ([record(i, dataset) for i in range(n)] for dataset, n in (("one", 3), ("two", 1)))
    sampled = [SampledDataset("one", 3, 0, tuple(one)), SampledDataset("two", 1, 0, tuple(two))]
    assert [r.id for r in interleave(sampled)] == ["one/0", "two/0", "one/1", "one/2"]


@pytest.fixture
def data(prepared_root):
    c = base_config()
    c.data.dir = str(prepared_root)
    use_paper_data(c)
    return c.data


def test_the_papers_protocol_samples_from_the_sets_it_names(data, tmp_path):
    folders = find_datasets(data, tmp_path)
    assert set(folders) == set(PAPER_SETS)
    data.per_set.update(dict(train=5, validation=2, test=3))
    sampled = {split: sample_split(data, folders, split) for split in ("train", "validation", "test")}
    sizes = {split: [(one.dataset, len(one.records)) for one in sets] for split, sets in sampled.items()}
    assert sizes["train"] == [("nq", 5), ("hotpotqa", 5)]
    assert sizes["validation"] == [("nq", 2), ("hotpotqa", 1)]
    assert sizes["test"] == [(dataset, 3) for dataset in PAPER_SETS]
    ids = {split: {r.id for one in sets for r in one.records} for split, sets in sampled.items()}
    assert not ids["train"] & ids["validation"] and not ids["validation"] & ids["test"]


def test_the_papers_protocol_is_the_published_one():
    c = base_config()
    use_paper_data(c)
    assert c.data.train == ("nq", "hotpotqa") and len(c.data.test) == 7
    assert (c.data.per_set.train, c.data.per_set.test) == (7000, 500)
    assert c.evaluation.questions >= 7 * 500 and c.data.dir == "data"


@pytest.mark.parametrize("per_test_set", [0, 1])
def test_training_leaves_out_what_evaluation_asks(data, tmp_path, per_test_set):
    """One train question of hotpotqa is a test question of nq, whether or not it is sampled there."""
    data.per_set.update(dict(train=0, test=per_test_set))
    data.test = ("nq",)
    folders = find_datasets(data, tmp_path)
    nq, hotpotqa = sample_split(data, folders, "train")
    asked = {question_key(r.question) for r in questions.StoredQuestions(folders["nq"], "test")}
    assert (nq.contaminated, hotpotqa.contaminated) == (0, 1)
    assert not asked & {question_key(r.question) for r in (*nq.records, *hotpotqa.records)}
    data.decontaminate = False
    repeated = [r for r in sample_split(data, folders, "train")[1].records if question_key(r.question) in asked]
    assert len(repeated) == 1
    data.decontaminate, data.test = True, ("popqa",)
    assert sample_split(data, folders | {"popqa": find_datasets(data, tmp_path)["popqa"]}, "train")[1].contaminated == 0


def write_set(folder, **texts):
    """A user's own data set, from the questions of each file."""
    folder.mkdir()
    for stem, questions_of_file in texts.items():
        rows = [{"id": str(i), "question": text, "golden_answers": ["a"]} for i, text in enumerate(questions_of_file)]
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_validation_leaves_out_what_the_test_asks(data, tmp_path):
    """Also what another set's test asks: the checkpoint that validation chooses must not know test questions."""
    write_set(tmp_path / "one", train=["who is a?"], dev=["who is b?", "who is c?"], test=["who is d?"])
    write_set(tmp_path / "other", test=["Who is the C"])
    folders = {name: prepare_dataset(name, str(tmp_path), tmp_path / "out") for name in ("one", "other")}
    data.train = data.validation = ("one",)
    data.test = ("one", "other")
    (validation,) = sample_split(data, folders, "validation")
    assert [r.question for r in validation.records] == ["who is b?"] and validation.contaminated == 1
    assert [len(one.records) for one in sample_split(data, folders, "test")] == [1, 1]
    data.decontaminate = False
    assert len(sample_split(data, folders, "validation")[0].records) == 2


def test_a_split_of_which_nothing_is_left_is_named(data, tmp_path):
    write_set(tmp_path / "one", train=["who is a?"], dev=["who is b?"], test=["who is d?", "who is B?"])
    folders = {"one": prepare_dataset("one", str(tmp_path), tmp_path / "out")}
    data.train = data.validation = data.test = ("one",)
    message = r"data\.validation is \('one',\), of which test asks every question too; name other sets"
    with pytest.raises(DataError, match=message):
        sample_split(data, folders, "validation")


def test_the_summary_tells_samples_apart(data, tmp_path):
    folders = find_datasets(data, tmp_path)
    data.per_set.test = 3
    first = sample_split(data, folders, "test")[0].summary()
    assert json.loads(json.dumps(first)) == sample_split(data, folders, "test")[0].summary()
    assert (first["available"], first["questions"], first["contaminated"]) == (6, 3, 0)
    data.seed = 1
    assert sample_split(data, folders, "test")[0].summary()["ids_sha256"] != first["ids_sha256"]


def test_the_synthetic_world_is_a_dataset_that_its_environment_builds(data, tmp_path):
    data.train = data.validation = data.test = (SYNTHETIC,)
    data.per_set.update(dict(train=0, validation=0, test=0))
    assert find_datasets(data, tmp_path) == {}
    folder = tfds_builder.prepare(base_config().synthetic.world, tmp_path)
    (train,) = sample_split(data, {SYNTHETIC: folder}, "train")
    assert list(train.records) == list(questions.StoredQuestions(folder, "train"))
    assert train.contaminated == 0 and len(train.records) == 1274


def test_a_set_that_is_not_prepared_is_named_with_the_command(data, tmp_path):
    data.dir = ""
    data.test = ("nq", "popqa")
    with pytest.raises(ConfigError, match=f"no set 'nq' is prepared; run .* --sets=nq .* --dir={tmp_path}/data"):
        find_datasets(data, tmp_path)


def test_of_several_versions_the_newest_complete_one_is_found(data, prepared_root, tmp_path):
    data.train = data.validation = data.test = ("nq",)
    data.dir = str(shutil.copytree(prepared_root, tmp_path / "copy"))
    folder = tmp_path / "copy" / "open_qa" / "nq"
    for name in ("0.9.12", "incomplete.ABCDEF_1.0.1", "1.0.0.incompleteABCDEF"):  # as TFDS names what it has begun
        (folder / name).mkdir()
    assert find_datasets(data, tmp_path) == {"nq": folder / "1.0.0"}
    (folder / "1.0.10").mkdir()
    assert find_datasets(data, tmp_path) == {"nq": folder / "1.0.10"}


def test_a_split_that_a_set_does_not_have_is_named(data, tmp_path):
    data.train = ("popqa",)
    with pytest.raises(
        DataError, match="data.train names 'popqa': .*popqa/1.0.0 has no split 'train'; choose one of test"
    ):
        sample_split(data, find_datasets(data, tmp_path), "train")


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
    c.synthetic.simulate_models = True
    with pytest.raises(ConfigError, match="simulated models only know the set 'synthetic'"):
        validate(c)
