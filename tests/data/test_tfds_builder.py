"""Prepared data sets against the JSONL files that they were built from, read with the json module only."""

import collections
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from file_server import serving

from router_r1_jax.config import PAPER_SETS, ConfigError, base_config, use_paper_data
from router_r1_jax.data import prepare, questions, tfds_builder
from router_r1_jax.data.decontamination import question_key, question_keys
from router_r1_jax.data.prepare import count_contaminated, prepare_dataset
from router_r1_jax.data.questions import DataError
from router_r1_jax.data.splits import find_datasets
from router_r1_jax.data.tfds_builder import SPLIT_FILES

# The file of each split, written independently: test if there is one, else dev; no file is used twice.
HAS_TEST = {"nq", "triviaqa", "popqa", "bamboogle"}
HAS_TRAIN = {"nq", "triviaqa", "hotpotqa", "2wikimultihopqa", "musique"}


def folder_of(root, dataset):
    (folder,) = (root / "open_qa" / dataset).iterdir()
    return folder


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())


def expected(flashrag, dataset, stem):
    lines = (flashrag / dataset / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {f"{dataset}/{stem}/{e['id']}": (e["question"], tuple(e["golden_answers"])) for e in entries}


def loaded(folder, split):
    records = list(questions.StoredQuestions(folder, split))
    found = {record.id: (record.question, record.golds) for record in records}
    assert len(found) == len(records)
    return found


def test_the_papers_sets_are_the_builders():
    assert set(PAPER_SETS) == set(SPLIT_FILES) == {config.name for config in tfds_builder.OpenQA.BUILDER_CONFIGS}
    assert {dataset for dataset in SPLIT_FILES if "train" in SPLIT_FILES[dataset]} == HAS_TRAIN
    assert {dataset for dataset in SPLIT_FILES if SPLIT_FILES[dataset]["test"] == "test"} == HAS_TEST


@pytest.mark.parametrize("dataset", PAPER_SETS)
def test_a_set_on_disk_is_the_set_in_the_files(prepared_root, flashrag, dataset):
    folder = folder_of(prepared_root, dataset)
    assert loaded(folder, "test") == expected(flashrag, dataset, "test" if dataset in HAS_TEST else "dev")
    if dataset in HAS_TRAIN & HAS_TEST:
        assert loaded(folder, "train") == expected(flashrag, dataset, "train")
        assert loaded(folder, "validation") == expected(flashrag, dataset, "dev")
    elif dataset in HAS_TRAIN:
        train, validation = loaded(folder, "train"), loaded(folder, "validation")
        assert train and validation and not set(train) & set(validation)
        assert train | validation == expected(flashrag, dataset, "train")
    else:
        with pytest.raises(DataError, match=f"{folder} has no split 'train'; choose one of test"):
            list(questions.StoredQuestions(folder, "train"))


@pytest.mark.parametrize("dataset", PAPER_SETS)
def test_records_carry_their_sets_name_and_stay_in_the_files_order(prepared_root, flashrag, dataset):
    records = list(questions.StoredQuestions(folder_of(prepared_root, dataset), "test"))
    assert [record.id for record in records] == list(
        expected(flashrag, dataset, "test" if dataset in HAS_TEST else "dev")
    )
    assert {(record.dataset, record.hops, record.domains, record.relations) for record in records} == {
        (dataset, 0, (), ())
    }


def test_no_id_is_that_of_another_set_or_split(prepared_root, flashrag):
    in_files = [json.loads(line)["id"] for file in flashrag.glob("*/*.jsonl") for line in open(file, encoding="utf-8")]
    assert len(set(in_files)) < len(in_files) / 2  # in the files they collide
    ids = [
        record.id
        for dataset in PAPER_SETS
        for split in ("train", "validation", "test")
        if split in metadata(folder_of(prepared_root, dataset))["splits"]
        for record in questions.StoredQuestions(folder_of(prepared_root, dataset), split)
    ]
    assert len(set(ids)) == len(ids) == len(in_files)


def test_held_out_questions_are_a_fixed_random_share_and_equal_ones_stay_together():
    keys = question_keys(f"question {i % 5000}" for i in range(15_000))
    held_out = tfds_builder.hold_out(keys)
    assert held_out.sum() == 3 * 100  # 2 % of 5,000 different ones
    by_text = collections.defaultdict(set)
    for i, chosen in enumerate(held_out):
        by_text[i % 5000].add(bool(chosen))
    assert all(len(sides) == 1 for sides in by_text.values())
    assert set(keys[::-1][tfds_builder.hold_out(keys[::-1])]) == set(keys[held_out])
    chosen = np.flatnonzero(held_out[:5000])
    assert abs(chosen.mean() - 2500) < 5 * 5000 / np.sqrt(12 * 100)
    assert tfds_builder.hold_out(question_keys(["who?", "what?"])).sum() == 1
    assert tfds_builder.hold_out(question_keys(["who?", "WHO"])).sum() == 0  # the only question stays in train


def test_the_metadata_account_for_each_line(tmp_path, flashrag):
    source = shutil.copytree(flashrag, tmp_path / "source")
    path = source / "hotpotqa" / "train.jsonl"
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*good[:3], b"{", b"", *good[3:], good[5], b'{"id": "x", "question": "?"}']))
    folder = prepare_dataset("hotpotqa", str(source), tmp_path / "out", max_bad=0.3)
    recorded = metadata(folder)
    assert recorded["bad_lines"][0].startswith("hotpotqa/train.jsonl:4: is not JSON")
    assert recorded["bad_lines"][1:] == [
        "hotpotqa/train.jsonl:15: id is that of line 8",
        "hotpotqa/train.jsonl:16: golden_answers is missing",
    ]
    assert recorded["origin"] == str(source)
    assert recorded["files"]["train"] == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "lines": 16,
        "questions": 12,
        "bad_lines": 3,
        "blank_lines": 1,
        "blank_answers": 0,
    }
    assert recorded["splits"] == {
        "train": {"file": "train", "questions": 11},
        "test": {"file": "dev", "questions": 4},
        "validation": {"file": "train", "questions": 1, "held_out": 0.02},
    }
    assert loaded(folder, "train") | loaded(folder, "validation") == expected(flashrag, "hotpotqa", "train")
    text = prepare.describe("hotpotqa", folder)
    assert all(f"  not used: {line}" in text for line in recorded["bad_lines"])
    assert "hotpotqa/train.jsonl: 12 questions, 3 bad lines, 1 blank lines" in text


