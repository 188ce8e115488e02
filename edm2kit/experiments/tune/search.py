"""The search itself: claim a measurement, make it, record it, until the budget is used up."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm

from edm2kit.experiments.tune.budget import Budget, duration
from edm2kit.experiments.tune.halving import Evaluation, best_of, next_step
from edm2kit.experiments.tune.proposals import propose
from edm2kit.experiments.tune.space import Candidate, Space
from edm2kit.experiments.tune.study import SharedStudy

_TO_COMPARE = 3
_WAIT_SEC = 0.5  # between looks at what other processes have finished


class Measure(Protocol):
    """(candidate, number of images) -> (what is to become small, values by metric); ValueError if it cannot be made."""

    def __call__(self, candidate: Candidate, num_images: int, /) -> tuple[float, Mapping[str, float]]: ...


@dataclass(frozen=True)
class Plan:
    """`rungs` are the numbers of images that candidates are measured with, smallest first."""

    rungs: tuple[int, ...]
    budget: Budget
    seed: int
    seconds_per_image: float = 0.0  # a first estimate, for budgets in hours

    @property
    def least_images(self) -> int:
        """What the smallest search costs: the unguided baseline and one candidate at the last rung."""
        return 2 * self.rungs[-1]


def spent(evaluations: Sequence[Evaluation]) -> tuple[int, float]:
    """Images and seconds so far, including the images of measurements under way."""
    return sum(one.cost for one in evaluations), sum(one.seconds for one in evaluations)


def images_left(plan: Plan, evaluations: Sequence[Evaluation]) -> float:
    """How many more images the budget allows."""
    images, seconds = spent(evaluations)
    done = sum(one.cost for one in evaluations if one.value is not None)
    pace = seconds / done if done and seconds else plan.seconds_per_image
    under_way = images - done
    return plan.budget.images_left(images, seconds + under_way * pace, pace)


def run_search(
    study: SharedStudy, space: Space, plan: Plan, baseline: Mapping[str, Any], measure: Measure, bar: tqdm | None = None
) -> None:
    """Measure candidates until the budget is used up or all have been measured; several processes may do so at once.

    `baseline` are the parameter values of the candidate that is measured at every rung. Raises ValueError if the
    baseline cannot be generated; other candidates that cannot are recorded as such.
    """
    baseline_key = space.candidate(baseline).key
    waiting = False

    def decide(evaluations: Sequence[Evaluation]) -> tuple[str, Mapping[str, Any], int, int] | None:
        nonlocal waiting
        known = {one.key: one.values for one in evaluations} | {baseline_key: baseline}
        starts_left = any(space.candidate(start).key not in known for start in space.starts())
        step = next_step(evaluations, plan.rungs, images_left(plan, evaluations), baseline_key, starts_left)
        if step.kind == "new":
            values = propose(space, evaluations, plan.seed)
            if values is not None:
                return space.candidate(values).key, values, step.num_images, step.num_images
            # all have been measured: only promotions are left
            left = images_left(plan, evaluations)
            step = next_step(evaluations, plan.rungs, left, baseline_key, starts_left=False, has_new=False)
        waiting = step.kind == "wait"
        if step.key is None:
            return None
        before = max((one.num_images for one in evaluations if one.key == step.key), default=0)
        return step.key, known[step.key], step.num_images, step.num_images - before

    while True:
        claim = study.claim(decide)
        if claim is None and not waiting:
            break
        if claim is None:
            time.sleep(_WAIT_SEC)
            continue
        started = time.monotonic()
        candidate = space.candidate(claim.values)
        try:
            value, results = measure(candidate, claim.num_images)
        except ValueError as error:
            if claim.key == baseline_key:
                raise
            study.finish(claim, float("inf"), {}, time.monotonic() - started, str(error))
        else:
            study.finish(claim, value, results, time.monotonic() - started)
        if bar is not None:
            _show(bar, study.evaluations(), plan, space)


def _show(bar: tqdm, evaluations: Sequence[Evaluation], plan: Plan, space: Space) -> None:
    images, seconds = spent(evaluations)
    used = images if plan.budget.images is not None else seconds
    best = best_of(_comparable(evaluations))
    if best is not None and best.value is not None:
        text = f"best {abs(best.value):.4g} ({best.num_images} img): {space.candidate(best.values)}"
        bar.set_postfix_str(text, refresh=False)
    bar.update(min(int(used), int(bar.total or used)) - bar.n)


def _comparable(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Without the numbers of images that fewer than three candidates have been measured with."""
    counts = Counter(one.num_images for one in evaluations if one.value is not None)
    most = max((n for n, count in counts.items() if count >= _TO_COMPARE), default=0)
    return [one for one in evaluations if one.num_images <= most]


def forecast(plan: Plan, space: Space, after: int, seconds_per_image: float) -> str:
    """What the search will do and take, in a few lines; `after` images follow for the confirmation and the figures."""
    budget = plan.budget
    total = budget.images or int((budget.seconds or 0.0) / seconds_per_image)
    steps = ", then ".join(f"{n:,}" for n in plan.rungs)
    costs = [n - before for n, before in zip(plan.rungs, (0, *plan.rungs[:-1]), strict=True)]
    each = sum(cost / 3**k for k, cost in enumerate(costs))
    candidates = max(int((total - plan.rungs[-1]) / each), 1)
    return "\n".join(
        [
            f"Space:    {space.count:,} combinations of {', '.join(space.ways)}",
            f"Images:   {steps} per candidate, the best third going on; the same seeds for all",
            f"Budget:   {budget}, enough for about {min(candidates, space.count):,} candidates",
            f"Forecast: {seconds_per_image:.3g} s per image, so {duration(total * seconds_per_image)} of work; then "
            f"{after:,} images for the confirmation and the figures, {duration(after * seconds_per_image)}",
        ]
    )
