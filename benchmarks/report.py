"""Write what the records say into the documents of `documents`, and plot how cost grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks import harness
from benchmarks.gpu_items import gpu_setting, items
from benchmarks.plots import growth_plot
from benchmarks.precision_report import precision_text
from benchmarks.reliability_report import reliability_text, security_text
from benchmarks.scaling_report import imagenet_text, scaling_text
from benchmarks.tables import comparison_table
from edm2kit.cli import click_types as cli
from edm2kit.experiments.documents import is_current, markdown_table, write_parts

DOCS = harness.ROOT / "docs"
PLOT_NAME = "growth.png"  # in the folder of the records
PART = "records"  # name of the generated part of either document

_GROWTH = f"""![Images per second against batch, resolution and width](../benchmarks/records/{PLOT_NAME})

*From the records `growth`, `scaling` and `memory`, around 8 images of 32x32 pixels and 32 channels. Dotted: what the
number of multiply-adds alone would predict.*"""

Record = Mapping[str, Any]
Records = Mapping[str, Record]


@click.command(cls=cli.Command)
@click.option(
    "--records",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=harness.RECORDS,
    help="Folder of the records  [default: benchmarks/records]",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path, file_okay=False),
    default=DOCS,
    help="Folder of the documents  [default: docs]",
)
@click.option("--check", is_flag=True, help="Write nothing; fail if a document differs from the records")
def main(folder: Path, docs: Path, check: bool) -> None:
    """Update the documents in docs/ that report the records of the benchmarks."""
    records = read_records(folder)
    texts = documents(records)
    if check:
        outdated = [name for name, text in texts.items() if not is_current(docs / name, {PART: text})]
        if outdated:
            raise ValueError(f"{', '.join(outdated)}: older than the records. Run python -m benchmarks.report")
        return
    for name, text in texts.items():
        write_parts(docs / name, {PART: text})
    if "growth" in records:
        growth_plot(records, folder / PLOT_NAME)
    click.echo(f"Wrote {', '.join(texts)}")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """All records by job."""
    return {record["job"]: record for record in harness.load(folder)}


def documents(records: Records) -> dict[str, str]:
    """Generated text by file in docs/."""
    return {
        "performance.md": performance_text(records),
        "scaling.md": scaling_text(records),
        "imagenet.md": imagenet_text(records),
        "reliability.md": reliability_text(records),
        "security.md": security_text(records),
    }


def performance_text(records: Records) -> str:
    """What was measured, on which machine, and what was not measured."""
    comparisons = [record for record in records.values() if "contenders" in record]
    parts = ["### On the CPU", machines_text(comparisons)]
    parts.append(comparison_table(comparisons) if comparisons else "No comparisons yet.")
    if half := half_errors_text(comparisons):
        parts.append(half)
    if "end_to_end" in records:
        parts += ["### What people wait for", waits_text(records["end_to_end"])]
    if "precision" in records:
        parts += [
            "### Half precision from start to end",
            precision_text(records["precision"], machines_text([records["precision"]])),
        ]
    if "memory" in records:
        parts += ["### Memory of training", memory_text(records["memory"])]
    if "growth" in records:
        parts += ["### How cost grows", _GROWTH]
    parts += ["### On a GPU", gpu_text(records.get("gpu"))]
    if "precision_gpu" in records:
        found = records["precision_gpu"]
        parts.append(precision_text(found, machines_text([found])))
    parts += ["### Not measured", missing_text(records)]
    return "\n\n".join(parts)


def machines_text(records: Sequence[Record]) -> str:
    """Machines, versions and commits of the records."""
    if not records:
        return "Nothing measured yet."
    made = [record["provenance"] for record in records]
    machines = " / ".join(dict.fromkeys(_machine(record) for record in records))
    commits = ", ".join(dict.fromkeys(_short_commit(p["commit"]) for p in made))
    return f"Measured on {machines}; commits {commits}."


def _machine(record: Record) -> str:
    made = record["provenance"]
    processor = f", {record['cpu']}" if "cpu" in record else ""
    return f"{made['hardware']}{processor}, torch {made['torch']}, Python {made['python']}"


def _short_commit(commit: str) -> str:
    changes = "+changes" if "+" in commit else ""
    return commit[:10] + changes


def half_errors_text(records: Sequence[Record]) -> str:
    """How close one evaluation in half precision is to float32, if a record says so; else an empty text."""
    for record in records:
        notes = record.get("notes", {})
        if "error_bf16" in notes:
            return (
                f"One evaluation of D in bf16 differs from float32 by {notes['error_bf16']:.2%} (relative norm); the "
                f"plain network under torch's autocast by {notes['error_autocast_bf16']:.2%}."
            )
    return ""


def waits_text(record: Record) -> str:
    """The times of complete commands, with their goals."""
    rows = []
    for row in record["rows"]:
        goal = ""
        if row["goal"] is not None and not row["name"].endswith(", for comparison"):
            goal = f"{row['goal']:g} {row['unit']}: {'reached' if row['is_reached'] else '**missed**'}"
        rows.append((row["name"], f"{row['value']:.3g} {row['unit']}", goal, row["note"]))
    return f"{machines_text([record])}\n\n{markdown_table(('what', 'measured', 'goal', ''), rows)}"


def memory_text(record: Record) -> str:
    """Forecast and measured peaks, and what the largest network needs."""
    worst = max(abs(row["error"]) for row in record["rows"])
    rows = []
    for row in record["rows"]:
        numbers = [row[f"{kind}_bytes"] / 1e9 for kind in ("state", "activation", "forecast", "measured")]
        rows.append((row["name"], *(f"{number:.2f} GB" for number in numbers), f"{row['error']:+.1%}"))
    head = ("setting", "weights, gradients, Adam, averages", "activations", "forecast", "measured", "error")
    by_ranks = record["xxl_bytes"]
    choices = list(dict.fromkeys(name for found in by_ranks.values() for name in found))
    xxl_rows = [
        (ranks, *(f"{found[name] / 1e9:.1f} GB" if name in found else "" for name in choices))
        for ranks, found in by_ranks.items()
    ]
    return "\n\n".join(
        [
            f"Peak resident memory that training adds to a process, {record['rows'][0]['parameters'] / 1e6:.1f} M "
            f"weights, {record['resolution']}x{record['resolution']} pixels, {record['batch']} images per rank, "
            f"against the forecast of `train.py -n`: within {worst:.0%}. {machines_text([record])}",
            markdown_table(head, rows),
            "edm2-img512-xxl (1523 M weights) at `--batch-gpu 1`, forecast per GPU:",
            markdown_table(("GPUs", *choices), xxl_rows),
        ]
    )


def gpu_text(record: Record | None) -> str:
    """The items of a run of benchmarks/gpu.sh."""
    if record is None:
        return (
            "No record yet. On a machine with an NVIDIA GPU, repeat `bash benchmarks/gpu.sh` until it reports that all "
            "items are complete: calls of at most nine minutes, about ten of them."
        )
    parts = [machines_text([record])]
    comparisons, numbers, failed = [], [], []
    for name, item in record["items"].items():
        if "contenders" in item:
            comparisons.append(item)
        if item.get("numbers"):
            numbers.append(f"- {name}: {_numbers_text(item['numbers'])}")
        if "error" in item:
            failed.append(f"- {name}: {item['error']}")
    if comparisons:
        parts.append(comparison_table(comparisons))
    if numbers:
        parts.append("\n".join(numbers))
    if failed:
        parts += ["Without a complete result:", "\n".join(failed)]
    missing = [name for name in items(gpu_setting()) if name not in record["items"]]
    if missing:
        parts.append(f"Not measured yet (`bash benchmarks/gpu.sh` continues): {', '.join(missing)}.")
    return "\n\n".join(parts)


def _numbers_text(numbers: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
    )


def missing_text(records: Records) -> str:
    """Every benchmark without a record, and the command that makes one; then what a benchmark skipped."""
    lines = []
    for name in benchmarks():
        if name == "gpu" and name not in records:
            lines.append("- `gpu`: no machine behind these records has a GPU; `bash benchmarks/gpu.sh`")
        elif not _has_record(name, records):
            lines.append(f"- `{name}`: `python -m benchmarks.{name}`")
    skipped = set()
    for name, record in records.items():
        for way, reason in record.get("notes", {}).get("skipped", {}).items():
            # it says "this CPU", which was another one than the reader's, and than that of other records
            skipped.add(f"- {way} (record `{name}`, {_machine(record)}): {reason.replace('this CPU', 'that CPU')}")
    return "\n".join([*lines, *sorted(skipped)]) or "Every benchmark has a record."


def _has_record(name: str, records: Records) -> bool:
    # a benchmark may write records of other names; older records name it by its file
    commands = " ".join(record["command"] for record in records.values())
    return name in records or f"benchmarks.{name}" in commands or f"benchmarks/{name}.py" in commands


def benchmarks() -> list[str]:
    """Names of the benchmarks: the modules of this folder that can be run, other than this one."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    starts = 'if __name__ == "__main__":'
    return [file.stem for file in files if starts in file.read_text(encoding="utf-8") and file.stem != "report"]


if __name__ == "__main__":
    main()
