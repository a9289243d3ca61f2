"""Prepared sets against the files that they were built from, read with nothing but the json module."""

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
from router_r1_jax.data import open_qa, prepare, questions
from router_r1_jax.data.open_qa import FILES
from router_r1_jax.data.overlap import text_key, text_keys
from router_r1_jax.data.prepare import overlaps, prepare_set
from router_r1_jax.data.questions import DataError
from router_r1_jax.data.sets import open_sets

# Which file a split comes from, written out once more: test where there is one, else dev; never a file twice.
HAS_TEST = {"nq", "triviaqa", "popqa", "bamboogle"}
HAS_TRAIN = {"nq", "triviaqa", "hotpotqa", "2wikimultihopqa", "musique"}


def folder_of(root, suite):
    (folder,) = (root / "open_qa" / suite).iterdir()
    return folder


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())


def expected(flashrag, suite, stem):
    lines = (flashrag / suite / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return {f"{suite}/{stem}/{e['id']}": (e["question"], tuple(e["golden_answers"])) for e in entries}


def loaded(folder, split):
    records = list(questions.StoredQuestions(folder, split))
    found = {record.id: (record.question, record.golds) for record in records}
    assert len(found) == len(records)
    return found


def test_the_papers_sets_are_the_builders():
    assert set(PAPER_SETS) == set(FILES) == {config.name for config in open_qa.OpenQA.BUILDER_CONFIGS}
    assert {suite for suite in FILES if "train" in FILES[suite]} == HAS_TRAIN
    assert {suite for suite in FILES if FILES[suite]["test"] == "test"} == HAS_TEST


@pytest.mark.parametrize("suite", PAPER_SETS)
def test_a_set_on_disk_is_the_set_in_the_files(prepared_root, flashrag, suite):
    folder = folder_of(prepared_root, suite)
    assert loaded(folder, "test") == expected(flashrag, suite, "test" if suite in HAS_TEST else "dev")
    if suite in HAS_TRAIN & HAS_TEST:
        assert loaded(folder, "train") == expected(flashrag, suite, "train")
        assert loaded(folder, "validation") == expected(flashrag, suite, "dev")
    elif suite in HAS_TRAIN:
        train, validation = loaded(folder, "train"), loaded(folder, "validation")
        assert train and validation and not set(train) & set(validation)
        assert train | validation == expected(flashrag, suite, "train")
    else:
        with pytest.raises(DataError, match=f"{folder} has no split 'train'; choose one of test"):
            list(questions.StoredQuestions(folder, "train"))


@pytest.mark.parametrize("suite", PAPER_SETS)
def test_records_carry_their_sets_name_and_stay_in_the_files_order(prepared_root, flashrag, suite):
    records = list(questions.StoredQuestions(folder_of(prepared_root, suite), "test"))
    assert [record.id for record in records] == list(expected(flashrag, suite, "test" if suite in HAS_TEST else "dev"))
    assert {(record.suite, record.hops, record.domains, record.relations) for record in records} == {(suite, 0, (), ())}


def test_no_id_is_that_of_another_set_or_split(prepared_root, flashrag):
    in_files = [json.loads(line)["id"] for file in flashrag.glob("*/*.jsonl") for line in open(file, encoding="utf-8")]
    assert len(set(in_files)) < len(in_files) / 2  # in the files they collide
    ids = [
        record.id
        for suite in PAPER_SETS
        for split in ("train", "validation", "test")
        if split in metadata(folder_of(prepared_root, suite))["splits"]
        for record in questions.StoredQuestions(folder_of(prepared_root, suite), split)
    ]
    assert len(set(ids)) == len(ids) == len(in_files)


def test_held_out_questions_are_a_fixed_random_share_and_equal_ones_stay_together():
    keys = text_keys(f"question {i % 5000}" for i in range(15_000))
    held_out = open_qa.hold_out(keys)
    assert held_out.sum() == 3 * 100  # 2 % of 5,000 different ones
    by_text = collections.defaultdict(set)
    for i, chosen in enumerate(held_out):
        by_text[i % 5000].add(bool(chosen))
    assert all(len(sides) == 1 for sides in by_text.values())
    assert set(keys[::-1][open_qa.hold_out(keys[::-1])]) == set(keys[held_out])
    chosen = np.flatnonzero(held_out[:5000])
    assert abs(chosen.mean() - 2500) < 5 * 5000 / np.sqrt(12 * 100)
    assert open_qa.hold_out(text_keys(["who?", "what?"])).sum() == 1
    assert open_qa.hold_out(text_keys(["who?", "WHO"])).sum() == 0  # the only question stays in train


def test_the_metadata_say_what_became_of_each_line(tmp_path, flashrag):
    source = shutil.copytree(flashrag, tmp_path / "source")
    path = source / "hotpotqa" / "train.jsonl"
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*good[:3], b"{", b"", *good[3:], good[5], b'{"id": "x", "question": "?"}']))
    folder = prepare_set("hotpotqa", str(source), tmp_path / "out", max_bad=0.3)
    noted = metadata(folder)
    assert noted["bad_lines"][0].startswith("hotpotqa/train.jsonl:4: is not JSON")
    assert noted["bad_lines"][1:] == [
        "hotpotqa/train.jsonl:15: id is that of line 8", "hotpotqa/train.jsonl:16: golden_answers is missing",
    ]  # fmt: skip
    assert noted["origin"] == str(source)
    assert noted["files"]["train"] == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "lines": 16, "questions": 12, "bad_lines": 3, "blank_lines": 1, "blank_answers": 0,
    }  # fmt: skip
    assert noted["splits"] == {
        "train": {"file": "train", "questions": 11},
        "test": {"file": "dev", "questions": 4},
        "validation": {"file": "train", "questions": 1, "held_out": 0.02},
    }
    assert loaded(folder, "train") | loaded(folder, "validation") == expected(flashrag, "hotpotqa", "train")
    text = prepare.describe("hotpotqa", folder)
    assert all(f"  not used: {line}" in text for line in noted["bad_lines"])
    assert "hotpotqa/train.jsonl: 12 questions, 3 bad lines, 1 blank lines" in text


