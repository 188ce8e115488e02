"""A cache of downloads: the local file behind a path or URL, with its hash verified."""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from edm2kit.torch_utils import dist
from edm2kit.torch_utils.download import PATIENT, Patience, download, forget
from edm2kit.torch_utils.files import HAS_LOCKS, atomic_write, file_lock, sha256_of, sync_folder

_MANIFEST = Path(__file__).resolve().parent.parent / "configs" / "hashes.yaml"
_REPORTED = "third party"  # the source, in hashes.yaml, of a hash that the publisher of the file does not give


@dataclass(frozen=True)
class Pin:
    """The expected hash of a file, its size (None if unknown), and the source of both, as in configs/hashes.yaml."""

    sha256: str
    size_bytes: int | None
    source: str


def pinned(url: str) -> Pin | None:
    """The pin of `url` in edm2kit/configs/hashes.yaml, or None."""
    entry = _manifest(_MANIFEST).get(url)
    return None if entry is None else Pin(str(entry["sha256"]), entry.get("bytes"), entry["source"])


@functools.cache
def _manifest(path: Path) -> Mapping[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def fetch(
    url: str | Path,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
    local_dir: str | Path | None = None,
    *,
    patience: Patience = PATIENT,
) -> Path:
    """The local file behind a path, an http(s) URL or hf://org/repo[@revision]/file, downloaded at most once.

    A local path is returned as it is. A URL is looked up in `local_dir` (by its path or its bare name), then in the
    cache: `cache_dir`, else $DNNLIB_CACHE_DIR, else edm2-toolkit under $XDG_CACHE_HOME or ~/.cache. One process
    downloads, others wait. $EDM2_MIRROR, a URL or a folder, replaces scheme and host of every URL; EDM2_OFFLINE=1 or
    HF_HUB_OFFLINE=1 forbids the network. The file must have the hash `sha256`, else the one pinned in
    edm2kit/configs/hashes.yaml, else the one recorded beside the cached file on first use.

    Raises ValueError, in one line, if a file is missing, a download fails, or a hash is wrong.
    """
    if "://" not in str(url):
        if not str(url):
            raise ValueError("the path of a file is empty; give a path, an https:// URL or hf://org/repo/file")
        path = Path(url)
        if not path.exists():
            raise ValueError(
                f"{path}: no such file or folder; give an existing one, an https:// URL or hf://org/repo/file"
            )
        return path if sha256 is None else _verified(path, Pin(sha256, None, "the caller"))
    remote = _parse(str(url))
    pin = Pin(sha256, None, "the caller") if sha256 else pinned(remote.name)
    for folder in (local_dir, _mirror_folder()):
        found = None if folder is None else _find_in(Path(folder), remote)
        if found is not None:
            return _verified(found, pin)
    place = _cache_root(cache_dir) / remote.host / remote.path
    if not place.is_file():
        if remote.repo is not None and not os.environ.get("EDM2_MIRROR"):
            return _verified(_from_hub(remote, place), pin)
        with file_lock(place.with_name(f".{place.name}.lock"), _Downloading(place, patience)):
            # another process may have finished it while this one waited
            if not place.is_file():
                _download_to(place, remote, pin, patience)
                return _verified(place, pin, record=True, is_new=True)
    return _verified(place, pin, record=True)


class _Downloading:
    """Called with the owner of a lock while another process downloads; gives up when nothing arrives there any more."""

    def __init__(self, place: Path, patience: Patience):
        self.place, self.patience = place, patience
        self.limit_sec = patience.attempts * (patience.longest_wait_sec + patience.stall_sec)
        self._seen: tuple[int, float] | None = None  # the bytes that had arrived, and when

    def __call__(self, owner: str) -> None:
        arrived = 0
        with contextlib.suppress(OSError):
            arrived = self._partial().stat().st_size
        now = self.patience.clock()
        if self._seen is None:
            dist.print0(f"Waiting for another process that downloads {self.place.name} ({owner})")
        if self._seen is None or arrived != self._seen[0]:
            self._seen = arrived, now
        elif now - self._seen[1] > self.limit_sec:
            raise ValueError(
                f"{owner} has been downloading {self.place.name} for a while, but nothing arrived in the last "
                f"{self.limit_sec:.0f} s; it may be stopped. End it, or wait for it, and run the command again"
            )

    def _partial(self) -> Path:
        return self.place.with_name(f".{self.place.name}.partial")


def cached(url: str | Path) -> Path | None:
    """The file that `fetch(url)` would find without the network, not verified; None if it would download."""
    if "://" not in str(url):
        return Path(url) if Path(url).exists() else None
    remote = _parse(str(url))
    folder = _mirror_folder()
    found = None if folder is None else _find_in(folder, remote)
    if found is not None:
        return found
    place = _cache_root(None) / remote.host / remote.path
    return place if place.is_file() else None


def cache_folder() -> Path:
    """The folder for downloads that `fetch` uses by default; it may not exist yet."""
    return _cache_root(None)


@dataclass(frozen=True)
class _Remote:
    name: str  # as the caller wrote it and as hashes.yaml lists it
    url: str  # for plain HTTP
    host: str
    path: Path  # below the host; safe to append to a folder
    repo: tuple[str, str | None, str] | None = None  # Hugging Face: repository, revision, file


def _parse(name: str) -> _Remote:
    try:
        parts = urlsplit(name)
        port = f"_{parts.port}" if parts.port else ""
    except ValueError as error:  # a port or an address that does not exist
        raise ValueError(f"{name} is not a valid URL: {error}") from error
    if parts.scheme in ("http", "https") and parts.hostname and parts.path.strip("/"):
        host = parts.hostname + port
        return _Remote(name, name, host, _safe_path(parts.path, parts.query))
    hub = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)", name)
    if hub is None:
        raise ValueError(
            f"{name}: expected a local path, an http(s):// URL of a file, or hf://org/repo[@revision]/file"
        )
    repo, revision, file = hub.groups()
    url = f"https://huggingface.co/{repo}/resolve/{revision or 'main'}/{file}"
    return _Remote(name, url, "huggingface.co", _safe_path(urlsplit(url).path, ""), (repo, revision, file))


