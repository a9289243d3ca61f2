"""Downloads over real HTTP from a server that cuts, forgets and lies: the file is the served one, or there is none."""

import hashlib

import pytest
from file_server import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.data import download
from router_r1_jax.data.download import check_url, fetch, fetch_all, read_sums
from router_r1_jax.data.questions import DataError

BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True, scope="module")
def small_and_hasty():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(download, "PAUSE", 0.0)
        patched.setattr(download, "PIECE", 100)
        yield


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("versions", ["ETag", "Last-Modified"])
def test_a_cut_download_goes_on_where_it_was(tmp_path, versions):
    with serving({"/f": BODY}) as server:
        server.versions, server.cuts = versions, [1000, 2000, None]
        fetch(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-", "bytes=3000-"]
    assert names(tmp_path) == ["f"]


def test_a_later_run_goes_on_too(tmp_path, monkeypatch):
    with serving({"/f": BODY}) as server:
        server.cuts = [700]
        monkeypatch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(DataError, match="failed 1 times in a row"):
            server.refuses = [503]
            fetch(f"{server.url}/f", tmp_path / "f")
        assert names(tmp_path) == []
        monkeypatch.setattr(download, "ATTEMPTS", 2)
        server.refuses = []
        fetch(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.requests[-1][1] == "bytes=700-"


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    ranges=st.booleans(),
    versions=st.sampled_from(["ETag", "Last-Modified", ""]),
    changed=st.integers(0, 6),
)
def test_whatever_is_cut_the_file_is_one_version_and_whole(cuts, ranges, versions, changed, tmp_path_factory):
    """The file on the server is replaced after `changed` requests; what arrives is the old or the new one."""
    path = tmp_path_factory.mktemp("f") / "f"
    old, new = BODY, BODY[::-1] + b"more"
    with serving({"/f": old}) as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(download, "ATTEMPTS", len(cuts) + 1)
        server.cuts, server.ranges, server.versions = list(cuts), ranges, versions
        answer = server.answer

        def change_in_time(handler):
            if len(server.requests) == changed:
                server.files["/f"] = new
            answer(handler)

        server.answer = change_in_time
        fetch(f"{server.url}/f", path)
        assert path.read_bytes() in (old, new)
    assert names(path.parent) == ["f"]


def test_a_part_that_is_already_whole_is_fetched_anew(tmp_path):
    with serving({"/f": BODY}) as server:
        (tmp_path / "f.part").write_bytes(BODY)
        (tmp_path / "f.tag").write_text(f'"{hash(BODY)}"')
        fetch(f"{server.url}/f", tmp_path / "f")
        assert [asked for _, asked in server.requests] == [f"bytes={len(BODY)}-", None]
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_server_that_keeps_failing_is_given_up(tmp_path):
    with serving({"/f": BODY}) as server:
        server.refuses = [503] * 20
        with pytest.raises(DataError, match=r"/f failed 5 times in a row \(503.*the same command goes on"):
            fetch(f"{server.url}/f", tmp_path / "f")
        assert len(server.requests) == 5
        server.refuses = [503, 429, 500]
        fetch(f"{server.url}/f", tmp_path / "f")
        with pytest.raises(DataError, match="/none answers HTTP 404; correct --source"):
            fetch(f"{server.url}/none", tmp_path / "none")
    with pytest.raises(DataError, match="/f failed 5 times in a row"):
        fetch(f"{server.url}/f", tmp_path / "g")  # nobody listens there any more
    assert names(tmp_path) == ["f"]


def test_the_first_download_notes_sums_and_later_ones_must_have_them(tmp_path):
    files = {"/nq/train.jsonl": BODY, "/nq/a b.jsonl": b"x", "/nq/a%20b.jsonl": b"y"}
    with serving(files) as server:
        fetch_all(f"{server.url}/", ["nq/train.jsonl", "nq/a b.jsonl"], tmp_path)
        sums = {
            name: hashlib.sha256(body).hexdigest()
            for name, body in {"nq/train.jsonl": BODY, "nq/a b.jsonl": b"y"}.items()
        }
        assert read_sums(tmp_path / "SHA256SUMS") == sums
        fetch_all(server.url, ["nq/train.jsonl"], tmp_path)
        assert len(server.requests) == 2  # what lies there is not fetched again
        server.files["/nq/train.jsonl"] = b"another version"
        (tmp_path / "nq/train.jsonl").unlink()
        with pytest.raises(DataError, match="has the SHA-256 .* and .*SHA256SUMS says .* for nq/train.jsonl"):
            fetch_all(server.url, ["nq/train.jsonl"], tmp_path)
        (tmp_path / "nq/a b.jsonl").write_bytes(b"damaged")
        with pytest.raises(DataError, match="nq/a b.jsonl has the SHA-256"):
            fetch_all(server.url, ["nq/a b.jsonl"], tmp_path)
        assert read_sums(tmp_path / "SHA256SUMS") == sums


def test_sums_are_read_as_sha256sum_prints_them(tmp_path):
    path = tmp_path / "sums"
    path.write_text(f"{'a' * 64}  nq/train.jsonl\n{'B' * 64} *./nq/my file.jsonl\n")
    assert read_sums(path) == {"nq/train.jsonl": "a" * 64, "nq/my file.jsonl": "b" * 64}
    for bad in ("nq/train.jsonl", "abc  nq/train.jsonl", "g" * 64 + "  f", "a" * 64):
        path.write_text(f"{'a' * 64}  f\n{bad}\n")
        with pytest.raises(DataError, match=f"{path}:2: .* is no checksum"):
            read_sums(path)


@pytest.mark.parametrize(
    "url", ["http://", "http:///data", "https://[host/d", "http://host:key/d", "http://me:key/2@h"]
)
def test_what_is_no_url_is_refused_at_once(url):
    with pytest.raises(DataError, match="--source begins like a URL, and its host or port cannot be read") as refused:
        check_url(url)
    assert "key" not in str(refused.value)


@pytest.mark.parametrize("url", ["https://me:key@host/data", "https://me@host/d", "https://host/d?token=key"])
def test_a_url_with_a_secret_is_refused_and_the_secret_not_shown(url):
    with pytest.raises(DataError, match="--source at host holds a user, a password or a query") as refused:
        check_url(url)
    assert "key" not in str(refused.value)
