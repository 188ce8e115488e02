"""Successive halving on the number of images: which candidate to measure next, from what has been measured.

Candidates are first measured with few images; the best third goes on to three times as many, and so on (Li et al. 2018,
"A system for massively parallel hyperparameter tuning", ASHA). The same seeds serve all, and values are only ever
compared at the same number of images, as a distance from few images is too large by an amount that depends on their
number. Everything here is a pure function of the evaluations so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FACTOR = 3


@dataclass(frozen=True)
class Evaluation:
    """A candidate measured with `num_images`; `value` (smaller is better) is None while a process works on it.

    A candidate that cannot be generated has the value infinity. `cost` is the number of images generated for it.
    """

    key: str
    values: Mapping[str, Any]
    num_images: int
    value: float | None
    cost: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """What to do next: measure the candidate `key` with `num_images`, or a new one if `key` is None.

    `kind` "wait" means that only results of other processes can decide, "done" that the budget is used up.
    """

    kind: Literal["promote", "new", "wait", "done"]
    num_images: int = 0
    key: str | None = None


def rungs_for(num_images: int, halvings: int) -> tuple[int, ...]:
    """The numbers of images, smallest first: `num_images` divided by 3 again and again."""
    return tuple(-(-num_images // FACTOR**k) for k in range(halvings, -1, -1))


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The best candidate at the largest number of images that any has been measured with."""
    finished = [one for one in evaluations if one.value is not None and one.value < float("inf")]
    if not finished:
        return None
    most = max(one.num_images for one in finished)
    return min((one for one in finished if one.num_images == most), key=lambda one: one.value or 0.0)


def next_step(
    evaluations: Sequence[Evaluation],
    rungs: Sequence[int],
    images_left: float,
    baseline: str,
    starts_left: bool,
    has_new: bool = True,
) -> Step:
    """The next measurement. `baseline` is the key of the candidate that is measured at every rung.

    `images_left` may be spent; the last of them bring the best candidates to the last rung. With `starts_left`, new
    candidates come before promotions, so that all kinds are seen first. Without `has_new`, all have been measured.
    """
    at: list[dict[str, Evaluation]] = [{one.key: one for one in evaluations if one.num_images == n} for n in rungs]
    costs = [n - before for n, before in zip(rungs, (0, *rungs[:-1]), strict=True)]
    for k, found in enumerate(at):
        if baseline not in found:
            return Step("promote", rungs[k], baseline)
        if found[baseline].value is None and k < len(at) - 1 and baseline not in at[k + 1]:
            break  # another process works on it
    if starts_left and images_left >= costs[0]:
        return Step("new", rungs[0])
    # the highest rung first: a finished candidate is worth more than a new one
    for k in range(len(rungs) - 2, -1, -1):
        finished = _finished(at[k])
        quota = len(finished) // FACTOR
        for one in finished[:quota]:
            if one.key not in at[k + 1] and images_left >= costs[k + 1]:
                return Step("promote", rungs[k + 1], one.key)
    # kept back for the end: two candidates to the last rung
    reserve = 2 * costs[-1] + (costs[-2] if len(costs) > 2 else 0)
    if has_new and images_left >= costs[0] + reserve:
        return Step("new", rungs[0])
    for k in range(len(rungs) - 2, -1, -1):
        for one in _finished(at[k]):
            if one.key not in at[k + 1] and images_left >= costs[k + 1]:
                return Step("promote", rungs[k + 1], one.key)
    waiting = any(one.value is None for one in evaluations)
    return Step("wait") if waiting else Step("done")


def _finished(found: Mapping[str, Evaluation]) -> list[Evaluation]:
    """Those with a value, the best first; failed ones are left out."""
    known = [one for one in found.values() if one.value is not None and one.value < float("inf")]
    return sorted(known, key=lambda one: one.value or 0.0)
