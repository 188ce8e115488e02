"""The four straight lines stay short: how many files of the package one run of each command passes through.

A file counts if one of its functions runs, in any thread. Importing it, which runs module and class bodies, does not
count.
"""

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import pytest
from click.testing import CliRunner

import edm2kit
from edm2kit.cli import generate, metrics, phema, train
from tests.support import tiny

PACKAGE = Path(edm2kit.__file__).parent
# how many files one run may pass through: lower a number when a line gets shorter, and do not raise it
TRAINING, EMA_REBUILD, GUIDED_IMAGES, DISTANCE = 26, 10, 20, 18


@contextmanager
def traced(files: set[str]) -> Iterator[None]:
    """Add the package's files in which a function runs to `files`."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code not in seen:
            seen.add(code)
            # module and class bodies have no local variables of their own
            if code.co_flags & inspect.CO_NEWLOCALS and code.co_filename.startswith(str(PACKAGE)):
                files.add(str(Path(code.co_filename).relative_to(PACKAGE)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def forget_cached_results() -> None:
    """Clear the caches of the package's functions, so that an earlier test does not shorten a line."""
    for name, module in list(sys.modules.items()):
        if name.startswith("edm2kit"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def files_of(command, *arguments: object) -> list[str]:
    """The files that one run of `command` passes through, sorted."""
    forget_cached_results()
    files: set[str] = set()
    with traced(files):
        done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return sorted(files)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def training(tmp_path_factory, data) -> tuple[Path, list[str]]:
    """A folder with two snapshots of each EMA length, and the files that its run passed through."""
    folder = tmp_path_factory.mktemp("training")
    config = tiny.write_config(folder / "tiny.yaml", duration_nimg=2048, snapshot_every_nimg=1024)
    files = files_of(
        train.main, "--config", config, "--data", data, "--outdir", folder / "run", "--samples", 4, "--device", "cpu"
    )  # fmt: skip
    return folder / "run", files


def at_most(limit: int, files: list[str]) -> None:
    assert len(files) <= limit, f"{len(files)} files, {limit} at most:\n" + "\n".join(files)


def test_a_training_run(training):
    at_most(TRAINING, training[1])


def test_rebuilding_an_ema(training, tmp_path):
    at_most(EMA_REBUILD, files_of(phema.main, "--indir", training[0], "--outdir", tmp_path, "--outstd", "0.12"))


def test_generating_guided_images(training, tmp_path):
    main, guide = (training[0] / f"network-snapshot-0000002-0.{std}.safetensors" for std in ("050", "100"))
    files = files_of(
        generate.main, "--net", main, "--gnet", guide, "--guidance", 2, "--seeds", "0-3", "--steps", 4,
        "--outdir", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    at_most(GUIDED_IMAGES, files)


def test_measuring_a_distance(data, tmp_path):
    reference = tmp_path / "reference.npz"
    arguments = ["ref", "--data", data, "--dest", reference, "--metrics", "fd_random", "--device", "cpu"]
    made = CliRunner().invoke(metrics.main, [str(argument) for argument in arguments])
    assert made.exit_code == 0, made.output
    files = files_of(metrics.main, "calc", "--images", data, "--ref", reference, "--num", 100, "--device", "cpu")
    at_most(DISTANCE, files)
