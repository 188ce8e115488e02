"""What docs/scaling.md says: measured on two ranks, and forecast by the step model for many."""

from collections.abc import Mapping
from typing import Any

from benchmarks.step_model import Job, Links, Machine, reading, step_time

RANKS = (8, 16, 32, 64, 128, 256, 512)
BATCH = 2048
# H100 nodes. Nominal: 989 Tflop/s dense in half precision, 3.35 TB/s, NVLink 450 GB/s each way, 400 Gbit/s a GPU
UTILISATION, MEMORY_SHARE, LINK_SHARE = 0.35, 0.8, 0.75
H100 = Machine(
    multiply_adds=989e12 / 2 * UTILISATION,
    memory_bytes=3.35e12 * MEMORY_SHARE,
    links=Links(group=8, inside=450e9 * LINK_SHARE, between=50e9 * LINK_SHARE, latency_sec=15e-6),
    overlap=0.9,
)
READING_RANKS = 64
# bytes of an image as it lies in storage; a 64x64 PNG of a photograph is taken to be 9 kB
STORED = {
    "edm2-img64-s": {"PNGs in a zip": 9000, "prepared array": 64 * 64 * 3},
    "edm2-img512-s": {"latents, float32": 8 * 64 * 64 * 4, "latents, float16": 8 * 64 * 64 * 2},
    "edm2-img512-xxs": {"latents, float32": 8 * 64 * 64 * 4, "latents, float16": 8 * 64 * 64 * 2},
}


def scaling_text(records: Mapping[str, dict[str, Any]]) -> str:
    """The generated part of docs/scaling.md."""
    record = records.get("scaling")
    if record is None:
        return "No record yet: `python -m benchmarks.scaling`."
    parts = [
        "## Two ranks, measured",
        measured_text(record),
        "## The model against the measurement",
        model_text(record),
    ]
    parts += ["## Forecast: 8 to 512 GPUs", assumptions_text(), forecast_table(record["presets"])]
    parts += ["## Forecast: reading", reading_text(record)]
    return "\n\n".join(parts)


def measured_text(record: Mapping[str, Any]) -> str:
    low, high = record["efficiency_range"]
    reached = "reached" if record["efficiency"] >= record["goal"] else "**missed**"
    seconds, overlap, made = record["step_sec"], record["overlap"], record["provenance"]
    phases = record["phases_sec"]["alone"]
    averages = phases["averages"] / seconds["alone"]
    lines = [
        f"A network of {record['parameters'] / 1e6:.1f} M weights, {record['batch']} images of 32x32 a rank, one "
        f"thread a process, each on a core of its own (gloo). {made['hardware']}, torch {made['torch']}, commit "
        f"{made['commit'][:10]}.",
        "",
        "| way | seconds a step |",
        "|---|---|",
        f"| one process alone | {seconds['alone']:.3f} |",
        f"| two processes, nothing done together | {seconds['independent']:.3f} |",
        f"| two ranks | {seconds['ranks']:.3f} |",
        "",
        f"Two ranks train at **{record['efficiency']:.1%}** of the speed of two independent processes ({low:.1%} to "
        f"{high:.1%} over {record['blocks']} blocks of two steps, in turns; goal {record['goal']:.0%}: {reached}).",
        "",
        f"Communication overlaps with the backward pass: gradients travel in {overlap['buckets']} buckets, the first "
        f"of them {overlap['first_bucket_before_end_sec']:.2f} s before the backward pass ends, "
        f"{overlap['share_before_the_last']:.0%} of the bytes before the last gradient is computed; then "
        f"{overlap['waited_after_last_gradient_sec'] * 1e3:.0f} ms are left to wait.",
        "",
        f"The two averages take {averages:.1%} of a step of one process.",
    ]
    return "\n".join(lines)


def model_text(record: Mapping[str, Any]) -> str:
    lines = [
        "Speeds come from steps of a quarter and of half of the batch in one process, and from an all-reduce by itself "
        f"({record['all_reduce_bytes_per_sec'] / 1e9:.2f} GB/s); the model then says, of what it has not seen:",
        "",
        "| ranks | forecast | measured | error |",
        "|---|---|---|---|",
    ]
    for ranks, way in ((1, "alone"), (2, "ranks")):
        found = record["model"][way]
        numbers = f"{found['forecast_sec']:.3f} s | {found['measured_sec']:.3f} s | {found['error']:+.1%}"
        lines.append(f"| {ranks} | {numbers} |")
    return "\n".join(lines)


def assumptions_text() -> str:
    links = H100.links
    return (
        f"Assumed, not measured: nodes of {links.group} H100, {H100.multiply_adds / 1e12:.0f} T multiply-adds a second "
        f"in training ({UTILISATION:.0%} of nominal), {H100.memory_bytes / 1e12:.2f} TB/s of memory, "
        f"{links.inside / 1e9:.0f} GB/s within a node, {links.between / 1e9:.1f} GB/s a GPU between nodes, "
        f"{links.latency_sec * 1e6:.0f} us a message; {H100.overlap:.0%} of the backward pass hides communication. "
        f"A global batch of {BATCH} images, as published, so that more GPUs have fewer images each. Cells: images a "
        "second (efficiency against 8 GPUs)."
    )


def forecast_table(presets: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["| preset | " + " | ".join(f"{n} GPUs" for n in RANKS) + " |", "|---" * (len(RANKS) + 1) + "|"]
    for preset, cost in sorted(presets.items(), key=lambda item: ("img512" in item[0], item[1]["parameters"])):
        rates = {ranks: images_per_sec(cost, ranks) for ranks in RANKS}
        cells = [f"{rate:,.0f} ({rate / rates[8] * 8 / ranks:.0%})" for ranks, rate in rates.items()]
        lines.append(f"| {preset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def images_per_sec(cost: Mapping[str, float], ranks: int) -> float:
    """Training speed of a preset on that many H100."""
    job = Job(int(cost["parameters"]), cost["multiply_adds"], BATCH)
    return BATCH / step_time(job, H100, ranks).total


def reading_text(record: Mapping[str, Any]) -> str:
    decodes = record["png_decodes_per_sec"]
    lines = [
        f"{READING_RANKS} GPUs at the speeds above, from shared storage, each image one read at a random place; a core "
        f"decodes {decodes:,.0f} PNGs of 64x64 a second here, so that PNGs take so many cores for decoding alone. The "
        "operating system's cache, which a data set that fits into memory fills in its first epoch, is left out.",
        "",
        "| preset | stored as | images/s | MB/s | reads/s | cores for decoding |",
        "|---|---|---|---|---|---|",
    ]
    for preset, forms in STORED.items():
        rate = images_per_sec(record["presets"][preset], READING_RANKS)
        for form, count in forms.items():
            asked = reading(rate, count)
            cores = f"{rate / decodes:.1f}" if "PNG" in form else ""
            numbers = f"{rate:,.0f} | {asked.bytes_per_sec / 1e6:,.0f} | {asked.reads_per_sec:,.0f} | {cores}"
            lines.append(f"| {preset} | {form} | {numbers} |")
    return "\n".join(lines)
