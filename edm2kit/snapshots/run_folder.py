"""Which network is meant by the folder of a training run, and what to give instead of a file that holds no network."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from edm2kit.snapshots.file_format import Header
from edm2kit.snapshots.loading import SUFFIXES, open_weights
from edm2kit.torch_utils import dist

_STATE = re.compile(r"training-state-(\d+)\.pt(\.damaged)?")
_RECORDS = ("config.yaml", "run.json", "stats.jsonl")
_HOW_TO_WRITE = (
    "Repeat its training command with --max-time 1s: a run writes its snapshots when it stops, too (not with "
    "--snapshot 0)"
)


def newest_snapshot(folder: Path) -> Path:
    """The newest training snapshot in a folder, with the longest EMA of that time, as in the run's sample sheets.

    A rebuilt EMA is taken if there are no others. Warns of damaged files, which are passed over. Raises ValueError,
    with what to do, if there is none, or if several are equally new: of several runs, or rebuilt with several lengths.
    """
    headers = _headers(folder)
    trained = {path: header for path, header in headers.items() if header.recipe is None}
    found = trained or headers
    if not found:
        raise ValueError(nothing_in(folder))
    if len({header.run_id for header in found.values()}) > 1:
        raise ValueError(f"{folder} holds networks of several runs; give one of its files: {_names(found)}")
    nimg = max(header.nimg for header in found.values())
    newest = {path: header for path, header in found.items() if header.nimg == nimg}
    if not trained and len(newest) > 1:
        raise ValueError(f"{folder} holds rebuilt EMAs of several lengths; give one of its files: {_names(newest)}")
    return max(newest, key=lambda path: newest[path].ema_std or 0.0)


def newest_of_folders(sources: Mapping[str, str | None]) -> dict[str, str]:
    """The newest snapshot of each source that is a folder, by role, the same on every rank; prints which.

    Raises ValueError if a folder has none, or if the guide ("gnet") is the same file as the network ("net").
    """
    found = {}
    for role, source in sources.items():
        if source is not None and Path(source).is_dir():
            found[role] = str(dist.on_rank0(newest_snapshot, Path(source)))
            dist.print0(f"{source}: using its newest snapshot, {Path(found[role]).name}")
    guide = found.get("gnet")
    if guide is not None and guide == found.get("net", sources.get("net")):
        raise ValueError(f"the guide network is the main one, {guide}; give the folder or snapshot of a weaker one")
    return found


def refuse_other_files(path: Path) -> None:
    """Raise ValueError if a file of a run is not a network, with the name of the one to give instead."""
    state = _STATE.fullmatch(path.name)
    if state is None and path.suffix != ".pt" and path.name not in _RECORDS:
        return
    if state is None:
        what = "a PyTorch file" if path.suffix == ".pt" else "a record of a training run"
        raise ValueError(f"{path} is {what}, not a network; give a snapshot (network-snapshot-*.safetensors), or a run")
    text = f"{path} is the state that training resumes from, not a network"
    trained = {p: header for p, header in _headers(path.parent).items() if header.recipe is None}
    of_same_time = [p for p, header in trained.items() if header.nimg == int(state[1])]
    if of_same_time:
        raise ValueError(f"{text}; give {max(of_same_time, key=lambda p: trained[p].ema_std or 0.0)}")
    try:
        best = newest_snapshot(path.parent)
    except ValueError as error:
        raise ValueError(f"{text}, and {error}") from error
    raise ValueError(f"{text}; the newest snapshot beside it is {best}")


def _headers(folder: Path) -> dict[Path, Header]:
    """The headers of all networks in a folder; damaged and foreign files are passed over, with a warning."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        try:
            found[path] = open_weights(path).header
        except ValueError as error:
            dist.warn0(f"passed over: {error}")
    return {path: header for path, header in found.items() if header.network != "parameters"}


def nothing_in(folder: Path) -> str:
    """Why a folder has no network, and what to do."""
    names = [path.name for path in folder.iterdir()]
    if not names:
        return f"{folder} is empty; give a snapshot, or the folder of a run that has some"
    if "model_index.json" in names:
        return f"{folder} is a pipeline of diffusers; write diffusers:{folder}"
    if any(_STATE.fullmatch(name) for name in names):
        return f"{folder} has no snapshots yet, only the state to resume from. {_HOW_TO_WRITE}"
    if "config.yaml" in names:
        return f"{folder} has neither snapshots nor a state to resume from. {_HOW_TO_WRITE}"
    below = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.safetensors")))
    if below:
        return f"{folder} has no snapshots, but its folders {', '.join(below[:8])} have; give one of them"
    if any(path.suffix in SUFFIXES for path in folder.iterdir()):
        return f"{folder} has only rebuilt EMAs, or files of other kinds; give the folder of a training run"
    return f"{folder} has no snapshots; give one, or the folder of a training run"


def _names(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
