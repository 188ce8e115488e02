"""A URL is downloaded once, verified, from wherever it may come."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from edm2kit.torch_utils import cache as room
from edm2kit.torch_utils.cache import cached, fetch, pinned
from edm2kit.torch_utils.download import Patience
from tests.support.fake_server import FakeServer, serve

BODY = bytes(range(256)) * 2048
HASH = hashlib.sha256(BODY).hexdigest()
NO_WAIT = Patience(attempts=2, stall_sec=0.2, sleep=lambda seconds: None)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("EDM2_OFFLINE", "HF_HUB_OFFLINE", "EDM2_MIRROR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def place(cache: Path, server: FakeServer, path: str) -> Path:
    return cache / f"127.0.0.1_{server.server_address[1]}" / path


def pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, **entry: object) -> None:
    manifest = tmp_path / "hashes.yaml"
    manifest.write_text(yaml.safe_dump({url: {"source": "a test", **entry}}))
    monkeypatch.setattr(room, "_MANIFEST", manifest)


# local paths


def test_a_local_path_passes_through(tmp_path):
    (tmp_path / "a.pkl").write_bytes(BODY)
    assert fetch(str(tmp_path / "a.pkl")) == tmp_path / "a.pkl"
    assert fetch(tmp_path, sha256=None) == tmp_path
    assert fetch(tmp_path / "a.pkl", sha256=HASH) == tmp_path / "a.pkl"
    with pytest.raises(ValueError, match="expected 00"):
        fetch(tmp_path / "a.pkl", sha256="00")


def test_a_missing_path_says_what_would_do():
    with pytest.raises(ValueError, match=r"nowhere\.pkl: no such file or folder; give an existing one, an https://"):
        fetch("nowhere.pkl")


@pytest.mark.parametrize(
    "url", ["ftp://host/a", "https://host", "hf://only-org", "hf://org/repo", "file:///etc/passwd"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match="expected a local path, an http"):
        fetch(url)


@pytest.mark.parametrize("url", ["https://host:99999/a", "https://[::1/a", "https://host:x/a"])
def test_impossible_addresses_are_named(url):
    with pytest.raises(ValueError, match=re.escape(f"{url} is not a valid URL: ")):
        fetch(url)


def test_an_empty_path_is_not_this_folder():
    with pytest.raises(ValueError, match="the path of a file is empty"):
        fetch("")


# the cache


def test_the_second_fetch_asks_nobody(cache):
    with serve({"/x/a.pkl": BODY}) as server:
        first = fetch(server.url("/x/a.pkl"))
        assert fetch(server.url("/x/a.pkl")) == first == place(cache, server, "x/a.pkl")
        assert len(server.seen) == 1
    assert first.read_bytes() == BODY
    assert sorted(path.name for path in first.parent.iterdir()) == ["a.pkl", "a.pkl.sha256"]


def test_where_the_cache_lies(monkeypatch, tmp_path):
    with serve({"/a": BODY}) as server:
        inside = f"127.0.0.1_{server.server_address[1]}/a"
        assert fetch(server.url("/a"), cache_dir=tmp_path / "mine") == tmp_path / "mine" / inside
        monkeypatch.delenv("DNNLIB_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert fetch(server.url("/a")) == tmp_path / "xdg/edm2-toolkit" / inside
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert fetch(server.url("/a")) == tmp_path / "home/.cache/edm2-toolkit" / inside


def test_no_url_leads_out_of_the_cache_or_onto_another(monkeypatch, cache):
    paths = ["/a?v=1", "/a?v=2", "/a", "/..%2F..%2Fa", "/...x", "/_x", "/a%3Ab", "/a_b"]
    with serve({path: path.encode() for path in paths}) as server:
        found = [fetch(server.url(path)) for path in paths]
        assert [path.read_bytes().decode() for path in found] == paths
    assert len(set(found)) == len(paths)
    assert all(path.resolve().is_relative_to(cache) for path in found)
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    for url in ("https://host/%2e%2e/%2e%2e/a", "https://host/../../a"):
        with pytest.raises(ValueError, match="put it at") as error:
            fetch(url)
        assert Path(str(error.value).rpartition("put it at ")[2]).resolve().is_relative_to(cache)


def test_the_hash_of_the_first_use_is_recorded_and_verified_from_then_on():
    with serve({"/a": BODY}) as server:
        path = fetch(server.url("/a"))
        assert path.with_name("a.sha256").read_text() == f"{HASH}  a\n"
        path.write_bytes(b"X" + BODY[1:])
        with pytest.raises(ValueError, match=rf"a: sha256 is \w+, expected {HASH} \(according to .*a.sha256\); delete"):
            fetch(server.url("/a"))


@pytest.mark.parametrize("note", ["kept", "empty", "deleted"])
def test_a_deleted_file_is_downloaded_again_whatever_the_server_has_now(capsys, note):
    with serve({"/a": b"old"}) as server:
        path = fetch(server.url("/a"))
        server.files["/a"] = BODY
        path.unlink()
        if note == "empty":
            path.with_name("a.sha256").write_text("")
        if note == "deleted":
            path.with_name("a.sha256").unlink()
        assert fetch(server.url("/a")).read_bytes() == BODY
        assert ("another file than the one downloaded before" in capsys.readouterr().err) == (note == "kept")
        assert fetch(server.url("/a")).read_bytes() == BODY  # verified against the new note
        assert path.with_name("a.sha256").read_text() == f"{HASH}  a\n"


def test_a_downloader_that_stands_still_is_named_instead_of_waited_for_forever(cache, capsys):
    now = iter(range(0, 10**6, 50))
    waiting = room._Downloading(cache / "a", Patience(attempts=1, stall_sec=60, longest_wait_sec=0, clock=now.__next__))
    cache.mkdir()
    for arrived in range(5):  # as long as bytes arrive, it waits
        (cache / ".a.partial").write_bytes(bytes(arrived))
        waiting("process 7 on host")
    waiting("process 7 on host")
    with pytest.raises(
        ValueError, match=r"process 7 on host has been downloading a .* nothing arrived in the last 60 s"
    ):
        waiting("process 7 on host")
    assert capsys.readouterr().out.count("Waiting for another process that downloads a (process 7 on host)") == 1


def test_wrong_bytes_are_deleted():
    with serve({"/a": b"X" + BODY[1:]}) as server:
        with pytest.raises(ValueError, match=f"expected {HASH} .*deleted"):
            fetch(server.url("/a"), sha256=HASH)
        assert len(server.seen) == 1
        server.files["/a"] = BODY
        assert fetch(server.url("/a"), sha256=HASH).read_bytes() == BODY


def test_halves_that_do_not_fit_are_fetched_once_more_in_one_piece():
    with serve({"/a": b"X" + BODY[1:]}, {"/a": ["truncate"]}) as server:
        with pytest.raises(ValueError, match="the connection ended early"):
            fetch(server.url("/a"), sha256=HASH, patience=Patience(attempts=1))
        server.files["/a"] = BODY  # the same ETag: a server that lies about versions
        assert fetch(server.url("/a"), sha256=HASH, patience=NO_WAIT).read_bytes() == BODY


def test_a_failed_download_is_continued_by_the_next_fetch():
    with serve({"/a": BODY}, {"/a": ["stall", "stall"]}) as server:
        with pytest.raises(ValueError, match=r"nothing arrived for too long.*; or put the file at .*/a$"):
            fetch(server.url("/a"), patience=NO_WAIT)
        assert fetch(server.url("/a"), patience=NO_WAIT).read_bytes() == BODY
        assert [wanted for _, wanted in server.seen] == [None, "bytes=262144-", "bytes=393216-"]


# pinned hashes


def test_pinned_hashes_hold_for_the_cache_and_name_their_source(monkeypatch, tmp_path, cache):
    with serve({"/a": BODY}) as server:
        pin(monkeypatch, tmp_path, server.url("/a"), sha256="00", bytes=len(BODY))
        with pytest.raises(ValueError, match=r"expected 00 \(according to a test\); the download was deleted"):
            fetch(server.url("/a"))
        by_hand = place(cache, server, "a")
        by_hand.write_bytes(BODY)
        with pytest.raises(ValueError, match=r"expected 00 \(according to a test\); delete"):
            fetch(server.url("/a"))
        assert fetch(server.url("/a"), sha256=HASH) == by_hand  # the caller knows better
        assert len(server.seen) == 1


def test_a_pinned_size_is_checked_before_the_download(monkeypatch, tmp_path):
    with serve({"/a": BODY}) as server:
        pin(monkeypatch, tmp_path, server.url("/a"), sha256=HASH, bytes=17)
        with pytest.raises(ValueError, match="has 524288 bytes, expected 17"):
            fetch(server.url("/a"))


def test_the_manifest_lists_the_published_files():
    entries = yaml.safe_load(room._MANIFEST.read_text())
    assert all(len(pinned(url).sha256) == 64 and int(pinned(url).sha256, 16) for url in entries)
    base = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
    small = pinned(base + "edm2-img512-xs-2147483-0.045.pkl")
    assert (small.sha256[:8], small.size_bytes, small.source) == ("27a6c6ea", 249566482, "third party")
    assert pinned("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth").sha256[:4] == "d538"
    assert pinned(base + "unheard-of.pkl") is None


# several processes


def test_many_threads_download_once():
    found: list[Path] = []
    with serve({"/a": BODY}, {"/a": ["truncate"]}) as server:
        threads = [
            threading.Thread(target=lambda: found.append(fetch(server.url("/a"), patience=NO_WAIT))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.seen) == 2  # one download, continued once
    assert len(found) == 6
    assert found[0].read_bytes() == BODY


def test_two_processes_download_once():
    code = "import sys; from edm2kit.torch_utils.cache import fetch; print(fetch(sys.argv[1]))"
    with serve({"/a": BODY}) as server:
        command = [sys.executable, "-c", code, server.url("/a")]
        root = Path(room.__file__).parents[2]
        runs = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        told = [Path(run.communicate(timeout=60)[0].strip().splitlines()[-1]) for run in runs]
        assert len(server.seen) == 1
    assert told[0] == told[1]
    assert told[0].read_bytes() == BODY


# other places to get it from


def test_a_local_folder_comes_first(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.pkl").write_bytes(BODY)
    with serve({}) as server:
        assert fetch(server.url("/deep/a.pkl"), local_dir=tmp_path / "here") == tmp_path / "here/a.pkl"
        with pytest.raises(ValueError, match="expected 00"):
            fetch(server.url("/deep/a.pkl"), sha256="00", local_dir=tmp_path / "here")
        assert server.seen == []


def test_a_mirror_server_stands_in_for_the_host(monkeypatch, cache):
    with serve({"/edm2-mirror/x/a.pkl": BODY, "/edm2-mirror/org/repo/resolve/main/b": BODY}) as server:
        monkeypatch.setenv("EDM2_MIRROR", server.url("/edm2-mirror/"))
        assert fetch("https://nobody.invalid/x/a.pkl") == cache / "nobody.invalid/x/a.pkl"
        assert fetch("hf://org/repo/b") == cache / "huggingface.co/org/repo/resolve/main/b"


def test_what_is_here_is_found_without_asking(monkeypatch, tmp_path):
    with serve({"/a/b": BODY}) as server:
        assert cached(server.url("/a/b")) is None
        assert server.seen == []
        there = fetch(server.url("/a/b"))
        assert cached(server.url("/a/b")) == there
        monkeypatch.setenv("EDM2_MIRROR", str(tmp_path))
        (tmp_path / "b").write_bytes(BODY)
        assert cached(server.url("/a/b")) == tmp_path / "b"
    assert cached(tmp_path / "b") == tmp_path / "b"
    assert cached(tmp_path / "c") is None


def test_a_mirror_folder_stands_in_for_the_host(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("EDM2_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    inside = tmp_path / "mirror/x/a.pkl"
    with pytest.raises(ValueError, match=rf"not in the mirror folder EDM2_MIRROR; put it at {inside}$"):
        fetch("https://nobody.invalid/x/a.pkl")
    inside.parent.mkdir(parents=True)
    inside.write_bytes(BODY)
    assert fetch("https://nobody.invalid/x/a.pkl", sha256=HASH) == inside


@pytest.mark.parametrize("variable", ["EDM2_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_names_the_file_its_url_and_its_place(monkeypatch, variable):
    with serve({"/x/a.pkl": BODY}) as server:
        monkeypatch.setenv(variable, "1")
        url = server.url("/x/a.pkl")
        with pytest.raises(
            ValueError, match=rf"^a.pkl is not in the cache and {variable} forbids .* get {url} .*"
        ) as error:
            fetch(url)
        assert server.seen == []
        named = Path(str(error.value).rpartition("put it at ")[2])
        named.write_bytes(BODY)
        assert fetch(url) == named


# Hugging Face


def test_hf_goes_through_the_hub_library(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "weights").write_bytes(BODY)
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path / "weights"))
    assert fetch("hf://org/some.repo@abc123/sub/weights", sha256=HASH) == tmp_path / "weights"
    assert asked == [(("org/some.repo", "sub/weights"), {"revision": "abc123", "local_files_only": False})]
    with pytest.raises(ValueError, match="expected 00"):
        fetch("hf://org/some.repo/sub/weights", sha256="00")


def test_hf_offline_and_hf_put_by_hand(monkeypatch, cache):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    by_hand = cache / "huggingface.co/org/repo/resolve/main/sub/weights"
    with pytest.raises(ValueError, match=rf"EDM2_OFFLINE forbids .*resolve/main/sub/weights .* put it at {by_hand}$"):
        fetch("hf://org/repo/sub/weights")
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(BODY)
    assert fetch("hf://org/repo/sub/weights") == by_hand


def test_hf_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"hf:// needs `pip install huggingface_hub`; or get https://huggingface.co/org"
    ):
        fetch("hf://org/repo/weights")


def test_a_cache_that_cannot_be_written_is_still_read(cache, monkeypatch, capsys):
    with serve({"/a": BODY}) as server:
        by_hand = place(cache, server, "a")
        by_hand.parent.mkdir(parents=True)
        by_hand.write_bytes(BODY)
        monkeypatch.setattr(room, "atomic_write", lambda *a: (_ for _ in ()).throw(PermissionError("read-only")))
        assert fetch(server.url("/a")) == by_hand
    assert "stays unverified" in capsys.readouterr().err
    assert os.listdir(by_hand.parent) == ["a"]


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DNNLIB_CACHE_DIR")
    monkeypatch.setattr(room.Path, "home", homeless)
    with pytest.raises(ValueError, match="set DNNLIB_CACHE_DIR"):
        fetch("https://host/a")


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("/tmp/x", "/tmp/x"), ("~/x", "/home/me/x"), ("x", "/home/me/.cache"), ("", "/home/me/.cache")],
)
def test_the_cache_is_where_the_system_says_or_in_the_home_folder(monkeypatch, variable, expected):
    monkeypatch.delenv("DNNLIB_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert room.cache_folder() == Path(expected, "edm2-toolkit")


def test_a_mirror_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDM2_MIRROR", "~/mirror")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "a.pkl").write_bytes(BODY)
    assert fetch("https://example.org/deep/a.pkl") == tmp_path / "mirror" / "a.pkl"
