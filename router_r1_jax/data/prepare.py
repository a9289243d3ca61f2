"""Command that prepares data sets: download or find their FlashRAG JSONL files, check them, build TFDS data sets.

    python -m router_r1_jax.data.prepare --sets=nq,hotpotqa --source=DIR_OR_URL

The source has <set>/{train,dev,test}.jsonl. It is a folder, or a base URL, whose files are kept in <dir>/downloads. For
the seven sets of the paper (`--sets=paper`) the URL is

    --source=https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main

With a commit in place of `main`, the files stay the same. Any other set is one of your own and comes from a folder. The
command prints the result for each file and every line that cannot be used. For each test split and each train split it
prints how many test questions the train split has too, but for case, marks and articles; `data.decontaminate`, which is
the default, leaves them out of training. A set that is already prepared is left alone, and a command that was
interrupted resumes when it is run again. The sets go to `--dir`; a configuration finds them by `data.dir`.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from router_r1_jax.config import PAPER_SETS, SYNTHETIC
from router_r1_jax.data import download
from router_r1_jax.data.decontamination import question_keys
from router_r1_jax.data.questions import OPEN_QA, DataError, StoredQuestions, damage_as_data_error
from router_r1_jax.data.tfds_builder import SPLIT_FILES, OpenQA, QuestionFiles
from router_r1_jax.launcher import Flag, launch


def find_split_files(dataset: str, source: str) -> dict[str, str]:
    """Split -> JSONL file without suffix: from SPLIT_FILES, or for a set of your own from the files in its folder.

    Raises DataError if the set has no file.
    """
    if dataset in SPLIT_FILES:
        return SPLIT_FILES[dataset]
    known = ", ".join(SPLIT_FILES)
    if download.is_url(source):
        raise DataError(f"--sets names {dataset!r}; from a URL only {known} can be prepared, others from a folder")
    folder = Path(source) / dataset
    found = [stem for stem in ("train", "test", "dev") if (folder / f"{stem}.jsonl").is_file()]
    if not found:
        raise DataError(
            f"--sets names {dataset!r}, and {folder} holds no train.jsonl, dev.jsonl or test.jsonl; the sets with "
            f"known files are {known}"
        )
    splits = {"train": "train", "test": "test", "dev": "validation" if "test" in found else "test"}
    return {splits[stem]: stem for stem in found}


def prepare_dataset(
    dataset: str, source: str, root: Path, *, checksums: Path | None = None, max_bad: float = 0.01
) -> Path:
    """Build a data set below `root`, unless it is already there; returns its folder.

    `checksums` is a file in the format of sha256sum, with names such as nq/train.jsonl. Raises DataError if files are
    missing, have other checksums, or have more than the share `max_bad` of lines that cannot be used.
    """
    files = find_split_files(dataset, source)
    built = root / OPEN_QA / dataset / str(OpenQA.VERSION)
    if built.exists():  # asked before a builder is made, because a builder reads this folder
        print(f"{dataset}: already prepared in {built}; remove that folder to prepare it anew")
        for stem, file in _metadata(built)["files"].items() if checksums else ():
            download.verify_checksum(built, f"{dataset}/{stem}.jsonl", file["sha256"], checksums)
        return built
    config = dataset if dataset in SPLIT_FILES else QuestionFiles(name=dataset, files=files)
    builder = OpenQA(data_dir=root, config=config, file_format="array_record")
    names = [f"{dataset}/{stem}.jsonl" for stem in dict.fromkeys(files.values())]
    folder = root / "downloads" if download.is_url(source) else Path(source)
    for name in names:
        path = folder / name
        if download.is_url(source) and not path.exists():
            download.download(f"{source.rstrip('/')}/{name}", path)
        if not path.is_file():
            raise DataError(f"{path} does not exist; --source is a folder with <set>/<file>.jsonl, or an https:// URL")
        if checksums:
            download.verify_checksum(path, name, download.sha256(path), checksums)
    builder.max_bad, builder.origin = max_bad, source
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    except RuntimeError as error:  # array_record raises it if the disk is full
        message = f"{dataset} cannot be written ({error}); free space or correct --dir, then run again"
        raise DataError(message) from error
    return built


def _metadata(folder: Path) -> dict[str, Any]:
    """What the builder recorded about the set in `folder`. Raises DataError if the folder is damaged."""
    with damage_as_data_error(folder):
        metadata = tfds.builder_from_directory(str(folder)).info.metadata
        return {name: metadata[name] for name in ("files", "bad_lines", "splits")}


def describe(dataset: str, folder: Path) -> str:
    """Questions and faults of each file of a set, every line that was not used, and the source of each split."""
    metadata = _metadata(folder)
    lines = []
    for stem, file in metadata["files"].items():
        faults = [f"{file[kind]} {kind.replace('_', ' ')}" for kind in ("bad_lines", "blank_lines", "blank_answers")]
        lines.append(f"{dataset}/{stem}.jsonl: {file['questions']} questions, {', '.join(faults)}")
    lines += [f"  not used: {line}" for line in metadata["bad_lines"]]
    for split, origin in metadata["splits"].items():
        held_out = " (held out of it)" if "held_out" in origin else ""
        lines.append(f"  {split}: {origin['questions']} questions of {origin['file']}.jsonl{held_out}")
    return "\n".join(lines)


def count_contaminated(folders: Mapping[str, Path]) -> dict[tuple[str, str], int]:
    """(set with a test split, set with a train split) -> number of test questions that the train split has too."""
    keys: dict[str, dict[str, np.ndarray]] = {"train": {}, "test": {}}
    for dataset, folder in folders.items():
        for split in keys.keys() & _metadata(folder)["splits"]:
            keys[split][dataset] = question_keys(record.question for record in StoredQuestions(folder, split))
    pairs = itertools.product(keys["test"].items(), keys["train"].items())
    return {(test, train): int(np.isin(asked, known).sum()) for (test, asked), (train, known) in pairs}


def main(*, sets: str, source: str, dir: str = "data", checksums: str = "", max_bad: float = 0.01) -> None:
    """Download or find question files, check them, and build data sets. Raises DataError, and OSError with the path."""
    datasets = PAPER_SETS if sets == "paper" else tuple(dict.fromkeys(filter(None, sets.split(","))))
    if not datasets:
        raise DataError(f"--sets names no set; choose of {', '.join(SPLIT_FILES)}, or paper for all of them")
    for dataset in datasets:
        if not re.fullmatch(r"\w+", dataset):
            raise DataError(f"--sets names {dataset!r}; a set's name is one word, also as a folder")
        if dataset == SYNTHETIC:
            raise DataError(f"--sets names {dataset!r}, which in a configuration is the synthetic world; rename it")
    if checksums and not Path(checksums).is_file():
        raise DataError(f"--checksums is {checksums}, which is no file; write one with sha256sum */*.jsonl")
    if not 0 <= max_bad < 1:
        raise DataError(f"--max_bad is {max_bad}; it is a share of the lines, in [0, 1)")
    if download.is_url(source):
        download.check_url(source)
    folders, expected = {}, Path(checksums) if checksums else None
    try:
        for dataset in datasets:
            folders[dataset] = prepare_dataset(dataset, source, Path(dir), checksums=expected, max_bad=max_bad)
            print(describe(dataset, folders[dataset]), flush=True)
        for (test, train), count in count_contaminated(folders).items():
            print(f"test questions of {test} that the train split of {train} has too: {count}")
    except OSError as error:
        error.filename = error.filename or dir  # a full disk is reported without a name
        raise


if __name__ == "__main__":
    flags = {
        "sets": Flag(str, "names, separated by commas; paper: all seven"),
        "source": Flag(str, "folder or base URL with <set>/{train,dev,test}.jsonl"),
        "dir": Flag("data", "where the prepared sets go: data.dir of a configuration"),
        "checksums": Flag("", "file with the expected SHA-256 of the files, in the format of sha256sum"),
        "max_bad": Flag(0.01, "share of a file's lines that may be unusable"),
    }
    launch(main, flags, config=False, workdir=False)
