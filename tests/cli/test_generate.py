"""The command line generate.py."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import generate, npz
from edm2kit.cli.field_options import default_text
from edm2kit.cli.generation import Request, prepare
from edm2kit.guidance.reuse import Reuse
from edm2kit.sampling.engine import Engine
from edm2kit.sampling.restart import Restart
from edm2kit.sampling.solvers import Churn, Sampler, TimeTravel
from tests.support import ROOT
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import cell

NAMES = ("cat", "dog", "fish", "goldfish")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    tiny_snapshot(folder / "main", label_names=NAMES)
    tiny_snapshot(folder / "guide", seed=1, label_names=NAMES)
    tiny_snapshot(folder / "large", img_resolution=16)
    tiny_snapshot(folder / "grey", img_channels=1, label_dim=0)
    (folder / "cut").write_bytes((folder / "main").read_bytes()[:3000])
    return folder


def run(*arguments, net=None):
    """Exit code and everything printed."""
    words = [str(argument) for argument in arguments]
    command = ["--net", str(net), "--steps", "3", "--device", "cpu", *words]
    result = CliRunner().invoke(generate.main, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.rglob("*.png"))}


def assert_within_one_level(one, other):
    assert list(one) == list(other)
    assert max(int(np.abs(one[name] - other[name]).max()) for name in one) <= 1


def guided(nets):
    return ("--gnet", nets / "guide", "--guidance", "2.1", "--S_churn", "2")


def torchrun(ranks, *arguments, command=("generate.py",)):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [str(argument) for argument in arguments]
    done = subprocess.run([*launcher, *command, *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_png_per_seed_and_a_record_of_what_made_them(nets, tmp_path):
    code, output = run(*guided(nets), "--seeds", "0-2,7", "--outdir", tmp_path, net=nets / "main")
    assert code == 0, output
    assert sorted(pixels(tmp_path)) == ["000000.png", "000001.png", "000002.png", "000007.png"]
    assert all(image.shape == (8, 8, 3) for image in pixels(tmp_path).values())
    record = json.loads((tmp_path / "generation.json").read_text())
    assert record["settings"]["guidance"]["weight"] == 2.1
    assert len(record["settings"]["gnet"]["sha256"]) == 64
    assert record["settings"]["sampler"]["num_steps"] == 3
    (made,) = record["runs"]
    assert made["seeds"] == "0-2,7"
    assert {"command", "started", "commit", "torch", "hardware", "processes"} <= set(made)


def test_the_batch_does_not_matter(nets, tmp_path):
    for size in (1, 8):
        arguments = (*guided(nets), "--seeds", "0-8", "--batch", size, "--outdir", tmp_path / str(size))
        assert run(*arguments, net=nets / "main")[0] == 0
    assert_within_one_level(pixels(tmp_path / "1"), pixels(tmp_path / "8"))
    assert len({image.tobytes() for image in pixels(tmp_path / "1").values()}) == 9


def test_one_image_at_a_time_is_the_same_to_the_last_bit_in_any_company(nets, tmp_path):
    for name, seeds in (("all", "0-8"), ("some", "7,3")):
        arguments = (*guided(nets), "--seeds", seeds, "--batch", 1, "--outdir", tmp_path / name)
        assert run(*arguments, net=nets / "main")[0] == 0
    for seed in (3, 7):
        files = [tmp_path / name / f"{seed:06d}.png" for name in ("all", "some")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow  # two processes under torchrun
def test_one_image_at_a_time_is_the_same_to_the_last_bit_on_one_rank_and_on_two(nets, tmp_path):
    arguments = (*guided(nets), "--seeds", "0-4", "--batch", "1", "--net", nets / "main", "--steps", "3")
    for ranks in (1, 2):
        torchrun(ranks, *arguments, "--device", "cpu", "--outdir", tmp_path / str(ranks))  # both with one thread
    for seed in range(5):
        files = [tmp_path / str(ranks) / f"{seed:06d}.png" for ranks in (1, 2)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_two_ranks_generate_the_images_of_one(nets, tmp_path):
    arguments = (*guided(nets), "--seeds", "0-4", "--batch", "2")
    assert run(*arguments, "--outdir", tmp_path / "one", net=nets / "main")[0] == 0
    common = ("--net", nets / "main", "--steps", "3", "--device", "cpu")
    torchrun(2, *common, *arguments, "--outdir", tmp_path / "two", "--grid", tmp_path / "sheet.png")
    assert_within_one_level(pixels(tmp_path / "one"), pixels(tmp_path / "two"))
    classes = [
        [Image.open(path).info["class"] for path in sorted((tmp_path / n).glob("*.png"))] for n in ("one", "two")
    ]
    assert classes[0] == classes[1]
    assert Image.open(tmp_path / "sheet.png").size[0] == 3 * (128 + 4) + 4


def test_a_rank_without_work_waits_for_the_others(nets, tmp_path):
    arguments = ("--net", nets / "main", "--steps", "3", "--device", "cpu", "--seeds", "0-2")
    output = torchrun(4, *arguments, "--npz", tmp_path / "three.npz", command=("-m", "edm2kit.cli.generate"))
    assert output.count("Network:") == 1
    with np.load(tmp_path / "three.npz") as arrays:
        assert arrays["images"].shape == (3, 8, 8, 3)
        assert arrays["seeds"].tolist() == [0, 1, 2]
    assert sorted(contents(tmp_path)) == ["three.npz", "three.npz.json"]


def test_a_second_run_writes_only_missing_images(nets, tmp_path, monkeypatch):
    arguments = ("--seeds", "0-5", "--outdir", tmp_path)
    assert run(*arguments, net=nets / "main")[0] == 0
    first = contents(tmp_path)
    drawn = []
    draw = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, seeds: drawn.append(list(seeds)) or draw(self, seeds))
    code, output = run(*arguments, net=nets / "main")
    assert code == 0
    assert "Skipping 6 of 6 images that already exist" in output
    assert contents(tmp_path) == first

    (tmp_path / "000002.png").write_bytes(first["000002.png"][:-25])
    (tmp_path / "000004.png").unlink()
    (tmp_path / "000000.png").write_bytes(first["000001.png"])  # the image of another seed
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "000005.png", "JPEG")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "000001.png", tmp_path / "000003.png")}
    assert run(*arguments, net=nets / "main")[0] == 0
    assert drawn == [[0, 1, 2, 3, 4, 5]]  # in the batch in which they were
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = contents(tmp_path)
    assert {name: again[name] for name in first if name.endswith("png")} == {
        name: data for name, data in first.items() if name.endswith("png")
    }


def test_an_interrupted_run_continues(nets, tmp_path, monkeypatch):
    arguments = ("--seeds", "0-5", "--batch", "2", "--npz", tmp_path / "six.npz")
    draw = Engine.generate

    def fail_late(self, seeds):
        if 4 in seeds:
            raise OSError("the power went out")
        return draw(self, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", fail_late)
        code, output = run(*arguments, net=nets / "main")
    assert (code, output.strip().splitlines()[-1]) == (1, "Error: the power went out")  # below the progress bar
    code, output = run(*arguments, net=nets / "main")
    assert code == 0
    assert "Skipping 4 of 6 images that already exist" in output
    left = [tmp_path / f".{name}.0123456789ab.tmp" for name in ("six.npz", "another.npz")]  # by killed processes
    for path in left:
        path.write_bytes(b"half of it")
    assert "already holds these images" in run(*arguments, net=nets / "main")[1]
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(("repeats", "batches"), [(True, [(0, 1, 2), (3, 4, 5)]), (False, [(1, 5)])])
def test_batches_are_repeated_as_they_were_where_that_gives_the_same_bits(
    nets, tmp_path, monkeypatch, repeats, batches
):
    arguments = ("--seeds", "8,0-7", "--batch", "3", "--precision", "bf16", "--outdir", tmp_path)
    assert run(*arguments, net=nets / "main")[0] == 0
    before = contents(tmp_path)
    for seed in (1, 5):
        (tmp_path / f"{seed:06d}.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    made, draw = [], Engine.generate

    def noted(self, seeds):
        made.append(tuple(seeds))
        return draw(self, seeds)

    monkeypatch.setattr(Engine, "generate", noted)
    monkeypatch.setattr(generate.dist, "repeats_bits", lambda device: repeats)
    code, output = run(*arguments, net=nets / "main")
    assert code == 0
    assert ("Generating 4 of them again without writing them" in output) == repeats
    assert made == batches
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not written again
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    if repeats:
        assert {name for name in before if after[name] != before[name]} == {"generation.json"}


@pytest.mark.parametrize("last", ["write_json", "remove_parts"])
def test_a_process_killed_while_it_packs_an_npz_is_followed_by_one_that_completes_it(nets, tmp_path, monkeypatch, last):
    arguments = ("--seeds", "0-2", "--npz", tmp_path / "three.npz")

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(npz, last, die)
        assert run(*arguments, net=nets / "main")[0] == 1
    assert (tmp_path / "three.npz.parts").exists()
    assert run(*arguments, net=nets / "main")[0] == 0
    assert sorted(contents(tmp_path)) == ["three.npz", "three.npz.json"]
    assert not (tmp_path / "three.npz.parts").exists()
    (tmp_path / "three.npz.json").unlink()  # by hand, so that nothing says how the images were made
    assert "but its record three.npz.json does not" in run(*arguments, net=nets / "main")[1]


def test_other_settings_are_refused_until_overwritten(nets, tmp_path):
    arguments = (*guided(nets), "--seeds", "0-3", "--outdir", tmp_path)
    assert run(*arguments, net=nets / "main")[0] == 0
    first = contents(tmp_path)
    changed = ("--seeds", "0-1", "--outdir", tmp_path, "--gnet", nets / "guide", "--guidance", "3")
    code, output = run(*changed, net=nets / "main")
    assert code == 1
    assert "guidance.weight 2.1, now 3.0" in output
    assert contents(tmp_path) == first
    assert run(*changed, "--overwrite", net=nets / "main")[0] == 0
    assert sorted(contents(tmp_path)) == ["000000.png", "000001.png", "generation.json"]
    assert contents(tmp_path)["000000.png"] != first["000000.png"]


def test_writers_of_the_same_settings_share_a_folder_and_lose_no_record(tmp_path):
    folders = [generate.ImageFolder(tmp_path, False, {"steps": 3}) for _ in range(4)]

    def write(folder, number):
        with folder.held(alone=False):
            folder.claim([number], overwrite=False)
            folder.note_run({"seeds": str(number)})

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(write, folders[k % 4], k) for k in range(12)]:
            job.result()
    record = json.loads((tmp_path / "generation.json").read_text())
    assert sorted(int(run["seeds"]) for run in record["runs"]) == list(range(12))
    assert [path.name for path in tmp_path.iterdir()] == ["generation.json"]


def test_writers_of_other_settings_and_those_who_overwrite_are_refused_while_a_folder_is_written(nets, tmp_path):
    with generate.ImageFolder(tmp_path, False, {"steps": 2}).held(alone=False):
        code, output = run("--seeds", "0", "--outdir", tmp_path, "--overwrite", net=nets / "main")
        assert (code, output.count("is being written by another run")) == (1, 1)
    first = generate.ImageFolder(tmp_path, False, {"steps": 2})
    with first.held(alone=False):
        first.claim([0], overwrite=False)  # no image yet
        code, output = run("--seeds", "1", "--outdir", tmp_path, net=nets / "main")
        assert (code, output.count("holds images made with other settings")) == (1, 1)
        assert not list(tmp_path.glob("*.png"))
    with generate.ImageFolder(tmp_path / "a.npz.parts", False, {}).held(alone=True):
        code, output = run("--seeds", "1", "--npz", tmp_path / "a.npz", net=nets / "main")
        assert (code, output.count("is being written by another run")) == (1, 1)


def test_what_killed_writers_left_is_removed(nets, tmp_path):
    leftovers = [
        tmp_path / name for name in (".generation.json.0123456789ab.tmp", "000000/.000001.png.0123456789ab.tmp")
    ]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert run("--seeds", "0", "--subdirs", "--outdir", tmp_path, net=nets / "main")[0] == 0
    assert sorted(contents(tmp_path)) == ["000000/000000.png", "generation.json"]


def test_what_a_killed_writer_of_one_file_left_is_removed(nets, tmp_path):
    (tmp_path / ".a.npz.0123456789ab.tmp").write_bytes(b"half")
    assert run("--seeds", "0", "--npz", tmp_path / "a.npz", net=nets / "main")[0] == 0
    assert sorted(contents(tmp_path)) == ["a.npz", "a.npz.json"]


def test_the_folder_for_unfinished_images_is_never_somebody_elses(nets, tmp_path):
    other = tmp_path / "a.npz.parts" / "thesis.tex"
    other.parent.mkdir()
    other.write_text("years of work")
    code, output = run("--seeds", "0", "--npz", tmp_path / "a.npz", net=nets / "main")
    assert (code, output.count("holds other files; move it")) == (1, 1)
    assert other.read_text() == "years of work"
    code, output = run("--seeds", "0", "--npz", tmp_path / "b", "--grid", tmp_path / "b", net=nets / "main")
    assert (code, output.count("--npz and --grid both name")) == (1, 1)


def test_an_npz_of_other_settings_or_seeds_or_with_a_flipped_bit_is_refused(nets, tmp_path):
    file = tmp_path / "all.npz"
    assert run("--seeds", "0-1", "--npz", file, net=nets / "main")[0] == 0
    for arguments, wrong in (
        (("--seeds", "0-2"), "holds other seeds"),
        (("--seeds", "0-1", "--steps", "4"), "sampler.num_steps 3, now 4"),
    ):
        code, output = run(*arguments, "--npz", file, net=nets / "main")
        assert code == 1
        assert wrong in output
    assert run("--seeds", "0-2", "--npz", file, "--overwrite", net=nets / "main")[0] == 0
    assert np.load(file)["seeds"].tolist() == [0, 1, 2]
    data = bytearray(file.read_bytes())
    data[300] ^= 1  # within the pixels
    file.write_bytes(data)
    code, output = run("--seeds", "0-2", "--npz", file, net=nets / "main")
    assert (code, "all.npz is damaged (its entry 'images.npy' does not match its checksum)" in output) == (1, True)


def test_classes_cycle_by_seed_and_have_names(nets, tmp_path):
    code, output = run("--class", "goldfish,1", "--seeds", "0-3", "--npz", tmp_path / "a.npz", net=nets / "main")
    assert code == 0
    assert "3 (goldfish), 1 (dog)" in output
    assert np.load(tmp_path / "a.npz")["labels"].tolist() == [3, 1, 3, 1]
    assert run("--balanced", "--seeds", "6-9", "--npz", tmp_path / "b.npz", net=nets / "main")[0] == 0
    assert np.load(tmp_path / "b.npz")["labels"].tolist() == [2, 3, 0, 1]


def test_grey_images_without_classes(nets, tmp_path):
    arguments = ("--seeds", "0-1,1500", "--outdir", tmp_path / "out", "--subdirs", "--grid", tmp_path / "sheet.png")
    assert run(*arguments, net=nets / "grey")[0] == 0
    image = Image.open(tmp_path / "out" / "001000" / "001500.png")
    assert (image.mode, image.size) == ("L", (8, 8))
    assert "class" not in image.info
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.ndim == 2
    assert np.array_equal(cell(sheet, 2, 1, 0, 8), np.asarray(image))
    assert (sheet[:20] < 128).any()  # the title


def test_a_grid_has_a_column_per_weight(nets, tmp_path):
    guided = ("--gnet", nets / "guide", "--guidance", "3", "--seeds", "5,6")
    columns = ("--grid", tmp_path / "sheet.png", "--grid-weights", "1,2.5")
    assert run(*guided, *columns, net=nets / "main")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for column, weight in enumerate(("1", "2.5")):
        out = tmp_path / weight
        assert run(*guided, "--guidance", weight, "--outdir", out, net=nets / "main")[0] == 0
        for row, seed in enumerate((5, 6)):
            image = np.asarray(Image.open(out / f"{seed:06d}.png"))
            assert np.array_equal(cell(sheet, 2, row, column, 8), image)
    assert not np.array_equal(cell(sheet, 2, 0, 0, 8), cell(sheet, 2, 0, 1, 8))

    kept = ("--outdir", tmp_path / "kept")
    assert run(*guided, *columns, *kept, net=nets / "main")[0] == 0
    assert (tmp_path / "kept" / "weight-2.5" / "000005.png").exists()
    assert "already exist" in run(*guided, *columns, *kept, net=nets / "main")[1]


@pytest.mark.parametrize("net", ["main", "grey"])
def test_pixels_are_those_of_the_engine(nets, tmp_path, net):
    assert run("--seeds", "3", "--outdir", tmp_path, net=nets / net)[0] == 0
    batch = prepare(Request(str(nets / net), sampler=Sampler(3)), torch.device("cpu")).engine.generate([3])
    made = np.asarray(Image.open(tmp_path / "000003.png")).reshape(8, 8, -1)
    assert np.array_equal(made, batch.images[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("arguments", "code", "wrong"),
    [
        ("--outdir OUT --net NETS/absent", 1, "absent"),
        ("--outdir OUT --net NETS/cut", 1, "cut"),
        ("--outdir OUT --gnet NETS/large --guidance 2", 1, "resolution is 16, the main network's 8"),
        ("--outdir OUT --gnet NETS/guide", 2, "give --guidance W"),
        ("--outdir OUT --guidance 2", 2, "give --gnet"),
        ("--outdir OUT --class 4", 1, "class 4 is out of range; the network has classes 0 to 3"),
        ("--outdir OUT --class goldfsh", 1, "did you mean 'goldfish'"),
        ("--outdir OUT --seeds 5-3", 2, "runs backwards"),
        ("--outdir OUT --seeds 1,x", 2, "'x' is neither a number nor a range"),
        ("--outdir OUT --seeds 1,0-2", 2, "names 1 more than once"),
        ("--outdir OUT --sigma_min 0", 1, "sigma_min is 0"),
        ("--outdir OUT --steps 1000000000", 1, "steps is 1000000000; expected 1 to 100000"),
        ("--outdir OUT --seeds 0-2000 --grid OUT/g.png", 2, "at most 1024"),
        ("--outdir OUT --grid-weights 1,2", 2, "--grid-weights goes with --grid"),
        ("--grid OUT.png --grid-weights 1,2", 2, "--grid-weights needs guidance"),
        ("--grid OUT.png --grid-weights 1,x", 2, "'1,x' is not a list of guidance weights"),
        ("--grid OUT.png --grid-weights 1,2,1", 2, "names a weight more than once"),
        ("--grid OUT.png --grid-weights 1,inf", 2, "has a weight that is not finite"),
        ("--outdir OUT --device tpu", 1, "not available here"),
        ("--outdir OUT --npz OUT.npz", 2, "give one of --outdir"),
        ("", 2, "give one of --outdir"),
        ("--npz OUT.npz --subdirs", 2, "--subdirs goes with --outdir"),
        ("--outdir NETS/main", 2, "is a file"),
    ],
)
def test_wrong_input_is_one_clear_line_and_leaves_nothing(nets, tmp_path, arguments, code, wrong):
    words = [word.replace("OUT", str(tmp_path / "out")).replace("NETS", str(nets)) for word in arguments.split()]
    result, output = run(*words, net=nets / "main")
    assert result == code
    (line,) = [line for line in output.splitlines() if line.startswith("Error:")]
    assert wrong in line
    assert list(tmp_path.iterdir()) == []


def test_help_fits_on_two_screens_in_sections_with_everyday_options_first():
    lines = CliRunner().invoke(generate.main, ["--help"]).output.splitlines()
    assert len(lines) < 80
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Networks:", "Seeds and output:", "Guidance:", "Sampler:", "Other:"]
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    for title, first in (("Networks:", ["--net", "--gnet"]), ("Seeds and output:", ["--seeds", "--outdir", "--class"])):
        start = lines.index(title) + 1
        assert [line.split()[0] for line in lines[start : start + len(first)]] == first
    assert options.index("--guidance") < options.index("--S_churn")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Request, ["--help", "--help-diffusers"]),
        (Sampler, ["--help"]),
        (Churn, ["--help"]),
        (Reuse, ["--help"]),
        (TimeTravel, ["--help-solver", "time-travel"]),
        (Restart, ["--help-solver", "restart"]),
    ],
)
def test_help_says_what_the_fields_say_with_their_defaults(config, words):
    pages = [words] if config is not Request else [[word] for word in words]
    shown = " ".join(" ".join(CliRunner().invoke(generate.main, page).output.split()) for page in pages)
    for field in dataclasses.fields(config):
        if "option" in field.metadata:
            assert field.metadata["option"] in shown
            default = "" if field.default is False else default_text(field)  # flags show none
            end = f" [default: {default}]" if default else ""
            assert f"{field.metadata['help']}{end}" in shown
