"""Weights & Biases: the statistics of a run on its page, as one run however often it is resumed.

Trouble there never stops training: it is reported once, and training goes on without.
"""

import importlib.util
import json
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import write_json

ID_NAME = "wandb.json"
_FINISH_SEC = 60


class WandbLog:
    """Sends statistics to Weights & Biases, from rank 0; a context manager that opens and closes the run there.

    Project, entity and mode are those of the variables WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE (offline: only write
    files, below `run_dir`, for `wandb sync`). The id of the run is in `run_dir`/wandb.json, so that a resumed run
    continues its curves. Raises ValueError if the package is not installed.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("--wandb needs the package wandb: pip install wandb")
        self._run: Any = None
        self._run_dir, self._settings = run_dir, dict(settings)
        self._failed = False

    def __enter__(self) -> "WandbLog":
        if dist.rank() == 0:
            self._try(self._open)
        return self

    def _open(self) -> None:
        import wandb

        self._run = wandb.init(
            id=_run_id(self._run_dir / ID_NAME),
            resume="allow",
            name=self._run_dir.name,
            dir=str(self._run_dir),
            config=self._settings,
        )
        # not wandb's own steps, which may not go back as those of a resumed run do
        self._run.define_metric("*", step_metric="nimg")

    def write(self, record: Mapping[str, Any]) -> None:
        """Send the statistics of one status line, by number of images."""
        if self._run is not None:
            self._try(lambda: self._run.log(dict(record)))

    def picture(self, nimg: int, pixels: np.ndarray) -> None:
        """Send a sheet of samples, uint8 [H, W] or [H, W, 3]."""

        def send() -> None:
            import wandb

            self._run.log({"nimg": nimg, "samples": wandb.Image(pixels)})

        if self._run is not None:
            self._try(send)

    def __exit__(self, *error: object) -> None:
        if self._run is None:
            return
        exit_code = 0 if error[0] is None else 1  # shown as finished or failed
        # without a network it would go on trying, while a job that has to end waits for it
        closing = threading.Thread(target=self._try, args=[lambda: self._run.finish(exit_code=exit_code)], daemon=True)
        closing.start()
        closing.join(timeout=_FINISH_SEC)
        if closing.is_alive():
            dist.warn0(f"Weights & Biases did not finish in {_FINISH_SEC} s; `wandb sync` sends what is missing")

    def _try(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # whatever it is, training is worth more
            self._failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            dist.warn0(f"Weights & Biases failed ({reason}); training continues without it")


def _run_id(path: Path) -> str:
    """The id in the file, which is written if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(found, str) and found:
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    new = uuid.uuid4().hex[:8]
    write_json(path, {"id": new})
    return new
