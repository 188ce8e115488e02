"""The toy's tables, and its documentation page, made from the record alone."""

import shutil
from pathlib import Path
from typing import Any

from edm2kit.experiments.toy.evaluation import RECORD_NAME, TRUTH, UNGUIDED, Spread, load_record, summary
from edm2kit.experiments.toy.measures import MEASURES
from edm2kit.experiments.toy.methods import METHODS
from edm2kit.torch_utils.files import atomic_write

PICTURES = ("figure1.png", "figure2.png", "tradeoff.png")
# the settings that the paper's figure shows, and the same methods at half their excess weight
HIGHLIGHTS = (
    (TRUTH, 1.0),
    (UNGUIDED, 1.0),
    ("autoguidance", 2.0),
    ("autoguidance", 3.0),
    ("cfg", 2.0),
    ("cfg", 4.0),
    ("truncation", 1.2),
    ("truncation", 1.4),
)


def table(record: dict[str, Any], rows: tuple[tuple[str, float], ...] = HIGHLIGHTS) -> str:
    """A Markdown table: mean over the training seeds and, from two on, the standard deviation between them."""
    headings = ["", "w", *(heading for heading, _ in MEASURES.values())]
    lines = ["| " + " | ".join(headings) + " |", "| --- | ---: |" + " ---: |" * len(MEASURES)]
    for name, weight in rows:
        found = summary(record, name, weight)
        numbers = [_number(found[key], decimals) for key, (_, decimals) in MEASURES.items()]
        shown = "" if name in (TRUTH, UNGUIDED) else f"{weight:g}"
        lines.append("| " + " | ".join([_title(name), shown, *numbers]) + " |")
    return "\n".join(lines)


def _title(name: str) -> str:
    return {TRUTH: "Exact samples", UNGUIDED: "No guidance"}.get(name) or METHODS[name].title


def _number(spread: Spread, decimals: int) -> str:
    return f"{spread.mean:.{decimals}f}" + (f" ± {spread.std:.{decimals}f}" if spread.std else "")


def page(record: dict[str, Any]) -> str:
    """The documentation page, Markdown; its pictures lie in toy/ beside it."""
    plain, auto, cfg = (summary(record, *row) for row in ((UNGUIDED, 1.0), ("autoguidance", 3.0), ("cfg", 4.0)))
    cut = summary(record, "truncation", 1.4)
    curves = ((name, weight) for name, method in METHODS.items() for weight in method.weights)
    everything, seeds = ((TRUTH, 1.0), (UNGUIDED, 1.0), *curves), record["training_seeds"]

    def percent(found: dict[str, Spread], key: str) -> str:
        return f"{100 * found[key].mean:.1f}%"

    return f"""<!-- Written by `python scripts/toy_example.py document`; edit report.py instead. -->
# The 2-D toy example

Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", explain autoguidance on a fractal-like
tree in the plane. It trains on a CPU, so here a published result can be reproduced completely, and measured:

```
python scripts/toy_example.py all                          # one training seed: networks, record, figures, page
python scripts/toy_example.py evaluate --training-seeds 5  # the numbers below
```

Figures and the record go to `runs/toy`. `toy.html` there (`all` or `plot --html` writes it) is one page without any
server behind it: a slider moves the weight, a list picks the method.

![Samples of the tree, without guidance and with three kinds of it](toy/figure1.png)

Figure 1: one class of the tree (orange: where its density is above the level that 99% of it exceeds; grey: the other
class), and samples of a small network trained on it. Samples outside the level are red.

Without guidance {percent(plain, "outside")} of the samples lie outside the 99% level. Autoguidance with w = 3 brings
that to {percent(auto, "outside")}, at the price of {percent(auto, "lost_mass")} of the distribution lying in branches
that get less than half of their share. Classifier-free guidance with w = 4 loses {percent(cfg, "lost_mass")} and
leaves {percent(cfg, "outside")} outside; naive truncation to 1.4 loses {percent(cut, "lost_mass")}.

{table(record)}

Mean and standard deviation over {len(seeds)} training seed{"s" if len(seeds) != 1 else ""}, {record["num_samples"]}
samples each. The 99% level is that of the exact density; mean log-density, in nats, is minus the cross-entropy of the
samples to it; a branch is one of 127, held if it gets at least half of its true mass, otherwise that mass is lost;
the sliced Wasserstein distance (order 2, 128 directions) is to as many exact samples, so exact samples have one too.
A sample far from the tree weighs in the mean log-density as hundreds beside it: that is why strong autoguidance lowers
it although fewer samples lie outside the level. At low noise only (last section) autoguidance raises it.

## The trade-off

![Outliers against lost branch mass, one curve for each method](toy/tradeoff.png)

Figure 3: each curve starts at no guidance and follows one method as its weight grows; error bars are the standard
deviation over training seeds. Lower is cleaner, further left is more complete.

## Why autoguidance works

![Densities, their ratio and trajectories close up](toy/figure2.png)

Figure 2: close up, at a noise level in the middle. The guide (b) has learned the same as the main network (a), less
sharply, so the ratio of the two (c) grows towards the branches from either side: guidance follows its gradient.
Trajectories that end between branches without it (d) are led onto a branch (e), mostly the nearest.

## How it was run

{record["num_steps"]} Heun steps from sigma {record["sigma_max"]:g} with the project's own solver and guidance methods
(`edm2kit/sampling`, `edm2kit/guidance`); the networks are trained by exact score matching as in the paper's App. C
(`edm2kit/experiments/toy`). Record: [toy/{RECORD_NAME}](toy/{RECORD_NAME}), made by `{record["command"]}` in
{record["elapsed_sec"] / 60:.0f} minutes without training, commit {record["provenance"]["commit"]}, PyTorch
{record["provenance"]["torch"]}, {record["provenance"]["hardware"]}.

## Every method at every weight

{table(record, everything)}
"""


def document(outdir: Path, docs: Path) -> None:
    """Write docs/toy.md and docs/toy/ from `outdir`; raises ValueError where the record or a picture is missing."""
    record = load_record(outdir)
    missing = [name for name in PICTURES if not (outdir / name).is_file()]
    if missing:
        raise ValueError(f"{outdir} has no {', '.join(missing)}; draw with `toy_example.py plot --outdir {outdir}`")
    (docs / "toy").mkdir(parents=True, exist_ok=True)
    for name in (*PICTURES, RECORD_NAME):
        shutil.copyfile(outdir / name, docs / "toy" / name)
    with atomic_write(docs / "toy.md", "w") as file:
        file.write(page(record))
