"""The generated part of docs/scaling.md: measured on two ranks, forecast by the step model for many."""

from collections.abc import Mapping
from typing import Any

from benchmarks.step_model import Links, Machine, TrainingJob, reading, step_time
from edm2kit.experiments.documents import markdown_table

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
# bytes of an image in storage; assumes 9 kB for a 64x64 PNG of a photograph
STORED = {
    "edm2-img64-s": {"compressed PNGs in a zip": 9000, "files of `convert`, not decoded": 64 * 64 * 3},
    "edm2-img512-s": {"latents, float32": 8 * 64 * 64 * 4, "latents, float16": 8 * 64 * 64 * 2},
    "edm2-img512-xxs": {"latents, float32": 8 * 64 * 64 * 4, "latents, float16": 8 * 64 * 64 * 2},
}


def scaling_text(records: Mapping[str, dict[str, Any]]) -> str:
    """The generated part of docs/scaling.md."""
    record = records.get("scaling")
    if record is None:
        return "No record yet: `python -m benchmarks.scaling`."
    parts = ["## Two ranks, measured", measured_text(record)]
    parts += ["## The model against the measurement", model_text(record)]
    parts += ["## Forecast: 8 to 512 GPUs", assumptions_text(), forecast_table(record["presets"])]
    parts += ["## Forecast: reading", reading_text(record)]
    return "\n\n".join(parts)


def measured_text(record: Mapping[str, Any]) -> str:
    low, high = record["efficiency_range"]
    reached = "reached" if record["efficiency"] >= record["goal"] else "**missed**"
    seconds, overlap, made = record["step_sec"], record["overlap"], record["provenance"]
    averages = record["phases_sec"]["alone"]["averages"] / seconds["alone"]
    rows = [
        ("one process alone", f"{seconds['alone']:.3f}"),
        ("two independent processes", f"{seconds['independent']:.3f}"),
        ("two ranks", f"{seconds['ranks']:.3f}"),
    ]
    return "\n\n".join(
        [
            f"A network of {record['parameters'] / 1e6:.1f} M weights, {record['batch']} images of 32x32 per rank, one "
            f"thread per process, each on its own core (gloo). {made['hardware']}, torch {made['torch']}, commit "
            f"{made['commit'][:10]}.",
            markdown_table(("way", "seconds per step"), rows),
            f"Two ranks train at **{record['efficiency']:.1%}** of the speed of two independent processes ({low:.1%} "
            f"to {high:.1%} over {record['blocks']} blocks of two steps, taking turns; goal {record['goal']:.0%}: "
            f"{reached}).",
            f"Communication overlaps with the backward pass: gradients are sent in {overlap['buckets']} buckets, the "
            f"first of them {overlap['first_bucket_before_end_sec']:.2f} s before the end of the backward pass, and "
            f"{overlap['share_before_the_last']:.0%} of the bytes before the last gradient is computed. After that the "
            f"step waits for {overlap['waited_after_last_gradient_sec'] * 1e3:.0f} ms.",
            f"The two averages take {averages:.1%} of a step of one process.",
        ]
    )


def model_text(record: Mapping[str, Any]) -> str:
    rows = []
    for ranks, way in (("1", "alone"), ("2", "ranks")):
        found = record["model"][way]
        rows.append(
            (ranks, f"{found['forecast_sec']:.3f} s", f"{found['measured_sec']:.3f} s", f"{found['error']:+.1%}")
        )
    return (
        "The model takes its speeds from steps with a quarter and a half of the batch in one process, and from a "
        f"separate all-reduce ({record['all_reduce_bytes_per_sec'] / 1e9:.2f} GB/s). For steps it has not seen it "
        "predicts:\n\n" + markdown_table(("ranks", "forecast", "measured", "error"), rows)
    )


def assumptions_text() -> str:
    links = H100.links
    return (
        f"Assumed, not measured: nodes of {links.group} H100, {H100.multiply_adds / 1e12:.0f} T multiply-adds per "
        f"second in training ({UTILISATION:.0%} of nominal), {H100.memory_bytes / 1e12:.2f} TB/s of memory, "
        f"{links.inside / 1e9:.0f} GB/s within a node, {links.between / 1e9:.1f} GB/s per GPU between nodes, "
        f"{links.latency_sec * 1e6:.0f} us per message; {H100.overlap:.0%} of the backward pass hides communication. "
        f"The global batch is {BATCH} images, as published, so with more GPUs each has fewer images. Cells: images per "
        "second (efficiency relative to 8 GPUs)."
    )


def forecast_table(presets: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for preset, cost in sorted(presets.items(), key=lambda item: ("img512" in item[0], item[1]["parameters"])):
        rates = {ranks: images_per_sec(cost, ranks) for ranks in RANKS}
        rows.append([preset, *(f"{rate:,.0f} ({rate / rates[8] * 8 / ranks:.0%})" for ranks, rate in rates.items())])
    return markdown_table(["preset", *(f"{ranks} GPUs" for ranks in RANKS)], rows)


# preset -> training images on docs/imagenet.md: the network of Table 1 and its guide
IMAGENET_RUNS = {"edm2-img512-s": 2048 << 20, "edm2-img512-xs": 128 << 20}
IMAGENET_RANKS = (8, 32, 64)


def imagenet_text(records: Mapping[str, dict[str, Any]]) -> str:
    """The generated part of docs/imagenet.md: how long both networks train, by the step model."""
    record = records.get("scaling")
    if record is None:
        return "No record yet: `python -m benchmarks.scaling`."
    rows = []
    for preset, nimg in IMAGENET_RUNS.items():
        for ranks in IMAGENET_RANKS:
            rate = images_per_sec(record["presets"][preset], ranks)
            hours = nimg / rate / 3600
            rows.append(
                (preset, f"{nimg >> 20:,} Mi", str(ranks), f"{rate:,.0f}", f"{hours:,.1f}", f"{BATCH // ranks}")
            )
    head = ("preset", "images", "H100 GPUs", "images/s", "hours", "images per GPU and step")
    return "Forecast by the step model of [scaling.md](scaling.md), not measured:\n\n" + markdown_table(head, rows)


def images_per_sec(cost: Mapping[str, float], ranks: int) -> float:
    """Training speed of a preset on that many H100."""
    job = TrainingJob(int(cost["parameters"]), cost["multiply_adds"], BATCH)
    return BATCH / step_time(job, H100, ranks).total


def reading_text(record: Mapping[str, Any]) -> str:
    decodes = record["png_decodes_per_sec"]
    rows = []
    for preset, forms in STORED.items():
        rate = images_per_sec(record["presets"][preset], READING_RANKS)
        for form, count in forms.items():
            load = reading(rate, count)
            cores = f"{rate / decodes:.1f}" if "PNG" in form else ""
            numbers = (f"{rate:,.0f}", f"{load.bytes_per_sec / 1e6:,.0f}", f"{load.reads_per_sec:,.0f}")
            rows.append((preset, form, *numbers, cores))
    return (
        f"{READING_RANKS} GPUs at the speeds above, with shared storage, one read at a random position per image. One "
        f"core decodes {decodes:,.0f} PNGs of 64x64 per second here; the last column is the number of cores for "
        "decoding. The operating system's cache is not considered; a data set that fits into memory is read once, in "
        "the first epoch.\n\n"
        + markdown_table(("preset", "stored as", "images/s", "MB/s", "reads/s", "cores for decoding"), rows)
    )
