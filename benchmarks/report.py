"""Write what the records say into the documents: docs/performance.md, docs/scaling.md and the plot of growing cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks import harness
from benchmarks.harness import duration
from benchmarks.plots import growth_plot
from benchmarks.scaling_report import scaling_text
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.files import atomic_write

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- records: begin -->", "<!-- records: end -->"
_NO_GPU = "gpu"  # the benchmark that no machine without a GPU has a record of

_GROWTH = """![Images a second against batch, resolution, width, ranks; memory; EMA outputs](growth.png)

*From the records `growth`, `scaling` and `memory`, around 8 images of 32x32 pixels and 32 channels. Dotted: what the
multiply-adds alone would make of it.*"""

Records = Mapping[str, dict[str, Any]]


@click.command(cls=cli.Command)
@click.option("--records", "folder", type=click.Path(path_type=Path), default=harness.RECORDS, help="Where they are.")
@click.option("--docs", type=click.Path(path_type=Path), default=DOCS, help="Folder of the documents.")
def main(folder: Path, docs: Path) -> None:
    """Fill in the documents from benchmarks/records/*.json."""
    records = read_records(folder)
    for name, text in documents(records).items():
        path = docs / name
        filled = fill_in(path.read_text(encoding="utf-8"), text)
        with atomic_write(path, "w") as file:
            file.write(filled)
    if "growth" in records:
        growth_plot(records, docs / "growth.png")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by job; of sets of records, such as a GPU's, as one."""
    return {record["job"]: record for record in harness.load(folder)}


def documents(records: Records) -> dict[str, str]:
    """File in docs/ -> what stands between its marks."""
    return {"performance.md": performance_text(records), "scaling.md": scaling_text(records)}


def fill_in(document: str, part: str) -> str:
    """`document` with `part` between its two marks. Raises ValueError where it lacks them."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"the document needs one line {BEGIN} and, below it, one {END}")
    return f"{document.split(BEGIN)[0]}{BEGIN}\n{part}\n{END}{document.split(END)[1]}"


def performance_text(records: Records) -> str:
    """Everything that was measured, what it was measured on, and what was not measured."""
    comparisons = [record for record in records.values() if "contenders" in record]
    parts = ["### On the CPU", machines(comparisons), comparison_table(comparisons)]
    parts += [text for text in [half_errors_text(comparisons)] if text]
    if "memory" in records:
        parts += ["### Memory of training", memory_text(records["memory"])]
    if "growth" in records:
        parts += ["### How cost grows", _GROWTH]
    parts += ["### On a GPU", gpu_text(records.get("gpu"))]
    parts += ["### Not measured", missing_text(records)]
    return "\n\n".join(parts)


def machines(records: list[dict[str, Any]]) -> str:
    """The machines and versions of these records, and their commits."""
    if not records:
        return "Nothing measured yet."
    made = [record["provenance"] for record in records]
    on = " / ".join(dict.fromkeys(f"{p['hardware']}, torch {p['torch']}, Python {p['python']}" for p in made))
    commits = ", ".join(dict.fromkeys(p["commit"][:10] + ("+changes" if "+" in p["commit"] else "") for p in made))
    return f"Measured on {on}; commits {commits}."


def comparison_table(records: list[dict[str, Any]]) -> str:
    """Goals beside results; the first way of a job is the plain one."""
    if not records:
        return "No comparisons yet."
    lines = [
        "| job | way | median | ratio to plain (range) | goal | error | of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda record: record["job"]):
        first = next(iter(record["contenders"]))
        for label, row in record["contenders"].items():
            low, high = row["ratio_range"]
            cells = [
                record["job"],
                label,
                duration(row["median_sec"]),
                f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})" if label != first else "1",
                goal(row, record),
                "" if row.get("error") is None else f"{row['error']:.1e}",
                f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def half_errors_text(records: list[dict[str, Any]]) -> str:
    """How near one evaluation in half precision comes to float32, where a record says so."""
    notes = next((notes for record in records if "error_bf16" in (notes := record.get("notes", {}))), None)
    if notes is None:
        return ""
    return (
        f"One evaluation of D in bf16 differs from float32 by {notes['error_bf16']:.2%} (relative norm); the plain "
        f"network under torch's autocast by {notes['error_autocast_bf16']:.2%}."
    )


def goal(row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The goal and whether it was reached; of one that was missed, whether this machine's arithmetic allows it."""
    if row.get("goal") is None:
        return ""
    if row["ratio"] >= row["goal"]:
        return f"{row['goal']:g}: reached"
    needed = row["goal"] * next(iter(record["contenders"].values())).get("share_of_ceiling", 0)
    beyond = f", would be {needed:.0%} of the ceiling" if needed > 1 and _is_arithmetic(record) else ""
    return f"{row['goal']:g}: **missed**{beyond}"


def _is_arithmetic(record: Mapping[str, Any]) -> bool:
    return (record.get("work") or {}).get("unit") == "multiply-adds"


def memory_text(record: Mapping[str, Any]) -> str:
    """Forecast and measured peaks, and what the largest network needs."""
    worst = max(abs(row["error"]) for row in record["rows"])
    lines = [
        f"Peak resident memory that training adds to a process, {record['rows'][0]['parameters'] / 1e6:.1f} M weights, "
        f"{record['resolution']}x{record['resolution']} pixels, {record['batch']} images a rank, against the forecast "
        f"of `train.py -n`: within {worst:.0%}. {machines([record])}",
        "",
        "| setting | weights, gradients, Adam, averages | activations | forecast | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        numbers = [row[key] / 1e9 for key in ("state_bytes", "activation_bytes", "forecast_bytes", "measured_bytes")]
        lines.append(f"| {row['name']} | " + " | ".join(f"{n:.2f} GB" for n in numbers) + f" | {row['error']:+.1%} |")
    choices = list(next(iter(record["xxl_bytes"].values())) | record["xxl_bytes"]["4"])
    lines += ["", "edm2-img512-xxl (1523 M weights) at `--batch-gpu 1`, forecast for each GPU:", ""]
    lines += ["| GPUs | " + " | ".join(choices) + " |", "|---" * (len(choices) + 1) + "|"]
    for ranks, found in record["xxl_bytes"].items():
        cells = [f"{found[name] / 1e9:.1f} GB" if name in found else "" for name in choices]
        lines.append(f"| {ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_text(record: Mapping[str, Any] | None) -> str:
    """The items of a run of benchmarks/gpu.sh."""
    if record is None:
        return "No record: it takes a machine with an NVIDIA GPU and `bash benchmarks/gpu.sh`, under 25 minutes."
    parts, items = [machines([record])], record["items"]
    comparisons = [item for item in items.values() if "contenders" in item]
    if comparisons:
        parts.append(comparison_table(comparisons))
    lines = [
        f"- {name}: " + ", ".join(f"{key} {_plain(value)}" for key, value in item["numbers"].items())
        for name, item in items.items()
        if item.get("numbers")
    ]
    parts += ["\n".join(lines)] if lines else []
    failed = [f"- {name}: {item['error']}" for name, item in items.items() if "error" in item]
    parts += ["Without a result:", "\n".join(failed)] if failed else []
    return "\n\n".join(parts)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def missing_text(records: Records) -> str:
    """Every benchmark of which there is no record, and how to make one."""
    commands = " ".join(record["command"] for record in records.values())
    lines = []
    for name in benchmarks():
        if name in records or f"benchmarks/{name}.py" in commands:
            continue
        if name == _NO_GPU:
            lines.append("- `gpu`: none of the machines behind these records has a GPU; `bash benchmarks/gpu.sh`")
        else:
            lines.append(f"- `{name}`: `python -m benchmarks.{name}`")
    skipped = {
        f"- {way}: {reason}"
        for record in records.values()
        for way, reason in record.get("notes", {}).get("skipped", {}).items()
    }
    return "\n".join(lines + sorted(skipped)) or "Every benchmark has a record."


def benchmarks() -> list[str]:
    """Names of the benchmarks, by their files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if "__main__" in file.read_text(encoding="utf-8") and file.stem != "report"]


if __name__ == "__main__":
    main()
