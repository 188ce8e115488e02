"""The logic of the search, on scores from a formula: what it finds, what it spends, what it compares."""

import hashlib
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from edm2kit.experiments.tune.budget import Budget, duration, parse_budget
from edm2kit.experiments.tune.halving import Evaluation, best_of, next_step, rungs_for
from edm2kit.experiments.tune.objective import _read, direction
from edm2kit.experiments.tune.proposals import propose
from edm2kit.experiments.tune.search import Plan, forecast, images_left, run_search
from edm2kit.experiments.tune.space import BASELINE, Space
from edm2kit.experiments.tune.study import Claim
from edm2kit.guidance.interval import guided_steps
from tests.support.tuning import simulated_space, source, true_value

NUM = 270
RUNGS = rungs_for(NUM, 2)


def measured(candidate, num_images: int) -> float:
    """The true value, plus a bias that falls with the number, plus noise of its own of 1 % at 270 images (CRN)."""
    digest = hashlib.blake2b(candidate.key.encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    total, before = 0.0, 0
    for rung in RUNGS:
        if rung <= num_images:  # the images of a smaller number are among those of a larger one
            total += rng.standard_normal() * math.sqrt(rung - before)
            before = rung
    noise = 0.01 * math.sqrt(NUM) * total / num_images
    return true_value(candidate) * (1 + noise) + 9000 / num_images


class ListedStudy:
    """What a shared study does, for one process and without a file."""

    def __init__(self):
        self.found: list[Evaluation] = []

    def evaluations(self):
        return list(self.found)

    def claim(self, decide):
        wanted = decide(self.found)
        if wanted is None:
            return None
        self.found.append(Evaluation(*wanted[:3], None, wanted[3]))
        return Claim(len(self.found) - 1, *wanted[:3])

    def finish(self, claim, value, results, seconds, error=""):
        self.found[claim.trial] = replace(self.found[claim.trial], value=value, seconds=seconds)


@pytest.fixture(autouse=True)
def studies():
    STUDIES.clear()


STUDIES: dict = {}


def search(folder, space: Space, budget: Budget, seed: int = 0, measure=None) -> list[Evaluation]:
    def default(candidate, num_images):
        return measured(candidate, num_images), {}

    study = STUDIES.setdefault(folder, ListedStudy())
    run_search(study, space, Plan(RUNGS, budget, seed, 0.01), BASELINE, measure or default)
    return study.evaluations()


@pytest.mark.parametrize("seed", [0, 1])
def test_it_comes_within_2_percent_of_an_exhaustive_grid_with_a_tenth_of_its_images(tmp_path, seed):
    space = simulated_space()
    grid = []
    for age in range(2):
        for main in range(4):
            for guide in range(4):
                for weight in range(8):
                    values = {"way": "autoguidance", "main_ema": main, "age of guide": age, "guide_ema": guide}
                    grid.append(measured(space.candidate({**values, "weight": weight}), NUM))
    assert len(grid) == space.count == 256
    budget = len(grid) * NUM // 10
    found = search(tmp_path, space, Budget(images=budget), seed)
    assert sum(one.cost for one in found) <= budget
    best = best_of(found)
    assert best.num_images == NUM
    assert best.value <= 1.02 * min(grid)
    assert np.median(grid) > 1.1 * min(grid)  # a candidate at random would not do


def test_the_same_seed_searches_the_same_and_another_differently(tmp_path):
    space = simulated_space()
    runs = [search(tmp_path / name, space, Budget(images=1500), seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    steps = [[(one.key, one.num_images) for one in found] for found in runs]
    assert steps[0] == steps[1] != steps[2]


def test_a_search_that_ended_goes_on_with_a_larger_budget_and_measures_nothing_twice(tmp_path):
    space = simulated_space()
    first = search(tmp_path, space, Budget(images=900))
    more = search(tmp_path, space, Budget(images=1800))
    assert [one.key for one in more[: len(first)]] == [one.key for one in first]
    assert 900 < sum(one.cost for one in more) <= 1800
    assert max(Counter((one.key, one.num_images) for one in more).values()) == 1


def test_a_space_smaller_than_the_budget_is_measured_completely(tmp_path):
    space = simulated_space(weight_steps=1)
    space = Space(**{**vars(space), "main_lengths": (), "guide_lengths": {}})
    found = search(tmp_path, space, Budget(images=10**6))
    assert len({one.key for one in found}) == space.count + 1  # the unguided network
    best = best_of(found)
    assert best.num_images == NUM


def test_what_cannot_be_generated_is_left_behind_but_the_baseline_must_work(tmp_path):
    space = simulated_space()

    def fragile(candidate, num_images):
        if candidate.weight > 2:
            raise ValueError("the image of seed 3 is not finite")
        return measured(candidate, num_images), {}

    found = search(tmp_path / "a", space, Budget(images=1500), measure=fragile)
    failed = [one for one in found if one.value == math.inf]
    assert failed
    assert {one.num_images for one in failed} == {RUNGS[0]}  # never promoted
    assert best_of(found).value < 1000

    def broken(candidate, num_images):
        raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        search(tmp_path / "b", space, Budget(images=1500), measure=broken)


# ---- successive halving


def evaluation(key: str, num_images: int, value: float | None) -> Evaluation:
    return Evaluation(key, {"way": "autoguidance"}, num_images, value, num_images)


def test_only_values_of_the_same_number_of_images_are_compared():
    # b is the best of all numbers, but c is the best where most images were used
    found = [evaluation("a", 90, 5.0), evaluation("c", 90, 4.0), evaluation("b", 30, 1.0)]
    assert best_of(found).key == "c"
    base = [evaluation("base", n, 100.0) for n in RUNGS]
    at_30 = [evaluation(f"k{k}", 30, 50.0 + k) for k in range(6)]
    step = next_step([*base, *at_30], RUNGS, 10**6, "base", False)
    assert (step.kind, step.key, step.num_images) == ("promote", "k0", 90)
    biased = [evaluation("k0", 90, 30.0), evaluation("k1", 90, 31.0)]
    step = next_step([*base, *at_30, *biased], RUNGS, 10**6, "base", False)
    assert (step.key, step.num_images) == ("k0", 270)


def test_the_baseline_comes_first_at_every_number_and_then_each_way():
    assert next_step([], RUNGS, 1000, "base", True).key == "base"
    found = [evaluation("base", 30, 1.0), evaluation("base", 90, 1.0)]
    assert next_step(found, RUNGS, 1000, "base", True) == next_step(found, RUNGS, 1000, "base", False)
    found.append(evaluation("base", 270, 1.0))
    assert next_step(found, RUNGS, 1000, "base", True).kind == "new"
    busy = [evaluation("base", 30, None)]
    assert next_step(busy, RUNGS, 1000, "base", False).kind == "new"  # another process has it


def test_the_last_images_bring_the_best_to_the_last_number():
    found = [evaluation("base", n, 100.0) for n in RUNGS] + [evaluation("a", 30, 2.0), evaluation("b", 30, 1.0)]
    left = 60 + 180
    kinds = []
    while (step := next_step(found, RUNGS, left, "base", False)).kind == "promote":
        cost = step.num_images - max(one.num_images for one in found if one.key == step.key)
        left -= cost
        kinds.append((step.key, step.num_images))
        found.append(evaluation(step.key, step.num_images, 1.0))
    assert kinds == [("b", 90), ("b", 270)]
    assert step.kind == "done"
    assert left == 0
    assert next_step([*found, evaluation("c", 30, None)], RUNGS, 0, "base", False).kind == "wait"


def test_numbers_of_images():
    assert rungs_for(270, 2) == (30, 90, 270)
    assert rungs_for(500, 0) == (500,)
    assert rungs_for(100, 2) == (12, 34, 100)


# ---- budgets


def test_budgets_are_numbers_of_images_or_times():
    assert parse_budget("4000img") == Budget(images=4000)
    assert parse_budget(" 10 images ") == Budget(images=10)
    assert parse_budget("2h") == Budget(seconds=7200)
    assert parse_budget("1.5 min") == Budget(seconds=90)
    assert parse_budget("30s") == Budget(seconds=30)
    assert [duration(x) for x in (8.2, 720, 9000)] == ["8.2 s", "12 min", "2.5 h"]


@pytest.mark.parametrize(
    "text", ["", "4000", "0img", "-5img", "2 days", "1.5img", "nan h", "infh", "1e3img", "2h30", "9" * 40 + "img"]
)
def test_bad_budgets_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match="write for example 4000img, 90min or 2h"):
        parse_budget(text)


def test_a_time_becomes_images_by_the_pace_so_far_and_counts_work_under_way():
    plan = Plan(RUNGS, Budget(seconds=100), 0, seconds_per_image=0.5)
    assert images_left(plan, []) == 200
    done = Evaluation("a", {}, 30, 1.0, 30, seconds=60.0)  # 2 s per image
    assert images_left(plan, [done]) == pytest.approx(20)
    busy = Evaluation("b", {}, 30, None, 10)
    assert images_left(plan, [done, busy]) == pytest.approx(10)
    assert images_left(Plan(RUNGS, Budget(images=100), 0), [done, busy]) == 60


def test_the_forecast_says_what_is_searched_and_how_long_it_takes():
    text = forecast(Plan(RUNGS, Budget(images=6900), 0), simulated_space(), after=2000, seconds_per_image=0.1)
    assert "256 combinations of autoguidance" in text
    assert "30, then 90, then 270 per candidate" in text
    assert "enough for about 94 candidates" in text
    assert "0.1 s per image, so 11.5 min of work; then 2,000 images" in text


# ---- the space


def test_intervals_leave_out_whole_steps():
    sigmas = tuple(float(x) for x in np.geomspace(80, 0.01, 8))
    space = Space(**{**vars(simulated_space()), "sigmas": sigmas})
    schedule = np.array([*sigmas, 0.0])

    for high in range(5):
        for low in range(4):
            interval = space.steps_to_interval(high, low)
            if high == low == 0:
                assert interval is None
                continue
            steps = guided_steps(torch.tensor(schedule), *interval)
            assert list(steps) == list(range(high, 8 - low)), (high, low, interval)


def test_every_combination_means_another_candidate_and_starts_are_modest():
    space = simulated_space()
    (start,) = space.starts()
    candidate = space.candidate(start)
    assert candidate.weight == 2
    assert candidate.guide.nimg == 1000  # the nearer to an eighth of 4000
    assert (candidate.main.ema_std, candidate.guide.ema_std, candidate.interval) == (0.1, 0.1, None)
    assert 1.0 not in space.weight_steps("autoguidance")
    assert propose(space, [], 0) == start
    assert space.candidate(BASELINE).guide is None
    assert source("x", (1, 2)).times == [1, 2]

    sigmas = tuple(float(x) for x in np.geomspace(80, 0.01, 10))
    everywhere, above = Space(**{**vars(space), "sigmas": sigmas}).starts()
    candidates = [Space(**{**vars(space), "sigmas": sigmas}).candidate(values) for values in (everywhere, above)]
    assert [one.interval for one in candidates] == [None, (float(f"{sigmas[7]:.5g}"), float("inf"))]


def test_metrics_have_a_direction_or_are_refused():
    assert direction("fd_lite0") == direction("fid.kid") == direction("fdr") == direction("fd_lite0.fd_infinity") == 1
    assert direction("recall") == direction("fd_lite0.coverage") == -1
    for name in ("density", "authpct", "vendi", "fid.ct"):
        with pytest.raises(ValueError, match="is good near"):
            direction(name)
    with pytest.raises(ValueError, match="a single metric"):
        direction("all")


def test_kept_features_with_a_flipped_bit_are_made_again(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, fd_random=np.arange(100.0), classes=np.arange(4))
    assert _read(path, ["fd_random"]).keys() == {"fd_random", "classes"}
    data = path.read_bytes()
    path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    assert _read(path, ["fd_random"]) == {}
    path.write_bytes(data[:300])
    assert _read(path, ["fd_random"]) == {}