def test_a_refused_set_leaves_nothing_that_passes_for_one(tmp_path, flashrag):
    source = shutil.copytree(flashrag, tmp_path / "source")
    path = source / "nq" / "test.jsonl"
    path.write_bytes(path.read_bytes() + b"{\n")
    with pytest.raises(DataError, match=r"nq/test\.jsonl: 1 of 7 lines cannot be used"):
        prepare_dataset("nq", str(source), tmp_path / "out")
    assert not list((tmp_path / "out" / "open_qa" / "nq").iterdir())
    prepare_dataset("nq", str(source), tmp_path / "out", max_bad=0.2)
    path.unlink()
    with pytest.raises(DataError, match=r"nq/test\.jsonl does not exist"):
        prepare_dataset("nq", str(source), tmp_path / "other")


@pytest.mark.parametrize("shard", [1, 3, 4, 11, 12])
def test_shards_change_nothing_but_the_files(tmp_path, flashrag, monkeypatch, shard):
    monkeypatch.setattr(tfds_builder, "SHARD", shard)
    folder = prepare_dataset("hotpotqa", str(flashrag), tmp_path)
    assert len(list(folder.glob("*-train.*"))) == -(-11 // shard)
    assert loaded(folder, "test") == expected(flashrag, "hotpotqa", "dev")
    train = list(questions.StoredQuestions(folder, "train")) + list(questions.StoredQuestions(folder, "validation"))
    assert {r.id: (r.question, r.golds) for r in train} == expected(flashrag, "hotpotqa", "train") and len(train) == 12


KILLED = """
import os, signal, sys
from pathlib import Path
from router_r1_jax.data import tfds_builder, prepare

write = tfds_builder._examples

def write_some(path, *rest):
    for i, example in enumerate(write(path, *rest)):
        if (path.stem, i) == ("dev", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

tfds_builder._examples = write_some
prepare.prepare_dataset("nq", sys.argv[1], Path(sys.argv[2]))
"""


def test_a_build_that_is_killed_is_none_and_the_next_one_is_whole(tmp_path, flashrag, prepared_root):
    done = subprocess.run([sys.executable, "-c", KILLED, str(flashrag), str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (rest,) = (tmp_path / "open_qa" / "nq").iterdir()
    assert list(rest.glob("*-train.*"))  # it was in the middle
    data = base_config().data
    data.train = data.validation = data.test = ("nq",)
    data.dir = str(tmp_path)
    with pytest.raises(ConfigError, match="no set 'nq' is prepared"):
        find_datasets(data, tmp_path)
    folder = prepare_dataset("nq", str(flashrag), tmp_path)
    assert find_datasets(data, tmp_path) == {"nq": folder}
    for split in ("train", "validation", "test"):
        assert loaded(folder, split) == loaded(folder_of(prepared_root, "nq"), split)


def test_what_is_prepared_is_left_alone(tmp_path, flashrag, capsys):
    folder = prepare_dataset("bamboogle", str(flashrag), tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare_dataset("bamboogle", str(flashrag), tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert "bamboogle: already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content"), [("dataset_info.json", None), ("dataset_info.json", "{"), ("metadata.json", None)]
)
def test_a_prepared_set_that_is_damaged_is_named_with_the_way_out(tmp_path, flashrag, file, content):
    folder = prepare_dataset("popqa", str(flashrag), tmp_path)
    (folder / file).unlink()
    if content:
        (folder / file).write_text(content)
    with pytest.raises(
        DataError, match=rf"^{folder} cannot be read \(.*; remove the folder and prepare the data again$"
    ):
        prepare.main(sets="popqa", source=str(flashrag), dir=str(tmp_path))


def test_a_users_own_set_is_built_from_the_files_that_exist(tmp_path, flashrag):
    for stem in ("train", "dev"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        shutil.copy(flashrag / "hotpotqa" / f"{stem}.jsonl", tmp_path / "mine")
    folder = prepare_dataset("mine", str(tmp_path), tmp_path / "out")
    assert {record.dataset for record in questions.StoredQuestions(folder, "test")} == {"mine"}
    assert set(metadata(folder)["splits"]) == {"train", "validation", "test"}
    shutil.copy(flashrag / "nq" / "test.jsonl", tmp_path / "mine")
    folder = prepare_dataset("mine", str(tmp_path), tmp_path / "out2")
    assert metadata(folder)["splits"]["validation"] == {"file": "dev", "questions": 4}
    assert metadata(folder)["splits"]["test"] == {"file": "test", "questions": 6}
    with pytest.raises(DataError, match="'yours', and .* holds no train.jsonl, dev.jsonl or test.jsonl"):
        prepare_dataset("yours", str(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="'mine'; from a URL only nq, "):
        prepare_dataset("mine", "http://127.0.0.1:9", tmp_path / "out3")


def test_a_set_from_a_url_is_the_set_from_the_folder(tmp_path, flashrag, prepared_root):
    files = {f"/data/{path.relative_to(flashrag)}": path.read_bytes() for path in flashrag.glob("*/*.jsonl")}
    with serving(files) as server:
        folder = prepare_dataset("hotpotqa", f"{server.url}/data", tmp_path)
        assert [path for path, _ in server.requests] == ["/data/hotpotqa/train.jsonl", "/data/hotpotqa/dev.jsonl"]
        assert metadata(folder)["origin"] == f"{server.url}/data"
    for split in ("train", "validation", "test"):
        assert loaded(folder, split) == loaded(folder_of(prepared_root, "hotpotqa"), split)
    for stem in ("train", "dev"):
        content = (tmp_path / "downloads" / "hotpotqa" / f"{stem}.jsonl").read_bytes()
        assert metadata(folder)["files"][stem]["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_downloaded_file_is_not_downloaded_again(tmp_path, flashrag):
    files = {f"/data/popqa/{path.name}": path.read_bytes() for path in (flashrag / "popqa").iterdir()}
    with serving(files) as server:
        shutil.rmtree(prepare_dataset("popqa", f"{server.url}/data/", tmp_path))
        prepare_dataset("popqa", f"{server.url}/data/", tmp_path)
        assert [path for path, _ in server.requests] == ["/data/popqa/test.jsonl"]


def test_checksums_are_verified(tmp_path, flashrag):
    stems = ("train", "dev", "test")
    sums = {stem: hashlib.sha256((flashrag / "nq" / f"{stem}.jsonl").read_bytes()).hexdigest() for stem in stems}
    path = tmp_path / "sums"
    path.write_text("".join(f"{sums[stem]}  nq/{stem}.jsonl\n" for stem in stems))
    prepare_dataset("nq", str(flashrag), tmp_path / "out", checksums=path)
    path.write_text(f"{sums['train']}  nq/train.jsonl\n{sums['train']}  nq/dev.jsonl\n")
    with pytest.raises(DataError, match=r"nq/dev\.jsonl has the SHA-256 .*sums says"):
        prepare_dataset("nq", str(flashrag), tmp_path / "other", checksums=path)
    path.write_text(f"{sums['train']}  nq/train.jsonl\n")
    with pytest.raises(DataError, match=r"sums has no line for nq/dev\.jsonl"):
        prepare_dataset("nq", str(flashrag), tmp_path / "other", checksums=path)
    assert not (tmp_path / "other").exists()


def test_checksums_are_verified_of_a_set_that_is_prepared_already(tmp_path, flashrag):
    file = flashrag / "popqa" / "test.jsonl"
    path = tmp_path / "sums"
    path.write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  popqa/test.jsonl\n")
    folder = prepare_dataset("popqa", str(flashrag), tmp_path / "out")
    assert prepare_dataset("popqa", str(flashrag), tmp_path / "out", checksums=path) == folder
    path.write_text(f"{'0' * 64}  popqa/test.jsonl\n")
    with pytest.raises(
        DataError, match=rf"{folder}: popqa/test\.jsonl has the SHA-256 .*sums says 0+; .* remove {folder}"
    ):
        prepare_dataset("popqa", str(flashrag), tmp_path / "out", checksums=path)


def test_a_page_in_place_of_the_file_is_refused(tmp_path):
    with serving({"/popqa/test.jsonl": b"<html>\n<p>Please log in</p>\n</html>\n"}) as server:
        with pytest.raises(DataError, match=r"popqa/test\.jsonl: 3 of 3 lines cannot be used"):
            prepare_dataset("popqa", server.url, tmp_path)
        with pytest.raises(DataError, match="nq/train.jsonl answers HTTP 404"):
            prepare_dataset("nq", server.url, tmp_path)


def test_contaminated_questions_are_counted_over_all_pairs(prepared_root):
    folders = {dataset: folder_of(prepared_root, dataset) for dataset in PAPER_SETS}
    counts = count_contaminated(folders)
    assert set(counts) == {(test, train) for test in PAPER_SETS for train in HAS_TRAIN}
    texts = {
        (dataset, split): [record.question for record in questions.StoredQuestions(folders[dataset], split)]
        for dataset in PAPER_SETS
        for split in ("train", "test")
        if split == "test" or dataset in HAS_TRAIN
    }
    for (test, train), count in counts.items():
        same = [any(question_key(a) == question_key(b) for b in texts[train, "train"]) for a in texts[test, "test"]]
        assert count == sum(same)
    assert counts["nq", "hotpotqa"] == 1  # one was written for this
    assert sum(counts.values()) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Who wrote the novel Frankenstein?", "who wrote novel “FRANKENSTEIN” ", True),
        ("What is 1,000?", "what is 1 000", True),
        ("ﬁlm of Straße 1?", "Film of STRASSE 1", True),
        ("who is x y", "who is y x", False),
        ("who is ab", "who is a b", False),
        ("who is c", "who is d", False),
        ("?", "!", False),
        ("the", "a", False),
    ],
)
def test_questions_are_the_same_but_for_case_marks_and_articles(one, other, same):
    assert (question_key(one) == question_key(other)) == same


def run(*arguments):
    command = [sys.executable, "-m", "router_r1_jax.data.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_prepares_several_sets_and_counts_contaminated_questions(tmp_path, flashrag):
    done = run("--sets=nq,hotpotqa", f"--source={flashrag}", f"--dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "nq/test.jsonl: 6 questions, 0 bad lines" in done.stdout
    assert "validation: 1 questions of train.jsonl (held out of it)" in done.stdout
    assert done.stdout.splitlines()[-4:] == [
        "test questions of nq that the train split of nq has too: 0",
        "test questions of nq that the train split of hotpotqa has too: 1",
        "test questions of hotpotqa that the train split of nq has too: 0",
        "test questions of hotpotqa that the train split of hotpotqa has too: 0",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(sets="nq,../x"), "--sets names '../x'; a set's name is one word"),
        (dict(sets="synthetic"), "--sets names 'synthetic', which in a configuration is the synthetic world; rename"),
        (dict(sets=","), "--sets names no set; choose of nq, "),
        (dict(source="nowhere"), "nowhere/nq/train.jsonl does not exist; --source is a folder with <set>/<file>.jsonl"),
        (dict(source="nowhere", sets="mine"), "--sets names 'mine', and nowhere/mine holds no train.jsonl, dev.jsonl"),
        (dict(source="https://a:b@host/x"), "--source at host holds a user"),
        (dict(checksums="nowhere"), "--checksums is nowhere, which is no file"),
        (dict(max_bad=1.5), "--max_bad is 1.5; it is a share"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, flashrag, flags, message):
    with pytest.raises(DataError) as refused:
        prepare.main(**dict(sets="nq", source=str(flashrag), dir=str(tmp_path)) | flags)
    assert message in str(refused.value)


@pytest.mark.parametrize("where", ["/dev/null/x", None])
def test_a_refused_command_ends_in_one_line(tmp_path, flashrag, where):
    """The system refuses the folder, or the command a set's name."""
    done = run("--sets=nq" if where else "--sets=nq,../x", f"--source={flashrag}", f"--dir={where or tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {where}" if where else "error: --sets names '../x'; ")


def test_without_a_folder_sets_go_where_the_papers_configuration_looks(tmp_path, flashrag, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare.main(sets="popqa", source=str(flashrag))
    c = base_config()
    use_paper_data(c)
    assert loaded(Path(c.data.dir) / "open_qa" / "popqa" / "1.0.0", "test")


LIMITED = """
import resource, runpy, signal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
runpy.run_module("router_r1_jax.data.prepare", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("source", ["folder", "url"])
def test_a_full_disk_ends_in_one_line(tmp_path, source):
    """The set that is built does not fit, or the file that is downloaded."""
    rng = np.random.default_rng(0)  # random, since array_record compresses
    rows = [{"id": str(i), "question": rng.bytes(500).hex(), "golden_answers": ["a"]} for i in range(500)]
    path = tmp_path / "popqa" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, rows)))
    with serving({"/popqa/test.jsonl": path.read_bytes()}) as server:
        flags = [f"--source={server.url if source == 'url' else tmp_path}", f"--dir={tmp_path / 'out'}"]
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, "--sets=popqa", *flags], capture_output=True, text=True, timeout=120
        )
    last = done.stderr.splitlines()[-1]
    where = "popqa cannot be written (" if source == "folder" else f"{tmp_path / 'out'}: "
    assert done.returncode == 1 and last.startswith(f"error: {where}"), done.stderr
    assert "File too large" in last and last.endswith("then run again")


def test_neither_tensorflow_nor_jax_is_imported(tmp_path, flashrag):
    code = (
        "import sys; from router_r1_jax.data import prepare, questions; from pathlib import Path;"
        "folder = prepare.prepare_dataset('nq', sys.argv[1], Path(sys.argv[2]));"
        "list(questions.StoredQuestions(folder, 'test'));"
        "print(*sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(flashrag), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == ""
