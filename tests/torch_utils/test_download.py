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


def test_attempts_are_bounded_and_the_first_failure_is_reported_at_once(tmp_path, capsys):
    clock = Clock()
    with serve({"/a": BODY}, {"/a": [500] * 9}) as server:
        with pytest.raises(ValueError, match=r"answered 500 .*after 4 attempts"):
            download(server.url("/a"), tmp_path / "a", patience=quick(clock))
        assert len(server.seen) == 4
    assert clock.waits == [1, 2, 4]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "yet: the server answered 500" in warnings[0]
    assert warnings[0].endswith("trying again up to 3 times")


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


class Ticks:
    """Stands in for time.monotonic: a second passes between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_server_that_sends_a_byte_now_and_then_is_left_and_resumed(tmp_path):
    patience = Patience(attempts=2, stall_sec=5, sleep=Clock(), clock=Ticks())
    with serve({"/a": BODY}, {"/a": ["drip"]}) as server:
        download(server.url("/a"), tmp_path / "a", patience=patience)
        first, second = (wanted for _, wanted in server.seen)
    assert (tmp_path / "a").read_bytes() == BODY
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < len(BODY)


@pytest.mark.parametrize(("misdeed", "said"), [("drip", r"only \d+ bytes arrived in \d+ s"), ("drip-header", "0.6 s")])
def test_a_server_that_is_always_too_slow_is_named(tmp_path, misdeed, said):
    patience = Patience(attempts=2, connect_sec=0.2, stall_sec=0.2, sleep=Clock(), clock=Ticks())
    with serve({"/a": BODY}, {"/a": [misdeed] * 2}) as server, pytest.raises(ValueError, match=f"{said}.*2 attempts"):
        download(server.url("/a"), tmp_path / "a", patience=patience)


@pytest.mark.parametrize("misdeed", [None, "no-length"])
def test_a_file_of_unknown_size_is_read_up_to_a_limit_that_can_be_raised(tmp_path, monkeypatch, misdeed):
    with serve({"/a": BODY}, {"/a": [misdeed] * 2}) as server:
        monkeypatch.setenv("EDM2_MAX_DOWNLOAD_GB", "1e-4")
        with pytest.raises(ValueError, match=r"more than (the )?0\.0001 GB allowed.*set EDM2_MAX_DOWNLOAD_GB"):
            download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))
        monkeypatch.setenv("EDM2_MAX_DOWNLOAD_GB", "1")
        download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))
    assert (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize("text", ["much", "nan", "inf"])
def test_a_limit_that_is_not_a_number_is_one_line(tmp_path, monkeypatch, text):
    monkeypatch.setenv("EDM2_MAX_DOWNLOAD_GB", text)
    with serve({"/a": BODY}) as server, pytest.raises(ValueError, match=f"EDM2_MAX_DOWNLOAD_GB is '{text}'; expected"):
        download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))


@pytest.mark.parametrize("redirected", [False, True])
def test_http_to_another_machine_is_refused_unless_asked_for(tmp_path, monkeypatch, redirected):
    away = "http://192.0.2.1/a"  # reserved for documentation: nobody answers
    with serve({"/a": BODY}, {"/a": [f"to:{away}"] * 2}) as server:
        url = server.url("/a") if redirected else away
        with pytest.raises(ValueError, match=rf"cannot download {away}: http:// is not encrypted.*EDM2_ALLOW_HTTP=1"):
            download(url, tmp_path / "a", patience=quick(Clock()))
    monkeypatch.setenv("EDM2_ALLOW_HTTP", "1")
    room.check_encrypted(away)


def test_redirects_are_followed_but_not_forever_nor_to_files(tmp_path):
    with serve({"/a": BODY}, {"/a": ["to:/b?c=1", *["to:/a"] * 20, "to:file:///etc/passwd"]}) as server:
        server.files["/b?c=1"] = BODY
        download(server.url("/a"), tmp_path / "a", patience=quick(Clock()))
        assert (tmp_path / "a").read_bytes() == BODY
        with pytest.raises(ValueError, match="redirects more than 10 times"):
            download(server.url("/a"), tmp_path / "b", patience=quick(Clock()))
        with pytest.raises(
            ValueError, match=r"file:///etc/passwd: the server redirects to an address that is not http"
        ):
            download(server.url("/a"), tmp_path / "b", patience=quick(Clock()))