def _safe_path(path: str, query: str) -> Path:
    """A relative path that stays below the folder it is appended to, and differs between URLs."""
    parts = re.findall("[^/]+", path)
    safe = [re.sub(r'[\\/:*?"<>|\x00-\x1f]|^\.+', "_", unquote(part)) for part in parts]
    if query or safe != parts:
        safe[-1] = f"{hashlib.sha256(f'{path}?{query}'.encode()).hexdigest()[:16]}-{safe[-1]}"
    return Path(*safe)


def _cache_root(cache_dir: str | Path | None) -> Path:
    if cache_dir is None:
        cache_dir = os.environ.get("DNNLIB_CACHE_DIR")
    if cache_dir:
        return Path(cache_dir).expanduser()
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    if os.path.isabs(folder):  # others are to be ignored, says the XDG Base Directory Specification
        return Path(folder) / "edm2-toolkit"
    try:
        return Path.home() / ".cache" / "edm2-toolkit"
    except RuntimeError as error:  # a container whose user has neither HOME nor an entry in passwd
        raise ValueError("there is no home folder for downloads; set DNNLIB_CACHE_DIR to a folder for them") from error


def _mirror_folder() -> Path | None:
    mirror = os.environ.get("EDM2_MIRROR", "")
    return Path(mirror).expanduser() if mirror and "://" not in mirror else None


def _find_in(folder: Path, remote: _Remote) -> Path | None:
    for path in (folder / remote.path, folder / remote.path.name):
        if path.is_file():
            return path
    return None


