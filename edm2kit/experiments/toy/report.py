"""The generated parts of docs/toy.md: tables and findings, from the record alone."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm2kit.experiments.documents import markdown_table, write_parts
from edm2kit.experiments.toy.evaluation import RECORD_NAME, TRUTH, UNGUIDED, Spread, load_record, summary
from edm2kit.experiments.toy.measures import MEASURES
from edm2kit.experiments.toy.methods import TOY_METHODS

FOLDER = Path("experiments", "toy")  # in the checkout: the published record and pictures
DOCUMENT = Path("docs", "toy.md")
PICTURES = ("figure1.png", "figure2.png", "tradeoff.png")
# The settings of the paper's figure, and the same methods at half the distance from w = 1.
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


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of docs/toy.md by name."""
    seeds = len(record["training_seeds"])
    caption = (
        f"Mean and standard deviation over {seeds} training {'seed' if seeds == 1 else 'seeds'}, "
        f"{record['num_samples']} samples each."
    )
    curves = [(name, weight) for name, method in TOY_METHODS.items() for weight in method.weights]
    return {
        "findings": _findings(record),
        "highlights": f"{table(record)}\n\n{caption}",
        "origin": _origin(record),
        "every weight": table(record, [(TRUTH, 1.0), (UNGUIDED, 1.0), *curves]),
    }


def table(record: Mapping[str, Any], rows: Sequence[tuple[str, float]] = HIGHLIGHTS) -> str:
    """A Markdown table of (method, weight) `rows`: mean over the training seeds ± standard deviation between them."""
    titles = {TRUTH: "Exact samples", UNGUIDED: "No guidance"} | {name: m.title for name, m in TOY_METHODS.items()}
    lines = []
    for name, weight in rows:
        found = summary(record, name, weight)
        numbers = [_number(found[key], decimals) for key, (_, decimals) in MEASURES.items()]
        shown_weight = f"{weight:g}" if name in TOY_METHODS else ""
        lines.append([titles[name], shown_weight, *numbers])
    head = ["", "w", *(heading for heading, _ in MEASURES.values())]
    return markdown_table(head, lines, "l" + "r" * (len(head) - 1))


def _number(spread: Spread, decimals: int) -> str:
    mean = f"{spread.mean:.{decimals}f}"
    return f"{mean} ± {spread.std:.{decimals}f}" if spread.std else mean


def _findings(record: Mapping[str, Any]) -> str:
    def percent(name: str, weight: float, measure: str) -> str:
        return f"{100 * summary(record, name, weight)[measure].mean:.1f}%"

    return (
        f"Without guidance, {percent(UNGUIDED, 1, 'outside')} of the samples lie outside the 99% level. Autoguidance "
        f"with w = 3 reduces that to {percent('autoguidance', 3, 'outside')}, but "
        f"{percent('autoguidance', 3, 'lost_mass')} of the distribution is now in branches that get less than half of "
        f"their share. Classifier-free guidance with w = 4 loses {percent('cfg', 4, 'lost_mass')} and leaves "
        f"{percent('cfg', 4, 'outside')} outside; naive truncation with w = 1.4 loses "
        f"{percent('truncation', 1.4, 'lost_mass')}."
    )


def _origin(record: Mapping[str, Any]) -> str:
    made = record["provenance"]
    return (
        f"{record['num_steps']} Heun steps from sigma {record['sigma_max']:g}. The record was made by "
        f"`{record['command']}` in {record['elapsed_sec'] / 60:.0f} minutes (training not included) at commit "
        f"{made['commit']} with PyTorch {made['torch']} on {made['hardware']}."
    )


def publish(outdir: Path, checkout: Path) -> None:
    """Copy record and pictures from `outdir` to experiments/toy in `checkout`, and update docs/toy.md.

    Raises ValueError if the record or a picture is missing.
    """
    record = load_record(outdir)
    missing = [name for name in PICTURES if not (outdir / name).is_file()]
    if missing:
        raise ValueError(
            f"{outdir} has no {', '.join(missing)}. Plot with `toy_example.py plot --outdir {outdir}` first"
        )
    folder = checkout / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*PICTURES, RECORD_NAME):
        shutil.copyfile(outdir / name, folder / name)
    write_parts(checkout / DOCUMENT, document_parts(record))
