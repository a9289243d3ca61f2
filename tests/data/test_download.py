"""Downloads over HTTP from a server that breaks connections and changes files: a file is the served one, or missing."""

import pytest
from file_server import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.data import download
from router_r1_jax.data.questions import DataError

BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True, scope="module")
def small_chunks_and_no_backoff():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(download, "BACKOFF", 0.0)
        patched.setattr(download, "CHUNK_BYTES", 100)
        yield


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("versions", ["ETag", "Last-Modified"])
def test_an_interrupted_download_resumes(tmp_path, versions):
    with serving({"/f": BODY}) as server:
        server.versions, server.breaks = versions, [1000, 2000, None]
        download.download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-", "bytes=3000-"]
    assert names(tmp_path) == ["f"]


def test_a_later_run_resumes_too(tmp_path, monkeypatch):
    with serving({"/f": BODY}) as server:
        server.breaks = [700]
        monkeypatch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(DataError, match="failed 1 times in a row"):
            server.refuses = [503]
            download.download(f"{server.url}/f", tmp_path / "f")
        assert names(tmp_path) == []
        monkeypatch.setattr(download, "ATTEMPTS", 2)
        server.refuses = []
        download.download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.requests[-1][1] == "bytes=700-"


@settings(max_examples=40, deadline=None)
@given(
    breaks=st.lists(st.integers(0, 3000), max_size=6),
    ranges=st.booleans(),
    versions=st.sampled_from(["ETag", "Last-Modified", ""]),
    changed=st.integers(0, 6),
)
def test_an_interrupted_file_is_one_version_and_complete(breaks, ranges, versions, changed, tmp_path_factory):
    """The file on the server is replaced after `changed` requests; the old or the new one arrives."""
    path = tmp_path_factory.mktemp("f") / "f"
    old, new = BODY, BODY[::-1] + b"more"
    with serving({"/f": old}) as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(download, "ATTEMPTS", len(breaks) + 1)
        server.breaks, server.ranges, server.versions = list(breaks), ranges, versions
        answer = server.answer

        def change_in_time(handler):
            if len(server.requests) == changed:
                server.files["/f"] = new
            answer(handler)

        server.answer = change_in_time
        download.download(f"{server.url}/f", path)
        assert path.read_bytes() in (old, new)
    assert names(path.parent) == ["f"]


def test_a_part_that_is_already_complete_is_downloaded_anew(tmp_path):
    with serving({"/f": BODY}) as server:
        (tmp_path / "f.part").write_bytes(BODY)
        (tmp_path / "f.tag").write_text(f'"{hash(BODY)}"')
        download.download(f"{server.url}/f", tmp_path / "f")
        assert [asked for _, asked in server.requests] == [f"bytes={len(BODY)}-", None]
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_server_that_keeps_failing_is_an_error(tmp_path):
    with serving({"/f": BODY}) as server:
        server.refuses = [503] * 20
        with pytest.raises(DataError, match=r"/f failed 5 times in a row \(503.*the same command goes on"):
            download.download(f"{server.url}/f", tmp_path / "f")
        assert len(server.requests) == 5
        server.refuses = [503, 429, 500]
        download.download(f"{server.url}/f", tmp_path / "f")
        with pytest.raises(DataError, match="/none answers HTTP 404; correct --source"):
            download.download(f"{server.url}/none", tmp_path / "none")
    with pytest.raises(DataError, match="/f failed 5 times in a row"):
        download.download(f"{server.url}/f", tmp_path / "g")  # nobody listens there any more
    assert names(tmp_path) == ["f"]


def test_checksums_are_read_in_the_format_of_sha256sum(tmp_path):
    path = tmp_path / "sums"
    path.write_text(f"{'a' * 64}  nq/train.jsonl\n{'B' * 64} *./nq/my file.jsonl\n")
    assert download.read_checksums(path) == {"nq/train.jsonl": "a" * 64, "nq/my file.jsonl": "b" * 64}
    for bad in ("nq/train.jsonl", "abc  nq/train.jsonl", "g" * 64 + "  f", "a" * 64):
        path.write_text(f"{'a' * 64}  f\n{bad}\n")
        with pytest.raises(DataError, match=f"{path}:2: .* is no checksum"):
            download.read_checksums(path)


@pytest.mark.parametrize(
    "url", ["http://", "http:///data", "https://[host/d", "http://host:key/d", "http://me:key/2@h"]
)
def test_a_malformed_url_is_refused_at_once(url):
    with pytest.raises(DataError, match="--source begins like a URL, and its host or port cannot be read") as refused:
        download.check_url(url)
    assert "key" not in str(refused.value)


@pytest.mark.parametrize("url", ["https://me:key@host/data", "https://me@host/d", "https://host/d?token=key"])
def test_a_url_with_a_secret_is_refused_and_the_secret_not_shown(url):
    with pytest.raises(DataError, match="--source at host holds a user, a password or a query") as refused:
        download.check_url(url)
    assert "key" not in str(refused.value)