def test_a_refused_set_leaves_nothing_that_passes_for_one(tmp_path, flashrag):
    source = shutil.copytree(flashrag, tmp_path / "source")
    path = source / "nq" / "test.jsonl"
    path.write_bytes(path.read_bytes() + b"{\n")
    with pytest.raises(DataError, match=r"nq/test\.jsonl: 1 of 7 lines cannot be used"):
        prepare_set("nq", str(source), tmp_path / "out")
    assert not list((tmp_path / "out" / "open_qa" / "nq").iterdir())
    prepare_set("nq", str(source), tmp_path / "out", max_bad=0.2)
    path.unlink()
    with pytest.raises(DataError, match=r"nq/test\.jsonl does not exist"):
        prepare_set("nq", str(source), tmp_path / "other")


@pytest.mark.parametrize("shard", [1, 3, 4, 11, 12])
def test_shards_change_nothing_but_the_files(tmp_path, flashrag, monkeypatch, shard):
    monkeypatch.setattr(open_qa, "SHARD", shard)
    folder = prepare_set("hotpotqa", str(flashrag), tmp_path)
    assert len(list(folder.glob("*-train.*"))) == -(-11 // shard)
    assert loaded(folder, "test") == expected(flashrag, "hotpotqa", "dev")
    train = list(questions.StoredQuestions(folder, "train")) + list(questions.StoredQuestions(folder, "validation"))
    assert {r.id: (r.question, r.golds) for r in train} == expected(flashrag, "hotpotqa", "train") and len(train) == 12


KILLED = """
import os, signal, sys
from pathlib import Path
from router_r1_jax.data import open_qa, prepare

write = open_qa._examples

def write_some(path, *rest):
    for i, example in enumerate(write(path, *rest)):
        if (path.stem, i) == ("dev", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

open_qa._examples = write_some
prepare.prepare_set("nq", sys.argv[1], Path(sys.argv[2]))
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
        open_sets(data, tmp_path)
    folder = prepare_set("nq", str(flashrag), tmp_path)
    assert open_sets(data, tmp_path) == {"nq": folder}
    for split in ("train", "validation", "test"):
        assert loaded(folder, split) == loaded(folder_of(prepared_root, "nq"), split)


def test_what_is_prepared_is_left_alone(tmp_path, flashrag, capsys):
    folder = prepare_set("bamboogle", str(flashrag), tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare_set("bamboogle", str(flashrag), tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert "bamboogle: already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content"), [("dataset_info.json", None), ("dataset_info.json", "{"), ("metadata.json", None)]
)
def test_a_prepared_set_that_is_damaged_is_named_with_the_way_out(tmp_path, flashrag, file, content):
    folder = prepare_set("popqa", str(flashrag), tmp_path)
    (folder / file).unlink()
    if content:
        (folder / file).write_text(content)
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--sets=popqa", f"--source={flashrag}", f"--dir={tmp_path}"])
    assert str(ended.value).startswith(f"error: {folder} cannot be read (")
    assert str(ended.value).endswith("; remove the folder and prepare the data again")


def test_a_set_of_ones_own_is_read_by_the_files_that_are_there(tmp_path, flashrag):
    for stem in ("train", "dev"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        shutil.copy(flashrag / "hotpotqa" / f"{stem}.jsonl", tmp_path / "mine")
    folder = prepare_set("mine", str(tmp_path), tmp_path / "out")
    assert {record.suite for record in questions.StoredQuestions(folder, "test")} == {"mine"}
    assert set(metadata(folder)["splits"]) == {"train", "validation", "test"}
    shutil.copy(flashrag / "nq" / "test.jsonl", tmp_path / "mine")
    folder = prepare_set("mine", str(tmp_path), tmp_path / "out2")
    assert metadata(folder)["splits"]["validation"] == {"file": "dev", "questions": 4}
    assert metadata(folder)["splits"]["test"] == {"file": "test", "questions": 6}
    with pytest.raises(DataError, match="'yours', and .* holds no train.jsonl, dev.jsonl or test.jsonl"):
        prepare_set("yours", str(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="'mine'; from a URL only nq, "):
        prepare_set("mine", "http://127.0.0.1:9", tmp_path / "out3")


def test_a_set_from_a_url_is_the_set_from_the_folder(tmp_path, flashrag, prepared_root):
    files = {f"/data/{path.relative_to(flashrag)}": path.read_bytes() for path in flashrag.glob("*/*.jsonl")}
    with serving(files) as server:
        folder = prepare_set("hotpotqa", f"{server.url}/data", tmp_path)
        assert [path for path, _ in server.requests] == ["/data/hotpotqa/train.jsonl", "/data/hotpotqa/dev.jsonl"]
        assert metadata(folder)["origin"] == f"{server.url}/data"
    for split in ("train", "validation", "test"):
        assert loaded(folder, split) == loaded(folder_of(prepared_root, "hotpotqa"), split)
    sums = (tmp_path / "downloads" / "SHA256SUMS").read_text()
    assert f"{metadata(folder)['files']['dev']['sha256']}  hotpotqa/dev.jsonl\n" in sums


def test_expected_sums_are_held_against_the_files(tmp_path, flashrag):
    stems = ("train", "dev", "test")
    sums = {stem: hashlib.sha256((flashrag / "nq" / f"{stem}.jsonl").read_bytes()).hexdigest() for stem in stems}
    path = tmp_path / "sums"
    path.write_text("".join(f"{sums[stem]}  nq/{stem}.jsonl\n" for stem in stems))
    prepare_set("nq", str(flashrag), tmp_path / "out", expected=path)
    path.write_text(f"{sums['train']}  nq/train.jsonl\n{sums['train']}  nq/dev.jsonl\n")
    with pytest.raises(DataError, match=r"nq/dev\.jsonl has the SHA-256 .*sums says"):
        prepare_set("nq", str(flashrag), tmp_path / "other", expected=path)
    path.write_text(f"{sums['train']}  nq/train.jsonl\n")
    with pytest.raises(DataError, match=r"sums, which has no line for nq/dev\.jsonl"):
        prepare_set("nq", str(flashrag), tmp_path / "other", expected=path)
    assert not (tmp_path / "other").exists()


def test_expected_sums_are_held_against_a_set_that_is_prepared_already(tmp_path, flashrag):
    file = flashrag / "popqa" / "test.jsonl"
    path = tmp_path / "sums"
    path.write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  popqa/test.jsonl\n")
    folder = prepare_set("popqa", str(flashrag), tmp_path / "out")
    assert prepare_set("popqa", str(flashrag), tmp_path / "out", expected=path) == folder
    path.write_text(f"{'0' * 64}  popqa/test.jsonl\n")
    with pytest.raises(DataError, match=r"built from a popqa/test\.jsonl with the SHA-256 .*sums says 0+; remove"):
        prepare_set("popqa", str(flashrag), tmp_path / "out", expected=path)


def test_a_page_in_place_of_the_file_is_refused_with_what_to_remove(tmp_path):
    with serving({"/popqa/test.jsonl": b"<html>\n<p>Please log in</p>\n</html>\n"}) as server:
        with pytest.raises(DataError, match=r"popqa/test\.jsonl: 3 of 3 lines cannot be used") as refused:
            prepare_set("popqa", server.url, tmp_path)
        fix = f"to download anew, remove {tmp_path}/downloads/popqa and its lines of {tmp_path}/downloads/SHA256SUMS"
        assert str(refused.value).endswith(fix)
        with pytest.raises(DataError, match="nq/train.jsonl answers HTTP 404"):
            prepare_set("nq", server.url, tmp_path)


def test_overlaps_are_those_of_all_pairs(prepared_root):
    folders = {suite: folder_of(prepared_root, suite) for suite in PAPER_SETS}
    counts = overlaps(folders)
    assert set(counts) == set(PAPER_SETS) and all(set(row) == HAS_TRAIN for row in counts.values())
    texts = {
        (suite, split): [record.question for record in questions.StoredQuestions(folders[suite], split)]
        for suite in PAPER_SETS
        for split in ("train", "test")
        if split == "test" or suite in HAS_TRAIN
    }
    for test, row in counts.items():
        for train, count in row.items():
            same = [any(text_key(a) == text_key(b) for b in texts[train, "train"]) for a in texts[test, "test"]]
            assert count == sum(same)
    assert counts["nq"]["hotpotqa"] == 1  # one was written for this
    assert sum(sum(row.values()) for row in counts.values()) == 1
    row = next(line for line in prepare.table(counts).splitlines() if line.startswith("nq "))
    assert row.split() == ["nq", "0", "0", "1", "0", "0"]
    assert prepare.table({"popqa": {}}) == prepare.table({}) == ""


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
    assert (text_key(one) == text_key(other)) == same


def run(*arguments):
    command = [sys.executable, "-m", "router_r1_jax.data.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_prepares_several_sets_and_says_what_stands_twice(tmp_path, flashrag):
    done = run("--sets=nq,hotpotqa", f"--source={flashrag}", f"--dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "nq/test.jsonl: 6 questions, 0 bad lines" in done.stdout
    assert "validation: 1 questions of train.jsonl (held out of it)" in done.stdout
    assert [line.split() for line in done.stdout.splitlines() if line.startswith(("nq  ", "hotpotqa  "))] == [
        ["nq", "0", "1"], ["hotpotqa", "0", "0"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sets=nq,../x"], "--sets names '../x'; a set's name is one word"),
        (["--sets=synthetic"], "--sets names 'synthetic', which in a configuration is the synthetic world; rename"),
        (["--sets=,"], "--sets names no set; choose of nq, "),
        (["--source=nowhere"], "--source is 'nowhere', which is no folder"),
        (["--source=https://a:b@host/x"], "--source at host holds a user"),
        (["--checksums=nowhere"], "--checksums is nowhere, which is no file"),
        (["--max_bad=1.5"], "--max_bad is 1.5; it is a share"),
        (["--dir=/dev/null/x"], "/dev/null/x"),
    ],
)
def test_wrong_flags_end_in_one_line(tmp_path, flashrag, flags, message):
    arguments = {"--sets": "nq", "--source": str(flashrag), "--dir": str(tmp_path)}
    arguments |= dict(flag.split("=", 1) for flag in flags)
    with pytest.raises(SystemExit) as ended:
        prepare.main([f"{name}={value}" for name, value in arguments.items()])
    assert str(ended.value).startswith("error: ") and message in str(ended.value)


def test_without_a_folder_sets_go_where_the_papers_configuration_looks(tmp_path, flashrag, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare.main(["--sets=popqa", f"--source={flashrag}"])
    c = base_config()
    use_paper_data(c)
    assert loaded(Path(c.data.dir) / "open_qa" / "popqa" / "1.0.0", "test")


LIMITED = """
import resource, signal, sys
from router_r1_jax.data import prepare

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize("source", ["folder", "url"])
def test_a_full_disk_ends_in_one_line(tmp_path, source):
    """What does not fit is the set that is built, or the file that is downloaded."""
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
        "folder = prepare.prepare_set('nq', sys.argv[1], Path(sys.argv[2]));"
        "list(questions.StoredQuestions(folder, 'test'));"
        "print(*sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(flashrag), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == ""
