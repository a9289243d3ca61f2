"""Prepare sets of questions for training and evaluation: download or find the files, check them, build the set.

    python -m router_r1_jax.data.prepare --sets=nq,hotpotqa --source=DIR_OR_URL

The source holds <set>/{train,dev,test}.jsonl: a folder, or a base URL, whose files are kept in <dir>/downloads. For the
seven sets of the paper (`--sets=paper`) that is

    --source=https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main

with a commit in place of `main` for the same files tomorrow. Any other name is a set of your own, from a folder. Prints
what came of each file, every line that cannot be used, and how many test questions also stand in a train split. What is
built already is left alone. The sets go to `--dir`, data if it is left out; a configuration finds them by `data.dir`.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from router_r1_jax.config import PAPER_SETS
from router_r1_jax.data.download import SUMS_FILE, check_sum, check_url, fetch_all, is_url, read_sums
from router_r1_jax.data.open_qa import FILES, OpenQA, SetConfig
from router_r1_jax.data.overlap import text_keys
from router_r1_jax.data.questions import OPEN_QA, DataError, StoredQuestions, refusing_damage
from router_r1_jax.data.synthetic import SUITE


def files_of(suite: str, source: str) -> dict[str, str]:
    """Split -> file without its suffix. For a set that is not in FILES, by what lies in the source folder."""
    if suite in FILES:
        return FILES[suite]
    if is_url(source):
        raise DataError(
            f"--sets names {suite!r}; from a URL only {', '.join(FILES)} can be prepared, others from a folder"
        )
    found = {stem for stem in ("train", "dev", "test") if (Path(source) / suite / f"{stem}.jsonl").is_file()}
    if not found:
        raise DataError(
            f"--sets names {suite!r}, and {Path(source) / suite} holds no train.jsonl, dev.jsonl or test.jsonl; the "
            f"sets with known files are {', '.join(FILES)}"
        )
    tested = [stem for stem in ("test", "dev") if stem in found]
    files = {"train": "train"} if "train" in found else {}
    files |= {"test": tested[0]} if tested else {}
    return files | ({"validation": "dev"} if len(tested) == 2 else {})


def prepare_set(suite: str, source: str, root: Path, *, expected: Path | None = None, max_bad: float = 0.01) -> Path:
    """Build a set below `root` unless it lies there; returns its folder.

    `expected` is a file of checksums as sha256sum prints them, with names such as nq/train.jsonl. Raises DataError for
    files that are missing, are not the expected ones, or hold more than the share `max_bad` of unusable lines.
    """
    files = files_of(suite, source)
    built = root / OPEN_QA / suite / str(OpenQA.VERSION)
    if built.exists():  # before there is a builder, which reads it
        print(f"{suite}: already prepared in {built}; remove that folder to prepare it anew")
        if expected:
            _check_built(suite, built, expected)
        return built
    config = suite if suite in FILES else SetConfig(name=suite, files=files)
    builder = OpenQA(data_dir=root, config=config, file_format="array_record")
    names = [f"{suite}/{stem}.jsonl" for stem in dict.fromkeys(files.values())]
    folder = root / "downloads" if is_url(source) else Path(source)
    if is_url(source):
        fetch_all(source, names, folder)
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} does not exist; --source is a folder with <set>/<file>.jsonl, or a URL")
        if expected:
            check_sum(folder / name, name, _expected_sums(expected, name), str(expected))
    builder.max_bad, builder.origin = max_bad, source
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    except RuntimeError as error:  # array_record's word for a disk that takes nothing more
        raise DataError(f"{suite} cannot be written ({error}); free space or correct --dir, then run again") from error
    except DataError as error:
        if not is_url(source):
            raise
        fix = f"to download anew, remove {folder / suite} and its lines of {folder / SUMS_FILE}"
        raise DataError(f"{error}\n{fix}") from error
    return built


def _expected_sums(path: Path, name: str) -> dict[str, str]:
    sums = read_sums(path)
    if name not in sums:
        raise DataError(f"--checksums is {path}, which has no line for {name}; add one, or leave the flag out")
    return sums


def _check_built(suite: str, folder: Path, expected: Path) -> None:
    """Raise DataError where a set was built from other files than `expected` says; the files may be gone by now."""
    for stem, found in _noted(folder)["files"].items():
        name = f"{suite}/{stem}.jsonl"
        wanted = _expected_sums(expected, name)[name]
        if found["sha256"] != wanted:
            raise DataError(
                f"{folder} was built from a {name} with the SHA-256 {found['sha256']}, and {expected} says {wanted}; "
                f"remove that folder to prepare it anew, or correct {expected}"
            )


def _noted(folder: Path) -> dict[str, Any]:
    """What was noted when the set in `folder` was built. Raises DataError for a folder that is damaged."""
    with refusing_damage(folder):
        noted = tfds.builder_from_directory(str(folder)).info.metadata
        return {name: noted[name] for name in ("files", "bad_lines", "splits")}


def describe(suite: str, folder: Path) -> str:
    """What came of a set's files and where its splits come from, with every line that could not be used."""
    noted = _noted(folder)
    lines = []
    for stem, found in noted["files"].items():
        asides = [f"{found[kind]} {kind.replace('_', ' ')}" for kind in ("bad_lines", "blank_lines", "blank_answers")]
        lines.append(f"{suite}/{stem}.jsonl: {found['questions']} questions, {', '.join(asides)}")
    lines += [f"  not used: {line}" for line in noted["bad_lines"]]
    for split, origin in noted["splits"].items():
        held_out = " (held out of it)" if "held_out" in origin else ""
        lines.append(f"  {split}: {origin['questions']} questions of {origin['file']}.jsonl{held_out}")
    return "\n".join(lines)


