"""What the study trains, searches and compares; every number that decides a result is here or in configs/train/."""

from dataclasses import dataclass

# run -> the options of train.py that make it. The last learning rate of the main network is that of `sims`.
RUNS: dict[str, tuple[str, ...]] = {
    "guide": ("--preset", "cifar10-guide"),
    "uncond": ("--preset", "cifar10-guide", "--cond", "no"),
    "main": ("--preset", "cifar10"),
    "sims": (
        *("--preset", "cifar10", "--duration", "64Ki", "--snapshot", "4Ki"),
        *("--lr", "0.006", "--decay", "0", "--rampup", "0"),
    ),
}
SYNTHETIC_IMAGES = 5_000  # of the main network alone, for `sims`, which starts from it (Alemohammad et al. 2024)
# guides of the search: name -> the run of RUNS whose snapshots it may be
GUIDES = {"early": "main", "small": "guide", "uncond": "uncond", "sims": "sims"}
HELD_OUT_PER_CLASS = 500  # the last ones of each class are not trained on
REAL_IMAGES = 5_000  # training images, evenly over the classes, that single images are compared with
DETECTORS = ("fd_lite0", "fd_lite2")  # the first is tuned on, the second confirms
TUNED_ON = "fd_lite0.fd_infinity"  # a distance from few images would favour images that are much alike
METRICS = (*DETECTORS, "fd_lite0.kid", "fd_lite0.precision", "fd_lite0.recall", "fd_lite0.coverage")
INFINITY = ("fd_lite0.fd_infinity", "fd_lite2.fd_infinity")  # of the images of all ranges together: it needs many
# of many images; metrics of neighbours would want as many real images as generated ones
LARGE_METRICS = ("fd_lite0", "fd_lite0.kid", "fd_lite0.fd_infinity")
SCORE_SEEDS = (0, 100_000, 200_000)  # far from those of edm2kit-tune, which start at 1,000,000
SHEET_SEEDS = range(900_000, 900_040)
BATCH = 64
PART = 500  # images whose features are kept at a time
# Each kind has the sampler that suits it: by 500 images, fd_infinity of unguided ones is 36.5 with few steps that leave
# some noise, and 39.7 with more steps; that of guided ones is 32.0 and 30.2 (main network after 638,976 images).
UNGUIDED_SAMPLER = ("--solver", "dpmpp2m", "--steps", "12", "--sigma_min", "0.08", "--precision", "bf16")
GUIDED_SAMPLER = ("--solver", "dpmpp2m", "--steps", "20", "--sigma_min", "0.02", "--precision", "bf16")
HALVINGS = 1  # of the search: candidates are measured with a third of the images first


@dataclass(frozen=True)
class Method:
    """A row of the table: its title, and what its search may choose.

    - `search`: options of `edm2kit-tune search`.
    - `guides`: names of GUIDES that the search may lead away from.
    - `budget`: images that the search generates, in multiples of its --num.
    - `confirm`: fresh images per range for the page of the search, which is published for the best one only.
    - `sampler`: options of generate.py that all its candidates share.
    """

    title: str
    search: tuple[str, ...]
    guides: tuple[str, ...] = ()
    budget: int = 10
    confirm: int = 20
    sampler: tuple[str, ...] = GUIDED_SAMPLER


_EVERYWHERE, _WITHIN = ("--interval", "none"), ("--interval", "search")
_DEGRADED = ("early", "small")
METHODS: dict[str, Method] = {
    "none": Method("no guidance", ("--method", "none", *_EVERYWHERE), budget=5, sampler=UNGUIDED_SAMPLER),
    "cfg": Method("classifier-free guidance", ("--method", "cfg", *_WITHIN), budget=8),
    "cfg-separate": Method(
        "classifier-free guidance, separate network", ("--method", "cfg", *_WITHIN), ("uncond",), budget=6
    ),
    "sims": Method("SIMS", _EVERYWHERE, ("sims",), 5),
    "autoguidance": Method("autoguidance", _EVERYWHERE, _DEGRADED, confirm=500),
    "autoguidance-interval": Method("autoguidance in an interval", _WITHIN, _DEGRADED, confirm=500),
    "combination": Method(
        "autoguidance and classifier-free guidance",
        ("--method", "autoguidance --guidance-also cfg=1.5", *_WITHIN),
        _DEGRADED,
        6,
    ),
}
