"""The record of a search: one optuna study in an SQLite file, which several processes share and which survives kill -9.

Each trial of the study is one measurement: a candidate at one number of images. A process claims a measurement by a
trial in the state RUNNING that names it, all under a file lock, so no two processes work on the same. Each process
holds a lock file of its own as long as it lives; the system releases it when the process dies, however it dies. A
RUNNING trial of a dead process is marked as failed, and its measurement is claimed again.
"""

import contextlib
import json
import re
import secrets
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.experiments.tune.halving import Evaluation
from edm2kit.experiments.tune.proposals import quiet_optuna
from edm2kit.torch_utils.files import check_type, differences, file_lock, patience, plain_json, write_json

STUDY_NAME = "search"
_DATABASE, _SETTINGS, _LOCK, _WORKERS = "study.db", "settings.json", ".deciding", "workers"
# what is recorded of a trial, the last three when it is complete
_ATTRIBUTES = {
    "key": str, "values": Mapping[str, Any], "num_images": int, "cost": int, "worker": str,
    "results": Mapping[str, Any], "seconds": float, "error": str,
}  # fmt: skip
_ADDED_LATER = ("results", "seconds", "error")
_WORKER_NAME = re.compile(r"\w[\w.-]*-[0-9a-f]{12}")
_MAX_DEATHS = 3  # of processes that worked on the same measurement
_SQLITE_TIMEOUT_SEC = 300


@dataclass(frozen=True)
class Claim:
    """A measurement that this process is to make; `trial` is its number in the study."""

    trial: int
    key: str
    values: Mapping[str, Any]
    num_images: int


# evaluations so far -> (key, parameter values, number of images, images to generate), or None for nothing to do now
Decide = Callable[[Sequence[Evaluation]], tuple[str, Mapping[str, Any], int, int] | None]


