"""The generated parts of docs/reliability.md and docs/security.md: faults, cost of checks, the soak, damaged files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edm2kit.experiments.documents import markdown_table

Record = Mapping[str, Any]
# outcome of a trial -> head of its column
OUTCOMES = {
    "equal": "completed, equal bytes",
    "refused": "refused with a reason",
    "found when read": "damage found when read",
    "stays deleted": "stays deleted",
    "unnoticed": "damage unnoticed",
    "broken": "promise broken",
}
FAMILIES = {
    "train": "train",
    "generate": "generate",
    "dataset": "dataset convert, encode",
    "metrics": "calculate_metrics ref, calc",
    "reconstruct": "reconstruct_phema",
    "tune": "tune search",
}
WANTED_FAULTS = 200
WANTED_INPUTS = 1_000_000


def reliability_text(records: Mapping[str, Record]) -> str:
    """The generated part of docs/reliability.md."""
    parts = ["## Faults", faults_text(records.get("faults"))]
    parts += ["## What the checks cost", checks_text(records.get("checks"))]
    parts += ["## A long run", soak_text(records.get("soak"))]
    return "\n\n".join(parts)


def security_text(records: Mapping[str, Record]) -> str:
    """The generated part of docs/security.md."""
    record = records.get("fuzz")
    if record is None:
        return "No record yet: `python -m benchmarks.fuzz`."
    rows = []
    for name, found in record["parsers"].items():
        counts = [f"{found[key]:,}" for key in ("inputs", "read", "refused", "failed")]
        rows.append((name, *counts, f"{found['slowest_sec']:.2f} s"))
    total = sum(found["inputs"] for found in record["parsers"].values())
    few = [name for name, found in record["parsers"].items() if found["inputs"] < WANTED_INPUTS]
    remark = f"Fewer than {WANTED_INPUTS:,} inputs so far: {', '.join(few)}." if few else ""
    return "\n\n".join(
        [
            f"{total:,} inputs, each a valid file with a few random changes (`python -m benchmarks.fuzz`; "
            f"{_machine(record)}, which had other work at the same time). *Failed* would be an error of any other kind "
            "than a refusal in one line, or an input that takes more than 20 s of processor time or 4 GiB of memory.",
            markdown_table(("parser", "inputs", "read", "refused", "failed", "slowest"), rows, "lrrrrr"),
            *([remark] if remark else []),
        ]
    )


def _machine(record: Record) -> str:
    made = record.get("provenance", record)
    processor = f" ({record['cpu']})" if "cpu" in record else ""
    return f"{made['hardware']}{processor}, torch {made['torch']}, Python {made['python']}"


def faults_text(record: Record | None) -> str:
    """Trials by family and outcome, then by kind of fault, and what broke."""
    if record is None:
        return "No record yet: `python -m tests.faults`."
    families = {name: record["families"][name] for name in FAMILIES if name in record["families"]}
    seen = {outcome for found in families.values() for counts in found["kinds"].values() for outcome in counts}
    columns = [outcome for outcome in OUTCOMES if outcome in seen or outcome == "broken"]
    rows = []
    for name, found in families.items():
        counts = sum((Counter(one) for one in found["kinds"].values()), Counter())
        rows.append((FAMILIES[name], str(found["faults"]), *(str(counts[outcome]) for outcome in columns)))
    kinds: dict[str, Counter[str]] = {}
    for found in families.values():
        for kind, outcomes in found["kinds"].items():
            kinds.setdefault(kind, Counter()).update(outcomes)
    by_kind = [
        (kind, str(counts.total()), *(str(counts[outcome]) for outcome in columns))
        for kind, counts in sorted(kinds.items())
    ]
    heads = [OUTCOMES[outcome] for outcome in columns]
    align = "l" + "r" * (len(columns) + 1)
    total = sum(found["faults"] for found in families.values())
    return "\n\n".join(
        [
            f"{total:,} random faults (`python -m tests.faults`; {_machine(record)}, which had other work at the same "
            "time).",
            markdown_table(("command", "faults", *heads), rows, align),
            markdown_table(("kind of fault", "faults", *heads), by_kind, align),
            *_remarks(families),
        ]
    )


def _remarks(families: Mapping[str, Record]) -> list[str]:
    """Families with fewer faults than wanted, what is broken, and what was broken at first."""
    texts = []
    few = [f"{FAMILIES[name]} ({one['faults']})" for name, one in families.items() if one["faults"] < WANTED_FAULTS]
    few += [f"{title} (none)" for name, title in FAMILIES.items() if name not in families]
    if few:
        texts.append(f"Fewer than {WANTED_FAULTS} faults so far: {', '.join(few)}.")
    broken = [
        f"- {FAMILIES[name]}, fault {one['number']} ({one['variant']}, {one['kind']}): {one['problems'][0]:.200}"
        for name, found in families.items()
        for one in found["problems"]
    ]
    if broken:
        texts.append("Broken promises:\n\n" + "\n".join(broken))
    mended = sum(len(found.get("mended", [])) for found in families.values())
    if mended:
        texts.append(
            f"{mended} of these faults broke a promise when they were tried first. The causes were mended, and the "
            "same faults tried again; the tables have the second outcome, the record both."
        )
    return texts


def checks_text(record: Record | None) -> str:
    """The share of each check in the time of training."""
    if record is None:
        return "No record yet: `python -m benchmarks.checks`."
    rows = [(name, f"{share:.3%}") for name, share in record["shares"].items()]
    rows.append(("together", f"**{record['total']:.2%}**"))
    reached = "reached" if record["total"] <= record["goal"] else "**missed**"
    ratios = " and ".join(
        f"{found['median']:.4f} ± {found['error']:.4f} by {clock}" for clock, found in record["ratios"].items()
    )
    return "\n\n".join(
        [
            f"A network of {record['parameters'] / 1e6:.1f} M weights, {record['batch']} images of "
            f"{record['resolution']}x{record['resolution']} per step, one thread (`python -m benchmarks.checks`; "
            f"{_machine(record)}; load average {record['load_average']:.0f}, so processor time counts). Goal: "
            f"{record['goal']:.0%}: {reached}. Larger batches make every share smaller.",
            markdown_table(("check", "share of the time"), rows, "lr"),
            f"Steps with and without the checks of each step, {record['pairs']} of each in turns: ratio {ratios}.",
        ]
    )


def soak_text(record: Record | None) -> str:
    """Growth of memory and open files."""
    if record is None:
        return "No record yet: `python -m benchmarks.soak`."
    events, goal = record["events"], record["goal_mb_per_hour"]
    load = f"load average {record['load_average']:.0f}"
    if "load_range" in record:
        low, high = record["load_range"]
        load += f", between {low:.0f} and {high:.0f}"
    if record["load_average"] > record["ranks"] + 1:
        load += ", because of other work"
    parts = [
        f"{record['ranks']} ranks trained a tiny network for {record['length_sec'] / 60:.0f} minutes "
        f"(`python -m benchmarks.soak`; {_machine(record)}; {load}): "
        f"{events['images']:,} images, {events['snapshots']} snapshots, {events['sample_sheets']} sheets of "
        f"samples. Private memory after the first {record['warm_share']:.0%} of the time, with the standard error "
        "of the slope.",
        markdown_table(
            ("process", "memory", "growth per hour", f"goal {goal:g} MB", "growth in the last third", "open files"),
            [_soak_row(row, goal) for row in record["processes"]],
            "lrrlrr",
        ),
    ]
    allocators = [_in_use_row(row) for row in record["processes"] if "malloc_mb" in row]
    if allocators:
        parts += [
            "Part of that memory is free, but kept. What is in use shows whether something is never freed:",
            markdown_table(
                ("process", "in use by malloc", "growth per hour", "small blocks in use by Python", "growth per hour"),
                allocators,
                "lrrrr",
            ),
        ]
    return "\n\n".join(parts)


def _soak_row(row: Record, goal: float) -> Sequence[str]:
    slope, error = row["slope_mb_per_hour"], row["slope_error_mb_per_hour"]
    first, last = row["most_files_first_and_last"]
    course = row["course_mb"][:-1]  # the last look may be at a process that is ending
    late = course[2 * len(course) // 3 :]
    return (
        row["process"],
        f"{row['median_mb']:.0f} MB",
        f"{slope:+.2f} ± {error:.2f} MB",
        "reached" if slope < goal else "**missed**",
        f"{max(late) - late[0]:.2f} MB",
        f"{first}" if first == last else f"{first}, then {last}",
    )


def _in_use_row(row: Record) -> Sequence[str]:
    malloc, python = row["malloc_mb"], row["python_blocks"]
    return (
        row["process"],
        f"{malloc['median']:.2f} MB",
        f"{malloc['slope_per_hour']:+.2f} ± {malloc['slope_error_per_hour']:.2f} MB",
        f"{python['median']:,.0f}",
        f"{python['slope_per_hour']:+,.0f} ± {python['slope_error_per_hour']:,.0f}",
    )
