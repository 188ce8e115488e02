"""New candidates for a search: optuna's tree-structured Parzen estimator, and neighbours of the best so far."""

import contextlib
import itertools
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edm2kit.experiments.tune.halving import Evaluation
from edm2kit.experiments.tune.space import Space
from edm2kit.torch_utils.rng import derive_seed

_RANDOM_STARTS = 10
_ATTEMPTS, _ESTIMATES = 30, 5
_NEIGHBOUR_SHARE = 0.5  # of the proposals after the start: one step away from one of the best
_LEADERS = 4


def require_optuna() -> None:
    """Raise ValueError, with what to install, if optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ValueError("the search needs optuna. Run: pip install 'edm2kit[tune]'") from error


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep optuna's log and its notes on experimental features from between the lines of the progress bar."""
    import optuna

    former = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(former)


def propose(space: Space, evaluations: Sequence[Evaluation], seed: int) -> dict[str, Any] | None:
    """Parameter values of a candidate that has not been measured; None if (almost) all have been.

    The estimator sees each candidate once, with its values by number of images: those measured with more images come
    first, and only values of one number are compared. The same evaluations and seed give the same proposal.
    """
    known = {one.key for one in evaluations}
    for start in space.starts():
        if space.candidate(start).key not in known:
            return start
    rng = random.Random(derive_seed(seed, "proposal", len(evaluations)))
    leaders = _leaders(space, evaluations)
    if len(known) <= _RANDOM_STARTS or not leaders or rng.random() >= _NEIGHBOUR_SHARE:
        tried = _estimates(space, evaluations, derive_seed(seed, "estimate", len(evaluations)))
    else:
        tried = (_neighbour(space, rng.choice(leaders).values, rng, attempt) for attempt in range(_ATTEMPTS))
    random_ones = (space.pick(_AtRandom(rng)) for _ in range(_ATTEMPTS * 10))
    for values in itertools.chain(tried, random_ones):
        if space.candidate(values).key not in known:
            return values
    return None


def _leaders(space: Space, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The best candidates: those at more images first, as in the estimator; one entry for each."""
    finished = [one for one in evaluations if one.value is not None and one.value < float("inf")]
    finished = [one for one in finished if one.values["way"] in space.ways]
    ordered = sorted(finished, key=lambda one: (-one.num_images, one.value or 0.0))
    found: dict[str, Evaluation] = {}
    for one in ordered:
        found.setdefault(one.key, one)
    return list(found.values())[:_LEADERS]


def _neighbour(space: Space, values: Mapping[str, Any], rng: random.Random, attempt: int) -> dict[str, Any]:
    """One or two parameters moved by a small step; later attempts go further."""
    sizes = {name: count for name, count in space.sizes(values["way"]).items() if count > 1}
    moved = dict(values)
    for name in rng.sample(sorted(sizes), min(len(sizes), rng.choice((1, 1, 2)))):
        reach = max(1, sizes[name] // 8) + attempt // 10
        step = rng.choice((-1, 1)) * rng.randint(1, reach)
        moved[name] = min(max(moved[name] + step, 0), sizes[name] - 1)
    return moved


class _OfTrial:
    """The values of a space chosen by a trial of optuna."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def number(self, name: str, count: int) -> int:
        return self.trial.suggest_int(name, 0, count - 1)

    def name(self, name: str, choices: Sequence[str]) -> str:
        return self.trial.suggest_categorical(name, list(choices))


@dataclass(frozen=True)
class _AtRandom:
    """The values of a space chosen at random."""

    rng: random.Random

    def number(self, name: str, count: int) -> int:
        return self.rng.randrange(count)

    def name(self, name: str, choices: Sequence[str]) -> str:
        return self.rng.choice(list(choices))


def _estimates(space: Space, evaluations: Sequence[Evaluation], seed: int) -> Iterator[dict[str, Any]]:
    """Proposals of the estimator, which takes each for being under way when it makes the next."""
    import optuna

    with quiet_optuna():
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=_RANDOM_STARTS, multivariate=True, group=len(space.ways) > 1, seed=seed % 2**32
        )
        study = optuna.create_study(sampler=sampler)
        by_candidate: dict[str, list[Evaluation]] = {}
        for one in evaluations:
            if one.values["way"] in space.ways:  # not the unguided baseline
                by_candidate.setdefault(one.key, []).append(one)
        study.add_trials([_as_trial(space, found) for found in by_candidate.values()])
        for _ in range(_ESTIMATES):
            yield space.pick(_OfTrial(study.ask()))


def _as_trial(space: Space, found: Sequence[Evaluation]) -> Any:
    """One candidate as optuna knows it: pruned after the last number of images that it was measured with."""
    import optuna

    values = found[0].values
    distributions: dict[str, Any] = {}
    if len(space.ways) > 1:
        distributions["way"] = optuna.distributions.CategoricalDistribution(list(space.ways))
    for name, count in space.sizes(values["way"]).items():
        if count > 1:
            distributions[name] = optuna.distributions.IntDistribution(0, count - 1)
    known = {one.num_images: one.value for one in found if one.value is not None}
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED if known else optuna.trial.TrialState.RUNNING,
        params={name: values[name] for name in distributions},
        distributions=distributions,
        intermediate_values={n: min(value, 1e12) for n, value in known.items()},
    )
