"""Every parser reads a damaged file or refuses it in one line (hypothesis; `benchmarks.fuzz` does it for millions)."""

import json
import re
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edm2kit
from benchmarks.fuzz import PARSERS
from benchmarks.fuzz_inputs import ODD_VALUES, Change, Parser, mutate, mutate_values, outcome, zip_of
from edm2kit.cli.generate import read_record
from edm2kit.torch_utils.dist import one_line

PACKAGE = Path(edm2kit.__file__).parent

CHANGES = st.lists(
    st.builds(Change, st.integers(0, 11), st.integers(0, 1 << 20), st.integers(0, 1 << 16)), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A folder of each parser, and its valid inputs."""
    folders = {name: tmp_path_factory.mktemp("seeds") for name in PARSERS}
    return {name: (folder, PARSERS[name].seeds(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("name", PARSERS)
def test_valid_inputs_are_read(seeds, name):
    folder, valid = seeds[name]
    for seed in valid:
        assert outcome(PARSERS[name], PARSERS[name].input_of(seed, []), folder) == "read"


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_inputs_are_read_or_refused_in_one_line(seeds, name):
    folder, valid = seeds[name]

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES, which=st.integers(0, 99))
    def check(changes, which):
        seed = valid[which % len(valid)]
        assert outcome(PARSERS[name], PARSERS[name].input_of(seed, changes), folder) in ("read", "refused")

    check()


def _npy_of(header):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


# inputs that once led to another error, or to several lines
ONCE = [
    ("labels", {"labels": [["0.png", 0], ["1.png", 1]], "num_classes": {}}),
    ("classifier header", {"architecture": {"img_resolution": 4, "img_channels": 3, "num_classes": 2, "width": 8},
                           "nimg": 8, "label_names": None, "format_version": 1}),
    ("labels", {"labels": [["0.png", 0], ["1.\ng", 1]], "label_names": ["cat", "dog"]}),
    ("npy", _npy_of("{" + "_" * 10099 + "}")),
    ("label vectors npy", _npy_of("{" + "_" * 10099 + "}")),
    ("array set", _npy_of("{'descr': '<f2', 'fortran_order': False, 'shape': (2, 0, 4, 4), }")),
    ("CIFAR archive", b"\x1f\x8b" + bytes(40)),
    ("Hugging Face info", {"features": {"image": {"_type": "Image"}, "other": {"dtype": "int64", "_type": "Value"}}}),
    ("preprocessing", {"size": 8, "resize": [], "value_range": [0, 1], "mean": [0, 0, 0], "std": [1, 1, 1]}),
    ("preprocessing", {"size": 8, "resize": "bicubic", "value_range": [0, 10**400], "mean": [0] * 3, "std": [1] * 3}),
    ("preprocessing", b"size: " + b"[" * 1000),
    ("generated npz", zip_of({"a\nb": b""})),
    ("pipeline index", {"unet": 5}),
    ("pipeline index", {"": 0}),
    ("pipeline index", {"\net": ["diffusers", "UNet2DConditionModel"]}),
    ("comparison points", {"asked": {}, "points": [{"first_seed": 0, "results": {}}]}),
    ("comparison points", {"asked": {"row": "auto", "options": "--guidance-method pag", "files": {}, "num_images": 100},
                           "points": [{"weight": weight, "first_seed": 0, "results": {}} for weight in (1.5, 2)]}),
    ("table cell", {"asked": {"num_images": 9}, "runs": {"x": {}}}),
    ("table cell", {"asked": {"num_images": 9, "a\nb": 1}, "runs": {}}),
    ("environment", b"SLURM_PROCID=0\nSLURM_NTASKS=8\nSLURM_NNODES=0"),
    ("environment", b"SLURM_PROCID=0\nSLURM_NTASKS=8\nSLURM_TASKS_PER_NODE=0"),
    ("environment", b"LOCAL_WORLD_SIZE=two"),
    ("YAML", b"a: !!bool maybe"),
    ("YAML", b"a: !!timestamp never"),
    ("YAML", b"a: !!int ''"),
    ("YAML", b"a: 2024-99-99"),
    *((name, b"[" * 100_000) for name in (
        "card", "comparison points", "encoder record", "generation record", "generation settings", "labels", "prompts",
        "resumed run", "search settings", "table cell", "toy record", "unfinished settings",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data"), ONCE, ids=[f"{k}-{name}" for k, (name, _) in enumerate(ONCE)])
def test_what_was_once_another_error_is_refused(seeds, name, data):
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    assert outcome(PARSERS[name], text, seeds[name][0]) == "refused"


@pytest.mark.parametrize("runs", [[{"seeds": 16}], [5], None, "deep"])
def test_a_damaged_record_of_generated_images_is_refused(tmp_path, runs):
    path = tmp_path / "generation.json"
    path.write_text("[" * 100_000 if runs == "deep" else json.dumps({"settings": {}, "runs": runs}))
    with pytest.raises(ValueError, match=r"generation\.json is damaged; choose another place"):
        read_record(path)


# what is damaged and left out, or made again, without a word
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("statistics", b"[" * 100_000),
        ("run statistics", b'{"nimg": ' + b"9" * 4000 + b"}"),
        ("run statistics", b'{"nimg": 1, "loss": ' + b"9" * 4000 + b"}"),
        ("run record", b'{"data_identity": {"num_images": 8, "holdout": {"num_images": []}}}'),
        ("run record", b'{"data_identity": {"num_images": 8, "holdout": {"num_images": 8}}}'),
        ("download note", b"[" * 100_000),
        ("compile times", b"[" * 100_000),
        ("Hugging Face state", None),
    ],
)
def test_damage_in_what_can_be_done_without_is_read_over(seeds, name, data):
    folder, [seed, *_] = seeds[name]
    if data is None:  # its columns are hidden by whoever saved it
        data = json.dumps({**seed, "_format_columns": ["label"]}).encode()
    assert outcome(PARSERS[name], data, folder) == "read"


def test_a_long_text_of_a_file_is_cut_when_it_is_printed():
    line = one_line(f"start\n{'x' * 100_000}\x1b[31m end")
    assert line.startswith(r"start\nxxx")
    assert line.endswith(r"\x1b[31m end")
    assert (len(line), line.isprintable()) == (2000, True)
    assert one_line("short\ttext") == r"short\ttext"


READS = re.compile(
    r"json\.loads?\(|read_json\(|yaml\.(safe_)?load\(|torch\.load\(|np\.load\(|safe_open\(|Image\.open\(|load_file\("
    r"|ZipFile\(|tarfile\.open\(|load_from_disk\("
)
# what reads files without a parser in benchmarks/fuzz.py, and why
WITHOUT = {
    "cli/output_kinds.py": "looks at a file that a command might replace",
    "cli/distill.py": "a command, which benchmarks must not import; run.json is read by run.py, too",
    "cli/generate.py": "a command; its images are read again, and made again if that fails",
    "cli/help_pages.py": "comes with the package",
    "ema/rebuild.py": "compares headers that are read",
    "experiments/demo/report.py": "its own records",
    "experiments/lite_features.py": "a record of the checkout",
    "experiments/paper_tables/plan.py": "JSON of its own making",
    "experiments/prompt_figures/figures.py": "its own settings and images",
    "experiments/compare_guidance/cost.py": "a run folder, whose files are read by folder.py, too",
    "experiments/toy/tree.py": "comes with the package",
    "integrations/edm2_pipeline.py": "a folder that diffusers loads",
    "metrics/detectors/registry.py": "weights, after their SHA-256",
    "models/diffusers_loading.py": "a file that diffusers and peft load",
    "torch_utils/safetensors_files.py": "bytes of its own making",
    "training/wandb_log.py": "its own note, made again if it is damaged",
}


def test_every_file_that_reads_files_has_a_parser_or_a_reason():
    fuzzed = "".join(file.read_text() for file in (PACKAGE.parent / "benchmarks").glob("fuzz_*.py"))
    imported = {
        f"{module.replace(chr(46), chr(47))}.py" for module in re.findall(r"from edm2kit\.([\w.]+) import", fuzzed)
    }
    reading = set()
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if READS.search(file.read_text(encoding="utf-8")) and not name.startswith("experiments/cifar10/"):
            reading.add(name)
    assert reading - imported - set(WITHOUT) - {f"torch_utils/{name}.py" for name in ("arrays", "cache")} == set()
    assert set(WITHOUT) <= reading, "these read no files any more"


def test_what_is_neither_read_nor_refused_is_noticed(tmp_path):
    def crash(data, folder):
        raise KeyError("a defect")

    def shout(data, folder):
        raise ValueError("one line\nand another")

    with pytest.raises(KeyError):
        outcome(Parser(lambda folder: [], crash), b"", tmp_path)
    with pytest.raises(AssertionError, match="several lines"):
        outcome(Parser(lambda folder: [], shout), b"", tmp_path)


def test_changes_change_something_and_nothing_else_than_the_input():
    seed, values = bytes(range(40)), {"a": [1, {"b": "c"}], "d": None}
    every = [Change(kind, place, value) for kind in range(12) for place in (0, 17, 39) for value in (0, 4, 9)]
    assert len({mutate(seed, [change]) for change in every}) > 30
    assert len({str(mutate_values(values, [change])) for change in every}) > 10
    assert values == {"a": [1, {"b": "c"}], "d": None}
    assert [] in ODD_VALUES  # nothing was put into it


def test_a_number_of_hundreds_of_digits_is_out_of_range(tmp_path):
    assert outcome(PARSERS["words"], b"1" * 400, tmp_path) in ("read", "refused")