def overlaps(folders: Mapping[str, Path]) -> dict[str, dict[str, int]]:
    """Set with a test split -> set with a train split -> test questions whose text stands in that train split."""
    keys = {}
    for suite, folder in folders.items():
        for split in {"train", "test"} & set(_noted(folder)["splits"]):
            keys[suite, split] = text_keys(record.question for record in StoredQuestions(folder, split))
    of = {split: [suite for suite in folders if (suite, split) in keys] for split in ("train", "test")}
    return {
        test: {train: int(np.isin(keys[test, "test"], keys[train, "train"]).sum()) for train in of["train"]}
        for test in of["test"]
    }


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`overlaps` as text; empty where no set has a train split."""
    trains = list(next(iter(counts.values()), ()))
    if not trains:
        return ""
    width = max(map(len, counts)) + 2
    lines = ["test questions that stand in a train split too, but for case, marks and articles:"]
    lines.append(" " * width + "".join(f"{train:>{len(train) + 2}}" for train in trains))
    lines += [
        test.ljust(width) + "".join(f"{count:>{len(train) + 2}}" for train, count in row.items())
        for test, row in counts.items()
    ]
    return "\n".join([*lines, "data.drop_overlap, which is the default, leaves them out of training"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags and prepare set after set."""
    parser = argparse.ArgumentParser(
        prog="python -m router_r1_jax.data.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", required=True, help="names, separated by commas; paper: all seven")
    parser.add_argument("--source", required=True, help="folder or base URL with <set>/{train,dev,test}.jsonl")
    parser.add_argument(
        "--dir", type=Path, default=Path("data"), help="where the prepared sets go: data.dir of a configuration; data"
    )
    parser.add_argument("--checksums", type=Path, help="expected sums of the files, as sha256sum prints them")
    parser.add_argument("--max_bad", type=float, default=0.01, help="share of a file's lines that may be unusable")
    args = parser.parse_args(arguments)
    suites = PAPER_SETS if args.sets == "paper" else tuple(dict.fromkeys(filter(None, args.sets.split(","))))
    try:
        _check(args, suites)
        folders = {}
        for suite in suites:
            folders[suite] = prepare_set(suite, args.source, args.dir, expected=args.checksums, max_bad=args.max_bad)
            print(describe(suite, folders[suite]), flush=True)
        print(table(overlaps(folders)))
    except DataError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = error.filename or args.dir  # a file that takes nothing more is not named
        sys.exit(f"error: {where}: {error.strerror or error}; free space or correct the path, then run again")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from there")


def _check(args: argparse.Namespace, suites: Sequence[str]) -> None:
    for suite in suites:
        if not re.fullmatch(r"\w+", suite):
            raise DataError(f"--sets names {suite!r}; a set's name is one word, also as a folder")
        if suite == SUITE:
            raise DataError(f"--sets names {suite!r}, which in a configuration is the synthetic world; rename it")
    if not suites:
        raise DataError(f"--sets names no set; choose of {', '.join(FILES)}, or paper for all of them")
    if args.checksums and not args.checksums.is_file():
        raise DataError(f"--checksums is {args.checksums}, which is no file; write one with sha256sum */*.jsonl")
    if not 0 <= args.max_bad < 1:
        raise DataError(f"--max_bad is {args.max_bad}; it is a share of the lines, in [0, 1)")
    if is_url(args.source):
        check_url(args.source)
    elif not Path(args.source).is_dir():
        raise DataError(
            f"--source is {args.source!r}, which is no folder; give one, or a URL that begins with https://"
        )


if __name__ == "__main__":
    main()