def _offline() -> str | None:
    """The environment variable that forbids the network, or None."""
    for name in ("EDM2_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            return name
    return None


def _refuse_offline(remote: _Remote, place: Path) -> None:
    if _offline():
        raise ValueError(
            f"{remote.path.name} is not in the cache and {_offline()} forbids downloads; get {remote.url} on a machine "
            f"with a network connection and put it at {place}"
        )


def _download_to(place: Path, remote: _Remote, pin: Pin | None, patience: Patience) -> None:
    if (folder := _mirror_folder()) is not None:
        raise ValueError(f"{remote.name}: not in the mirror folder EDM2_MIRROR; put it at {folder / remote.path}")
    _refuse_offline(remote, place)
    url = remote.url
    if mirror := os.environ.get("EDM2_MIRROR"):
        url = mirror.rstrip("/") + url[url.index("/", url.index("://") + 3) :]
    # without locks, each process keeps a partial file of its own
    suffix = "partial" if HAS_LOCKS else f"{os.getpid()}.partial"
    partial = place.with_name(f".{place.name}.{suffix}")
    try:
        resumed = download(url, partial, pin.size_bytes if pin else None, patience)
        if resumed and pin is not None and sha256_of(partial) != pin.sha256:
            # the parts are of different versions of the file: download it once more, in one piece
            forget(partial)
            download(url, partial, pin.size_bytes, patience)
    except ValueError as error:
        raise ValueError(f"{error}; or put the file at {place}") from error
    if pin is not None and (found := sha256_of(partial)) != pin.sha256:
        forget(partial)
        raise ValueError(_mismatch(url, found, pin) + "; the download was deleted")
    os.replace(partial, place)
    forget(partial)
    sync_folder(place.parent)


def _from_hub(remote: _Remote, place: Path) -> Path:
    """The file in the cache of huggingface_hub, which downloads, resumes and locks by itself."""
    assert remote.repo is not None
    repo, revision, file = remote.repo
    by_hand = f"or get {remote.url} and put it at {place}"
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(f"{remote.name}: hf:// needs `pip install huggingface_hub`; {by_hand}") from error
    try:
        return Path(
            huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=_offline() is not None)
        )
    except LocalEntryNotFoundError as error:
        _refuse_offline(remote, place)
        raise ValueError(f"{remote.name}: huggingface.co cannot be reached; {by_hand}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{remote.name}: {reason}; {by_hand}") from error


def _verified(path: Path, pin: Pin | None, record: bool = False, is_new: bool = False) -> Path:
    """`path`, if it has the hash of `pin` or, if that is None and `record` is set, the hash recorded beside it.

    A file that has just been downloaded (`is_new`) replaces the recorded hash, with a warning if it is another one: who
    deletes a file asks for the present one.
    """
    note = path.with_name(path.name + ".sha256")
    if pin is None and record:
        recorded = _recorded_hash(note)
        if is_new or recorded is None:
            found = sha256_of(path)
            if recorded not in (None, found):
                dist.warn0(
                    f"{path.name} is another file than the one downloaded before (sha256 {found}, was {recorded})"
                )
            try:
                with atomic_write(note, "w") as file:
                    file.write(f"{found}  {path.name}\n")  # the format of `sha256sum --check`
            except OSError as error:
                dist.warn0(f"cannot record the hash of {path.name} ({error}); it stays unverified")
            return path
        pin = Pin(recorded, None, str(note))
    if pin is not None and (found := sha256_of(path)) != pin.sha256:
        raise ValueError(_mismatch(path, found, pin) + f"; delete {path} to download it again")
    return path


def _recorded_hash(note: Path) -> str | None:
    """The hash in a note such as `sha256sum` writes; None without one, or if the note is damaged."""
    try:
        text = note.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.match(r"[0-9a-f]{64}\b", text)
    return found[0] if found else None


def _mismatch(what: str | Path, found: str, pin: Pin) -> str:
    text = f"{what}: sha256 is {found}, expected {pin.sha256} (according to {pin.source})"
    if pin.source == _REPORTED:  # such a hash may itself be wrong
        text += f"; if you know that the file is right, correct its entry in {_MANIFEST}"
    return text
