"""The cache where machines fail: downloaders that are killed, disks that fill up, streams that never end."""

import contextlib
import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from edm2kit.torch_utils import cache as store
from edm2kit.torch_utils import download as room
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.download import Patience
from tests.support import tiny
from tests.support.fake_server import serve

BODY = bytes(range(256)) * 2048
HALF = len(BODY) // 2

# a process of its own may write no file beyond so many bytes: what the system says then is as real as a full disk
LIMITED = """
import resource, signal, sys
from edm2kit.torch_utils.cache import fetch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    fetch(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("EDM2_OFFLINE", "HF_HUB_OFFLINE", "EDM2_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(code: str, url: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, url], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)


def test_whoever_waits_takes_over_from_a_killed_downloader(cache):
    found: list[Path] = []
    with serve({"/a": BODY}, {"/a": ["stall"]}) as server:
        first = start("import sys; from edm2kit.torch_utils.cache import fetch; fetch(sys.argv[1])", server.url("/a"))
        partial = cache / f"127.0.0.1_{server.server_address[1]}" / ".a.partial"
        while not partial.exists() or partial.stat().st_size < HALF:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"ended before it was killed: {first.wait(timeout=0.02)}")
        waiting = threading.Thread(target=lambda: found.append(fetch(server.url("/a"))))
        waiting.start()
        first.kill()
        first.communicate()
        waiting.join(timeout=30)
        assert [wanted for _, wanted in server.seen] == [None, f"bytes={HALF}-"]
    assert found[0].read_bytes() == BODY


def test_a_disk_that_fills_up_is_told_and_nothing_is_lost():
    with serve({"/a": BODY}) as server:
        full = start(LIMITED, server.url("/a"))
        said = full.communicate(timeout=60)[0]
        assert said.startswith(f"cannot download {server.url('/a')}: File too large")
        assert "the next call resumes after the 200000 bytes that arrived" in said
        assert said.count("\n") == 1
        assert fetch(server.url("/a")).read_bytes() == BODY
        assert [wanted for _, wanted in server.seen] == [None, "bytes=200000-"]


def test_a_disk_too_full_for_a_note_is_told_too(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with serve({"/a": BODY}) as server:
        monkeypatch.setattr(room, "_write_note", refuse)
        with pytest.raises(ValueError, match=r"cannot download .*: No space left on device, writing .*\.a\.partial"):
            fetch(server.url("/a"))


@pytest.mark.parametrize(("source", "told"), [("third party", True), ("file name", False)])
def test_a_reported_hash_may_be_wrong_itself(tmp_path, monkeypatch, source, told):
    with serve({"/a": BODY}) as server:
        manifest = tmp_path / "hashes.yaml"
        manifest.write_text(yaml.safe_dump({server.url("/a"): {"source": source, "sha256": "00"}}))
        monkeypatch.setattr(store, "_MANIFEST", manifest)
        with pytest.raises(ValueError, match="expected 00") as error:
            fetch(server.url("/a"))
    assert (f"correct its entry in {manifest}" in str(error.value)) == told


def test_a_stream_beyond_the_pinned_size_is_cut(tmp_path):
    with serve({"/a": BODY}, {"/a": ["no-length"]}) as server:
        with pytest.raises(ValueError, match="more than the 100000 bytes expected"):
            room.download(server.url("/a"), tmp_path / "a", 100_000, Patience(attempts=1))
        assert (tmp_path / "a").stat().st_size <= 100_000 + room._CHUNK_BYTES
