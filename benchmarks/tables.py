"""Comparisons as a Markdown table: what `harness.describe` prints and docs/performance.md shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from edm2kit.experiments.documents import markdown_table

_HEAD = ("job", "way", "median", "ratio to plain (range)", "goal", "error", "of the ceiling")


def comparison_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of `harness.describe` as one table, sorted by job; the first way of a job is the plain one."""
    rows = []
    for record in sorted(records, key=lambda record: record["job"]):
        plain = next(iter(record["contenders"]))
        for way, row in record["contenders"].items():
            low, high = row["ratio_range"]
            rows.append(
                (
                    record["job"],
                    way,
                    duration_text(row["median_sec"]),
                    "1" if way == plain else f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})",
                    goal_text(row, record),
                    "" if row.get("error") is None else f"{row['error']:.1e}",
                    f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "",
                )
            )
    return markdown_table(_HEAD, rows)


def goal_text(row: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The goal and whether it was reached. If it was missed: whether this machine's arithmetic allows it at all."""
    if row.get("goal") is None:
        return ""
    goal = f"{row['goal']:g}"
    if row["ratio"] >= row["goal"]:
        return f"{goal}: reached"
    missed = f"{goal}: **missed** by {1 - row['ratio'] / row['goal']:.0%}"
    plain = next(iter(record["contenders"].values()))
    needed = row["goal"] * plain.get("share_of_ceiling", 0)
    if "per_sec" in row and "share_of_ceiling" in row:  # in another precision, the ceiling is another one
        needed = row["goal"] * plain["per_sec"] * row["share_of_ceiling"] / row["per_sec"]
    is_arithmetic = (record.get("work") or {}).get("unit") == "multiply-adds"
    # a rate that was exceeded is not a limit
    is_limit = all(way.get("share_of_ceiling", 0) <= 1 for way in record["contenders"].values())
    if is_arithmetic and is_limit and needed > 1:
        return f"{missed}, would be {needed:.0%} of the ceiling"
    return missed


def duration_text(seconds: float) -> str:
    """Seconds for people, in milliseconds below one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
