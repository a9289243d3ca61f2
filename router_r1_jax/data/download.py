"""Files from a base URL: resumed where they were cut, whole or not there, and the same ones each time."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
from tqdm import tqdm

from router_r1_jax.data.questions import DataError

SUMS_FILE = "SHA256SUMS"  # as sha256sum writes and checks it
ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt; doubles
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
PIECE = 1 << 16  # bytes written at a time; of a cut download the last, unfinished one is lost


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded; else it is a folder."""
    return source.startswith(("http://", "https://"))


def check_url(source: str) -> None:
    """Refuse what is no URL, and one with a user, a password or a query.

    A URL is written into the set's metadata, where no key belongs; nor does the message show one.
    """
    try:
        parts = urlsplit(source)
        host, _ = parts.hostname, parts.port
    except ValueError:  # a bracket without the other, a port that is no number
        host = None
    if not host:
        raise DataError("--source begins like a URL, and its host or port cannot be read; write https://host/folder")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DataError(
            f"--source at {host} holds a user, a password or a query, which would be written down; give the "
            "plain URL, or download by other means and give the folder"
        )


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, from lines such as sha256sum prints; empty where there is no file.

    Raises DataError for a line that is none.
    """
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        sum_, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if not name or len(sum_) != 64 or set(sum_.lower()) - set("0123456789abcdef"):
            raise DataError(f"{path}:{number}: {line!r} is no checksum; write the 64 digits, two spaces and the file")
        sums[name] = sum_.lower()
    return sums


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sum(path: Path, name: str, expected: Mapping[str, str], where: str) -> str:
    """The file's SHA-256. Raises DataError where `expected`, which stands in the file `where`, says another."""
    found = sha256(path)
    if name in expected and found != expected[name]:
        raise DataError(
            f"{path} has the SHA-256 {found}, and {where} says {expected[name]} for {name}; it was damaged or is "
            f"another version: remove it, and correct {where} if the new one is meant"
        )
    return found


def fetch_all(base: str, names: list[str], folder: Path) -> None:
    """Download `base`/name to `folder`/name for each name that is not there yet, and note its sum in SUMS_FILE there.

    Sums that were noted before are verified, of files that lie there and of those that come anew. Raises DataError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / SUMS_FILE
    for name in names:
        path, sums = folder / name, read_sums(noted)
        if not path.exists():
            fetch(f"{base.rstrip('/')}/{quote(name)}", path)
        found = check_sum(path, name, sums, str(noted))
        if name not in sums:
            fresh = noted.with_name(noted.name + ".new")  # replaced as a whole: a torn line would be no checksum
            fresh.write_text("".join(f"{sum_}  {n}\n" for n, sum_ in {**sums, name: found}.items()), encoding="utf-8")
            fresh.replace(noted)


def fetch(url: str, path: Path) -> None:
    """Download to `path`, which is whole once it exists; what has come so far lies beside it, as *.part.

    A cut download goes on where it was, also in a later run, if the server offers that and still has the same version
    (ETag or date); else it begins anew. Raises DataError where the server refuses, or fails ATTEMPTS times in a row
    without sending anything new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    failures = 0
    while True:
        before = _size(part)
        try:
            _fetch_rest(url, part, tag)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status not in (408, 416, 429):
                raise DataError(f"{url} answers HTTP {status}; correct --source, or give a folder") from error
            failures = 1 if _size(part) > before else failures + 1
            if failures == ATTEMPTS:
                said = str(error).partition(" (Caused")[0]
                raise DataError(
                    f"{url} failed {ATTEMPTS} times in a row ({said}); the same command goes on from there, or give a "
                    "folder with the files"
                ) from error
            time.sleep(PAUSE * 2 ** (failures - 1))
    part.replace(path)
    tag.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_rest(url: str, part: Path, tag: Path) -> None:
    """One request for what `part` lacks of the file; `tag` says of which version it is.

    Raises requests.RequestException, also where fewer bytes come than the server has announced.
    """
    have = _size(part) if tag.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges are then those of the file
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text(encoding="utf-8")}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # there is no rest: nothing tells a whole file from one of another version
            tag.unlink()
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
            _note_version(response, tag)
        total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        name = part.name.removesuffix(".part")
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(initial=have, total=total, desc=name, unit="B", unit_scale=True, dynamic_ncols=True) as bar,
        ):
            for piece in response.iter_content(PIECE):
                file.write(piece)
                bar.update(len(piece))
    if total is not None and _size(part) != total:
        raise requests.ConnectionError(f"{_size(part)} of {total} bytes came")


def _note_version(response: requests.Response, tag: Path) -> None:
    """Keep what If-Range takes; without it a cut download cannot go on."""
    etag = response.headers.get("ETag", "")
    version = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    if version:
        tag.write_text(version, encoding="utf-8")
    else:
        tag.unlink(missing_ok=True)