class SharedStudy:
    """The study in the folder of a search. Use it as a context manager: inside, this process is known to live.

    `settings` decide what is compared. Raises ValueError if the folder holds a search with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.worker = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        with self._deciding():
            path = folder / _SETTINGS
            asked = plain_json(settings)
            if path.exists():
                check_settings(path, asked)
            else:
                write_json(path, asked)
            self._study = self._open()

    def _open(self) -> Any:
        import optuna

        with self._using_database():
            self._storage = optuna.storages.RDBStorage(
                f"sqlite:///{(self.folder / _DATABASE).absolute()}",
                engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT_SEC}},
            )
            return optuna.create_study(storage=self._storage, study_name=STUDY_NAME, load_if_exists=True)

    def __enter__(self) -> "SharedStudy":
        self._alive = contextlib.ExitStack()
        self._alive.enter_context(file_lock(self.folder / _WORKERS / self.worker, lambda owner: None))
        return self

    def __exit__(self, *error: object) -> None:
        self._alive.close()

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[None]:
        with file_lock(self.folder / _LOCK, patience(str(self.folder / _LOCK))):
            yield

    @contextlib.contextmanager
    def _using_database(self) -> Iterator[None]:
        """Raise ValueError inside if the database cannot be read or written, as on a full disk."""
        try:
            with quiet_optuna():
                yield
        except Exception as error:
            modules = (frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__))
            if not any(module.split(".")[0] in ("sqlalchemy", "optuna") for module in modules):
                raise  # an error of this project
            cause = error.__cause__ or error
            reason = (str(getattr(cause, "orig", None) or cause).splitlines() or [type(cause).__name__])[0]
            raise ValueError(
                f"{self.folder / _DATABASE} cannot be read or written ({reason}). If the disk is full, free some space "
                "and run the same command to resume; if the file is damaged, use another --outdir"
            ) from error

    def evaluations(self) -> list[Evaluation]:
        """Every measurement so far, in the order in which they were claimed; those under way have no value."""
        import optuna

        states = optuna.trial.TrialState
        with self._using_database():
            trials = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.RUNNING))
        return [self._evaluation(trial) for trial in trials]

    def claim(self, decide: Decide) -> Claim | None:
        """The next measurement for this process; None if `decide` has none. Measurements of dead processes come first.

        Raises ValueError if a measurement has killed three processes.
        """
        import optuna

        states = optuna.trial.TrialState
        with self._deciding(), self._using_database():
            trials = self._study.get_trials(deepcopy=False)
            lost = [trial for trial in trials if trial.state == states.RUNNING and not self._lives(trial)]
            for trial in lost:
                self._study.tell(trial.number, state=states.FAIL)
            trials = self._study.get_trials(deepcopy=False)
            wanted = self._abandoned(trials)
            if wanted is None:
                evaluations = [
                    self._evaluation(one) for one in trials if one.state in (states.COMPLETE, states.RUNNING)
                ]
                wanted = decide(evaluations)
            if wanted is None:
                return None
            key, values, num_images, cost = wanted
            attributes = {"key": key, "values": dict(values), "num_images": num_images, "cost": cost}
            trial = optuna.trial.create_trial(
                state=states.RUNNING, user_attrs={**attributes, "worker": self.worker}, **_as_parameters(values)
            )
            self._study.add_trial(trial)
            number = self._study.get_trials(deepcopy=False)[-1].number
            return Claim(number, key, values, num_images)

    def finish(self, claim: Claim, value: float, results: Mapping[str, float], seconds: float, error: str = "") -> None:
        """Record a measurement: `value` is what becomes small, infinity if it failed for the reason `error`."""
        with self._using_database():
            study_id = self._storage.get_study_id_from_name(STUDY_NAME)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, claim.trial)
            for name, content in (("results", dict(results)), ("seconds", round(seconds, 3)), ("error", error)):
                self._storage.set_trial_user_attr(trial_id, name, content)
            self._study.tell(claim.trial, value)

    def results(self) -> list[dict[str, Any]]:
        """Complete measurements with everything that is known of them, in order."""
        import optuna

        found = []
        with self._using_database():
            trials = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        for trial in trials:
            found.append({**self._known(trial), "value": trial.value, "trial": trial.number})
        return found

    def _lives(self, trial: Any) -> bool:
        worker = self._known(trial)["worker"]
        if worker == self.worker:
            return True
        with contextlib.suppress(_HeldError), file_lock(self.folder / _WORKERS / worker, _refuse):
            return False
        return True

    def _abandoned(self, trials: Sequence[Any]) -> tuple[str, Mapping[str, Any], int, int] | None:
        """A measurement whose process died, unless it has been claimed again."""
        deaths: dict[tuple[str, int], list[Any]] = {}
        claimed = set()
        for trial in trials:
            known = self._known(trial)
            work = known["key"], known["num_images"]
            if trial.state.name == "FAIL":
                deaths.setdefault(work, []).append(trial)
            else:
                claimed.add(work)
        for work, failed in deaths.items():
            if work in claimed:
                continue
            if len(failed) >= _MAX_DEATHS:
                raise ValueError(
                    f"{len(failed)} processes died while they measured {work[0]}; perhaps memory ran out. "
                    "Lower --batch, or leave this choice out and use another --outdir"
                )
            attributes = self._known(failed[-1])
            return attributes["key"], attributes["values"], attributes["num_images"], attributes["cost"]
        return None

    def _evaluation(self, trial: Any) -> Evaluation:
        known = self._known(trial)
        value = trial.value if trial.state.name == "COMPLETE" else None
        return Evaluation(
            known["key"], known["values"], known["num_images"], value, known["cost"], known.get("seconds", 0.0)
        )

    def _known(self, trial: Any) -> Mapping[str, Any]:
        """What is recorded of a trial; raises ValueError if it is not what this class writes.

        The database may come from elsewhere: the name of a worker is that of a file, which is removed.
        """
        known = trial.user_attrs
        where = f"{self.folder / _DATABASE} is damaged: trial {trial.number}"
        for name, kind in _ATTRIBUTES.items():
            if name in known or name not in _ADDED_LATER:
                check_type(known.get(name), kind, f"{where}: {name}")
        if not _WORKER_NAME.fullmatch(known["worker"]):
            raise ValueError(f"{where}: worker is {known['worker']!r:.60}, which is not the name of a process")
        return known


class _HeldError(Exception):
    """Another process holds a lock."""


def _refuse(owner: str) -> None:
    raise _HeldError


def check_settings(path: Path, asked: Any) -> None:
    """Raise ValueError unless the settings of a search at `path` can be read and are those `asked` for."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --outdir") from error
    if isinstance(found, dict) and "contents" not in found:  # which earlier versions did not record
        asked = {name: value for name, value in asked.items() if name != "contents"}
    if changed := differences(found, asked):
        reasons = "; ".join(changed[:3])
        raise ValueError(f"{path.parent} holds a search with other settings ({reasons}); choose another --outdir")


def _as_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter values as optuna shows them in its own tools."""
    import optuna

    # names are attributes only: their choices would have to be the same in all trials
    numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
    distribution = optuna.distributions.IntDistribution(0, 1000)
    return {"params": numbers, "distributions": dict.fromkeys(numbers, distribution)}
