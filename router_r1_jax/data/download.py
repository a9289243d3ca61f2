"""Resumable downloads over HTTP with SHA-256 checksums: a file is either complete and verified, or not there."""

import hashlib
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from router_r1_jax.data.questions import DataError

ATTEMPTS = 5  # consecutive attempts that bring nothing new
BACKOFF = 1.0  # seconds before the second attempt; doubles
TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
CHUNK_BYTES = 1 << 16  # an interrupted download loses at most the unfinished last chunk


def is_url(source: str) -> bool:
    """Whether a source is downloaded. Any other source is a folder."""
    return source.startswith(("http://", "https://"))


def check_url(source: str) -> None:
    """Raise DataError for a malformed URL, and for one with a user, a password or a query.

    The URL is written into the data set's metadata, so it must hold no key. The message does not repeat one either.
    """
    try:
        parts = urlsplit(source)
        host, _ = parts.hostname, parts.port
    except ValueError:  # for example an unmatched bracket or a port that is not a number
        host = None
    if not host:
        raise DataError("--source begins like a URL, and its host or port cannot be read; write https://host/folder")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DataError(
            f"--source at {host} holds a user, a password or a query, which would be written down; give the "
            "plain URL, or download by other means and give the folder"
        )


def read_checksums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, read from the output of sha256sum.

    Raises DataError for a line that is no checksum.
    """
    checksums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        checksum, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if not name or len(checksum) != 64 or set(checksum.lower()) - set("0123456789abcdef"):
            raise DataError(f"{path}:{number}: {line!r} is no checksum; write the 64 digits, two spaces and the file")
        checksums[name] = checksum.lower()
    return checksums


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksum(path: Path, name: str, found: str, checksum_file: Path) -> None:
    """Raise DataError unless `found` is the SHA-256 that `checksum_file` has for the file `name`.

    `path` is the file itself, or the data set that was built from it.
    """
    expected = read_checksums(checksum_file).get(name)
    if expected is None:
        raise DataError(f"{checksum_file} has no line for {name}; add one, or leave --checksums out")
    if found != expected:
        raise DataError(
            f"{path}: {name} has the SHA-256 {found}, and {checksum_file} says {expected}; it was damaged or is "
            f"another version: remove {path}, and correct {checksum_file} if the new one is meant"
        )


def download(url: str, path: Path) -> None:
    """Download to `path`, which exists only once it is complete. Until then the bytes are in `path`.part.

    An interrupted download resumes, in this run or a later one, if the server supports ranges and still has the same
    version (ETag or date). Otherwise it starts anew. Raises DataError if the server refuses the file, or if ATTEMPTS
    consecutive requests fail without sending anything new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    failures = 0
    while True:
        before = _size(part)
        try:
            _download_rest(url, part, tag)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status not in (408, 416, 429):
                raise DataError(f"{url} answers HTTP {status}; correct --source, or give a folder") from error
            failures = 1 if _size(part) > before else failures + 1
            if failures == ATTEMPTS:
                reason = str(error).partition(" (Caused")[0]
                raise DataError(
                    f"{url} failed {ATTEMPTS} times in a row ({reason}); the same command goes on from there, or give "
                    "a folder with the files"
                ) from error
            time.sleep(BACKOFF * 2 ** (failures - 1))
    part.replace(path)
    tag.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download_rest(url: str, part: Path, tag: Path) -> None:
    """Request the bytes that `part` still lacks. `tag` holds the file's version, or nothing if the server names none.

    Raises requests.RequestException, also if fewer bytes arrive than the server has announced.
    """
    version = tag.read_text(encoding="utf-8") if tag.exists() else ""
    start = _size(part) if version else 0
    headers = {"Accept-Encoding": "identity"}  # else lengths and ranges would count compressed bytes
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # no bytes are left, but whether they are of this version cannot be known
            tag.unlink()
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start, etag = 0, response.headers.get("ETag", "")
            # If-Range takes no weak ETag, which begins with W/.
            version = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
            tag.write_text(version, encoding="utf-8")
        total = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        name = part.name.removesuffix(".part")
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(initial=start, total=total, desc=name, unit="B", unit_scale=True, dynamic_ncols=True) as bar,
        ):
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise requests.ConnectionError(f"{_size(part)} of {total} bytes came")
