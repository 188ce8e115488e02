"""A download ends with the right bytes or with one line that says why not."""

from pathlib import Path

import pytest

from edm2kit.torch_utils import download as room
from edm2kit.torch_utils.download import Patience, download
from tests.support.fake_server import serve

BODY = bytes(range(256)) * 2048  # 512 KiB, eight of the chunks that are written at once


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Clock:
    """Stands in for time.sleep and remembers how long it was asked to wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)


def quick(clock: Clock, attempts: int = 4) -> Patience:
    return Patience(attempts=attempts, first_wait_sec=1, longest_wait_sec=60, stall_sec=0.2, sleep=clock)


def run(tmp_path: Path, misdeeds: list, **options) -> tuple[bytes, list[str | None], list[float]]:
    """Download /a past `misdeeds`; returns the bytes, the Range headers seen and the waits."""
    clock = Clock()
    with serve({"/a": BODY}, {"/a": misdeeds}) as server:
        download(server.url("/a"), tmp_path / "a", patience=quick(clock), **options)
        return (tmp_path / "a").read_bytes(), [wanted for _, wanted in server.seen], clock.waits


def test_a_server_that_behaves_is_asked_once(tmp_path):
    assert run(tmp_path, [], size_bytes=len(BODY)) == (BODY, [None], [])


def test_a_cut_connection_is_continued_where_it_ended(tmp_path):
    assert run(tmp_path, ["truncate", "truncate"]) == (BODY, [None, "bytes=262144-", "bytes=393216-"], [1, 2])


def test_a_stalled_connection_is_cut_and_continued(tmp_path):
    assert run(tmp_path, ["stall"]) == (BODY, [None, "bytes=262144-"], [1])


def test_server_errors_are_waited_out_with_growing_pauses(tmp_path):
    assert run(tmp_path, [500, 503, 429]) == (BODY, [None] * 4, [1, 2, 4])


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path):
    assert run(tmp_path, ["truncate", "ignore-range"])[:2] == (BODY, [None, "bytes=262144-"])


def test_a_range_other_than_the_one_asked_for_is_not_appended(tmp_path):
    assert run(tmp_path, ["truncate", "wrong-range"])[:2] == (BODY, [None, "bytes=262144-", None])


def test_without_etag_or_date_nothing_is_continued(tmp_path):
    with serve({"/a": BODY}, {"/a": ["truncate"]}) as server:
        server.etag = ""
        download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))
        assert [wanted for _, wanted in server.seen] == [None, None]
    assert (tmp_path / "a").read_bytes() == BODY


def test_a_partial_file_of_unknown_origin_is_not_continued(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 5120)
    assert run(tmp_path, []) == (BODY, [None], [])


def test_an_unknown_length_is_read_to_the_end(tmp_path):
    assert run(tmp_path, ["no-length"])[0] == BODY


def test_a_file_that_changed_in_between_is_read_anew(tmp_path):
    clock = Clock()
    with serve({"/a": b"old" * 99999}, {"/a": ["truncate"]}) as server:
        with pytest.raises(ValueError, match="the connection ended early"):
            download(server.url("/a"), tmp_path / "a", patience=quick(clock, attempts=1))
        server.files["/a"], server.etag = BODY, '"2"'
        assert not download(server.url("/a"), tmp_path / "a", patience=quick(clock))
    assert (tmp_path / "a").read_bytes() == BODY


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(tmp_path):
    clock = Clock()
    with serve({"/a": BODY}, {"/a": ["truncate"]}) as server:
        with pytest.raises(ValueError, match=r"^cannot download .*after the 262144 bytes that arrived\)$"):
            download(server.url("/a"), tmp_path / "a", patience=quick(clock, attempts=1))
        assert download(server.url("/a"), tmp_path / "a", patience=quick(clock))
        # and a call that finds everything there already only hears so
        assert download(server.url("/a"), tmp_path / "a", patience=quick(clock))
        assert [wanted for _, wanted in server.seen] == [None, "bytes=262144-", "bytes=524288-"]
    assert (tmp_path / "a").read_bytes() == BODY


def test_attempts_are_bounded(tmp_path):
    clock = Clock()
    with serve({"/a": BODY}, {"/a": [500] * 9}) as server:
        with pytest.raises(ValueError, match=r"answered 500 .*after 4 attempts"):
            download(server.url("/a"), tmp_path / "a", patience=quick(clock))
        assert len(server.seen) == 4
    assert clock.waits == [1, 2, 4]


def test_attempts_that_bring_a_lot_do_not_count_as_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_PROGRESS_BYTES", 2000)
    monkeypatch.setattr(room, "_CHUNK_BYTES", 1000)
    body, wanted, _ = run(tmp_path, ["truncate"] * 6)
    assert body == BODY
    assert len(wanted) == 7  # `quick` allows four without progress


def test_nobody_listening_is_one_line(tmp_path):
    with serve({}) as server:
        url = server.url("/a")
    with pytest.raises(ValueError) as error:
        download(url, tmp_path / "a", patience=quick(Clock(), attempts=2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("misdeed", "said"), [(404, "answered 404"), (403, "answered 403"), ("html", "sent a web page")]
)
def test_refusals_are_not_repeated(tmp_path, misdeed, said):
    with serve({"/a": BODY}, {"/a": [misdeed]}) as server:
        with pytest.raises(ValueError, match=said):
            download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))
        assert len(server.seen) == 1


def test_a_wrong_size_is_refused_before_the_bytes_are_fetched(tmp_path):
    with serve({"/a": BODY}) as server, pytest.raises(ValueError, match="has 524288 bytes, expected 7"):
        download(server.url("/a"), tmp_path / "a", size_bytes=7, patience=quick(Clock()))
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_told_before_the_bytes_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: room.shutil._ntuple_diskusage(9, 9, 9))
    with serve({"/a": BODY}) as server, pytest.raises(ValueError, match=r"needs 524288 bytes .* 9 are free"):
        download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))
