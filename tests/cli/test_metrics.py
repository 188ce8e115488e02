"""The command line calculate_metrics.py."""

import json
import pickle
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import generate
from edm2kit.cli import metrics as calculate_metrics
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import load_reference, save_reference
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import encoded, picture, some_files, write_folder, write_zip
from tests.support.tiny import run as run_script
from tests.support.tracing import files_called

NUM = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with real and other images, a reference of the real ones, and two networks."""
    folder = tmp_path_factory.mktemp("metrics")
    write_folder(folder / "real", some_files(NUM))
    write_zip(folder / "real.zip", some_files(NUM))
    write_folder(folder / "fake", {f"{k:06d}.png": encoded(picture(100 + k)) for k in range(NUM)})
    write_folder(folder / "three", some_files(3))
    tiny_snapshot(folder / "main")
    tiny_snapshot(folder / "guide", seed=1)
    assert run("ref", "--data", folder / "real", "--dest", folder / "ref.npz", "--metrics", "fd_random")[0] == 0
    return folder


def run(*arguments):
    """Exit code and everything printed."""
    result = CliRunner().invoke(calculate_metrics.main, [str(argument) for argument in arguments] + ["--device", "cpu"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def score(command, place, *arguments, num=NUM, ref="ref.npz", code=0):
    """The record of a run that must end with `code`; its output where that is not 0."""
    record = place / "record.json"
    record.unlink(missing_ok=True)
    found, output = run(command, "--ref", place / ref, "--num", num, "--record", record, *arguments)
    assert found == code, output
    assert record.exists() == (code == 0)
    return json.loads(record.read_text()) if code == 0 else output


def value(record):
    return record["results"]["fd_random"]["min"]


def network(place):
    return ["--net", place / "main", "--gnet", place / "guide", "--guidance", "2", "--steps", "2"]


def test_a_reference_records_what_made_it(place):
    reference = load_reference(place / "ref.npz")
    assert reference.num_images == NUM
    assert reference.source["data"] == str(place / "real")
    assert {"command", "commit", "torch", "hardware"} <= set(reference.source)


def test_folder_and_zip_score_alike_and_real_images_are_at_zero(place):
    fake = value(score("calc", place, "--images", place / "fake"))
    assert fake > 0
    for real in ("real", "real.zip"):
        assert value(score("calc", place, "--images", place / real)) < 1e-9 * fake


def test_record_holds_everything_that_made_the_value(place):
    record = score("calc", place, "--images", place / "fake", "--metrics", "fd_random")
    assert record["num_images"] == NUM
    assert record["seeds"] == [0]
    assert record["images"] == str(place / "fake")
    assert "fd_random" in record["detectors"]
    assert re.fullmatch(r"[0-9a-f]{64}", record["reference"]["sha256"])
    assert record["reference"]["num_images"] == NUM
    assert {"command", "started", "elapsed_sec", "commit", "python", "torch", "hardware", "processes"} <= set(record)


def test_a_distance_passes_through_few_files(place):
    line = ["calc", "--images", place / "fake", "--ref", place / "ref.npz", "--num", NUM, "--record", place / "r.json"]
    files = files_called(lambda: run(*line))
    assert "metrics/frechet.py" in files
    assert len(files) <= 18, files


@pytest.mark.parametrize("command", ["ref", "calc", "gen"])
def test_help_comes_in_sections_of_at_most_80_lines(command):
    shown = CliRunner().invoke(calculate_metrics.main, [command, "--help"]).output
    assert len(shown.splitlines()) <= 80
    assert "\nSpeed:\n" in shown
    assert "[default: 32]" in shown


def test_guided_images_score_the_same_in_memory_and_from_files(place, tmp_path):
    record = score("gen", place, *network(place), "--seed", "5")
    words = [*network(place), "--seeds", f"5-{5 + NUM - 1}", "--device", "cpu"]
    for output in (["--outdir", tmp_path / "png"], ["--npz", tmp_path / "images.npz"]):
        assert CliRunner().invoke(generate.main, [str(word) for word in [*words, *output]]).exit_code == 0
        written = score("calc", place, "--images", output[1])
        assert value(written) == pytest.approx(value(record), rel=1e-6)
    assert record["settings"]["guidance"]["weight"] == 2
    assert len(record["settings"]["gnet"]["sha256"]) == 64
    assert record["evaluations"] == {"per_image": 3, "each": "1 main + 1 guide"}  # two steps of Heun
    assert record["labels"]["classes"] == 4
    assert 1 <= record["labels"]["fewest_images"] <= NUM / 4 <= record["labels"]["most_images"] < NUM
    unguided = score("gen", place, "--net", place / "main", "--steps", 2, "--seed", "5")
    assert value(unguided) != value(record)


def test_several_seed_ranges_make_a_table(place, capsys):
    record = score("gen", place, *network(place), "--seed", f"0,{NUM},{2 * NUM}")
    found = record["results"]["fd_random"]
    assert list(found["values"]) == ["seeds 0-29", "seeds 30-59", "seeds 60-89"]
    values = list(found["values"].values())
    assert len(set(values)) == 3
    assert found["min"] == min(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    alone = score("gen", place, *network(place), "--seed", NUM)
    assert value(alone) == pytest.approx(values[1], rel=1e-6)


def test_the_table_is_printed(place):
    code, output = run("gen", "--ref", place / "ref.npz", "--num", 8, *network(place), "--seed", "0,8")
    assert code == 0
    lines = [line.split() for line in output.splitlines()]
    assert [line[0] for line in lines[-4:]] == ["seeds", "seeds", "min", "mean"]
    assert lines[-5] == ["fd_random"]


def test_a_seed_selects_a_subset(place):
    several = score("calc", place, "--images", place / "fake", "--seed", "0-2", num=20)
    values = list(several["results"]["fd_random"]["values"].values())
    assert len(set(values)) == 3
    assert value(score("calc", place, "--images", place / "fake", "--seed", "1", num=20)) == values[1]


def test_real_images_add_precision_and_coverage(place):
    names = [f"fd_random.{name}" for name in ("precision", "recall", "density", "coverage")]
    same = score("calc", place, "--images", place / "real", "--real", place / "real.zip")["results"]
    assert list(same) == ["fd_random", *names]
    assert [same[name]["min"] for name in names] == pytest.approx([1, 1, 1.2, 1])
    drawn = score("gen", place, *network(place), "--real", place / "real")["results"]
    assert all(drawn[name]["min"] < 0.5 for name in names)
    told = score("calc", place, "--images", place / "fake", "--real", place / "three", code=1)
    assert f"has 3 images; --num asks for {NUM}" in told


def test_two_ranks_see_the_same_neighbours(place, tmp_path):
    words = ["calc", "--images", place / "fake", "--ref", place / "ref.npz", "--real", place / "real", "--batch", 4]
    alone = score(words[0], place, *words[1:3], *words[5:])["results"]
    common = ["--num-images", NUM, "--device", "cpu", "--record", tmp_path / "record.json"]
    done = run_script("calculate_metrics.py", *words, *common, ranks=2)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "record.json").read_text())["results"]
    assert {name: found["min"] for name, found in together.items()} == pytest.approx(
        {name: found["min"] for name, found in alone.items()}, rel=1e-6
    )
    assert together["fd_random.density"]["min"] > 0


@pytest.mark.parametrize(("ranks", "num"), [(2, NUM), (4, 3)], ids=["shares", "an empty share"])
def test_ranks_score_as_one(place, tmp_path, ranks, num):
    job = ["calc", "--images", place / "fake"] if num == NUM else ["gen", *network(place)]
    alone = value(score(job[0], place, *job[1:], "--batch", 4, num=num))
    common = ["--ref", place / "ref.npz", "--batch", 4, "--device", "cpu", "--record", tmp_path / "record.json"]
    done = run_script("calculate_metrics.py", *job, "--num-images", num, *common, ranks=ranks)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["processes"] == ranks
    assert done.stdout.count(": fd_random") == 1
    # drawn in other batches, pixels differ by a level here and there; files are read in the same ones
    assert value(record) == pytest.approx(alone, rel=1e-12 if num == NUM else 1e-4)


def test_ranks_fail_together_naming_the_file(place, tmp_path):
    folder = write_folder(tmp_path / "images", some_files(8))
    name = list(some_files(8))[-1]
    (folder / name).write_bytes(b"no image")
    done = run_script(
        "calculate_metrics.py", "ref", "--data", folder, "--dest", tmp_path / "ref.npz", "--metrics", "fd_random",
        "--batch", 1, "--device", "cpu", ranks=2,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"{name}: is not an image" in done.stderr
    assert not (tmp_path / "ref.npz").exists()


def test_reference_of_ranks_is_that_of_one(place, tmp_path):
    done = run_script(
        "calculate_metrics.py", "ref", "--data", place / "real", "--dest", tmp_path / "ref.npz", "--batch", 4,
        "--metrics", "fd_random", "--device", "cpu", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run("ref", "--data", place / "real", "--dest", tmp_path / "one.npz", "--metrics", "fd_random", "--batch", 4)
    one, two = (load_reference(tmp_path / name).of("fd_random") for name in ("one.npz", "ref.npz"))
    np.testing.assert_allclose(two.mean, one.mean, rtol=1e-13)
    np.testing.assert_allclose(two.covariance, one.covariance, rtol=0, atol=1e-14)


def test_grey_and_colour_images_may_be_mixed(place, tmp_path):
    folder = write_folder(tmp_path / "mixed", some_files(NUM))
    for file in list(folder.rglob("*.png"))[:5]:
        with Image.open(file) as image:
            image.convert("L").save(file)
    assert value(score("calc", place, "--images", folder)) > 0


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["calc", "--images", "none", "--ref", "ref.npz"], 1, "none: no such file"),
        (["calc", "--images", "fake", "--ref", "none.npz", "--num", "30"], 1, "none.npz: no such file"),
        (["calc", "--images", "fake", "--ref", "ref.npz"], 1, "has 30 images, but --num asks for 50000"),
        (["calc", "--images", "fake", "--ref", "ref.npz", "--num", "1"], 2, "1 is not at least 2"),
        (["calc", "--images", "fake", "--ref", "ref.npz", "--num", "30", "--seed", "0,1"], 1, "selects the same"),
        (["calc", "--images", "fake", "--ref", "main", "--num", "30"], 1, "does not contain reference statistics"),
        (["calc", "--images", "fake", "--ref", "ref.npz", "--num", "30", "--metrics", "fid"], 1, "has no fid"),
        (["calc", "--images", "fake", "--ref", "ref.npz", "--metrics", "fdrandom"], 2, "did you mean fd_random"),
        (["calc", "--images", "fake"], 2, "--ref"),
        (["gen", "--ref", "ref.npz"], 2, "give --net, or --preset"),
        (["gen", "--ref", "ref.npz", "--net", "none"], 1, "none"),
        (["gen", "--ref", "ref.npz", "--net", "main", "--seed", "0,100", "--num", "200"], 2, "starts at 200"),
        (["gen", "--ref", "ref.npz", "--net", "main", "--seed", "5,5", "--num", "20"], 2, "starts at 25"),
        (["gen", "--ref", "ref.npz", "--net", "main", "--gnet", "guide"], 2, "needs a weight"),
        (["ref", "--data", "real", "--dest", "x.json"], 2, "an .npz or a .pkl"),
        (["ref", "--data", "real", "--dest", "x.pkl", "--metrics", "fid,fd_random"], 1, "fd_dinov2, not fd_random"),
        (["ref", "--data", "empty", "--dest", "x.npz", "--metrics", "fd_random"], 1, "contains no images"),
    ],
)
def test_wrong_input_is_reported_in_one_line(place, monkeypatch, words, code, reason):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    found, output = run(*words)
    assert found == code, output
    lines = output.strip().splitlines()
    assert reason in lines[-1]
    assert lines[-1].startswith("Error: ")
    assert not (place / "x.npz").exists()


def test_another_detector_is_refused_before_images_are_made(place):
    reference = load_reference(place / "ref.npz")
    other = type(reference.of("fd_random"))(
        *[getattr(reference.of("fd_random"), n) for n in ("mean", "covariance")], "x"
    )
    save_reference(place / "other.npz", type(reference)(NUM, {"fd_random": other}))
    assert "another detector" in score("gen", place, *network(place), ref="other.npz", code=1)


def test_missing_weights_are_reported_offline(place, monkeypatch, tmp_path):
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    code, output = run("ref", "--data", place / "real", "--dest", place / "x.npz")
    assert code == 1
    assert "fid needs pt_inception-2015-12-05-6726825d.pth" in output
    assert "--weights-dir" in output


def test_all_metrics_of_a_pass_are_recorded_with_intervals(place):
    record = score(
        "calc", place, "--images", place / "fake", "--real", place / "real", "--heldout", place / "real.zip",
        "--metrics", "all,fd_random.mmd",
    )  # fmt: skip
    names = ["precision", "recall", "density", "coverage", "kid", "mmd", "mind", "fd_infinity", "vendi", "authpct"]
    assert list(record["results"]) == ["fd_random", *(f"fd_random.{name}" for name in names)]
    for name, entry in record["results"].items():
        low, high = record["intervals"][name]["selection 0"]
        assert low <= entry["min"] <= high
    assert record["cautions"] == {"fd_random": "not FID; compares only with itself"}


def test_classes_of_real_and_generated_images_may_agree(place, tmp_path):
    files = {f"{k % 2}/img{k:08d}.png": encoded(picture(k)) for k in range(NUM)}
    write_folder(tmp_path / "labelled", files)
    words = ["calc", place, "--images", tmp_path / "labelled", "--real", tmp_path / "labelled", "--metrics"]
    record = score(*words, "knn_agreement")
    assert 0.3 < record["results"]["fd_random.knn_agreement"]["min"] <= 1
    assert "fd_random.knn_agreement" in score(*words, "all")["results"]
    words[3] = place / "fake"
    assert "needs the classes" in score(*words, "knn_agreement", code=1)


def test_what_cannot_be_computed_is_left_out_of_all_but_refused_by_name(place):
    words = ["calc", place, "--images", place / "fake", "--real", place / "real", "--heldout", place / "real.zip"]
    assert "fd_random.ct" not in score(*words, "--metrics", "all")["results"]
    assert "no cell with 20 generated" in score(*words, "--metrics", "ct", code=1)


def test_every_number_carries_its_caution_and_interval(place):
    code, output = run("calc", "--images", place / "fake", "--ref", place / "ref.npz", "--num", NUM)
    assert code == 0
    assert "fd_random: not FID; compares only with itself" in output
    assert re.search(r"selection 0: fd_random [\d.]+ \[[\d.]+, [\d.]+\]", output)
    _, plain = run("calc", "--images", place / "fake", "--ref", place / "ref.npz", "--num", NUM, "--bootstrap", 0)
    assert re.search(r"selection 0: fd_random [\d.]+$", plain, re.MULTILINE)


def test_several_references_make_several_columns(place):
    assert run("ref", "--data", place / "fake", "--dest", place / "fake.npz", "--metrics", "fd_random")[0] == 0
    record = score("calc", place, "--images", place / "fake", "--ref", place / "fake.npz")
    assert list(record["results"]) == ["fd_random", "fd_random@fake.npz"]
    assert record["results"]["fd_random@fake.npz"]["min"] < 1e-9 < value(record)
    assert [one["path"] for one in record["more_references"]] == [str(place / "fake.npz")]


def test_a_metric_without_its_images_is_refused_before_images_are_made(place):
    told = score("gen", place, "--net", place / "main", "--metrics", "fd_random.kid", code=1)
    assert "kid needs real images; give --real PATH" in told


@pytest.mark.parametrize("metrics", ["fd_random", "all"])
def test_ranks_and_batches_give_the_same_bits(place, tmp_path, metrics):
    words = ["calc", "--images", place / "fake", "--real", place / "real", "--metrics", metrics]
    alone = score(*[words[0], place, *words[1:]], "--batch", 30)
    done = run_script(
        "calculate_metrics.py", *words, "--ref", place / "ref.npz", "--num-images", NUM, "--batch", 4,
        "--device", "cpu", "--record", tmp_path / "record.json", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "record.json").read_text())
    assert together["results"] == alone["results"]
    assert together["intervals"] == alone["intervals"]


def test_the_card_is_written_as_markdown_beside_the_record(place):
    score("calc", place, "--images", place / "fake")
    card = (place / "record.md").read_text()
    assert re.search(r"\| fd_random \| [\d.]+ \| [\d.]+ to [\d.]+ \| not FID; compares only with itself \|", card)
    for name in ("num_images", "reference.sha256", "detectors.fd_random", "torch", "hardware"):
        assert f"| {name} |" in card


def test_adm_reference_batches_need_both_statistics(place):
    code, output = run(
        "ref", "--data", place / "real", "--dest", place / "x.npz", "--metrics", "fd_random", "--adm", place / "a.npz"
    )
    assert code == 2
    assert "needs the statistics of fid and sfid" in output


def test_images_of_an_adm_batch_are_scored(place):
    pixels = [np.asarray(picture(100 + k)) for k in range(NUM)]
    np.savez(place / "adm.npz", arr_0=np.stack(pixels))
    assert value(score("calc", place, "--images", place / "adm.npz")) == value(
        score("calc", place, "--images", place / "fake")
    )


def test_a_pkl_is_written_for_the_original_program(place, monkeypatch, tmp_path):
    # the detector of fid needs a download; its statistics stand for themselves
    rng = np.random.default_rng(0)
    mean, covariance = rng.normal(size=2048), np.diag(rng.uniform(size=2048))
    statistics = {"fid": FeatureStatistics(mean, covariance, DETECTORS["fid"].fingerprint)}
    monkeypatch.setattr(calculate_metrics, "load_detectors", lambda *arguments: [])
    monkeypatch.setattr(calculate_metrics, "image_statistics", lambda *arguments: (NUM, statistics))
    path = tmp_path / "x.pkl"
    for _ in range(2):  # the second one replaces the first
        code, output = run("ref", "--data", place / "real", "--dest", path, "--metrics", "fid")
        assert code == 0, output
    content = pickle.loads(path.read_bytes())
    assert content["num_images"] == NUM
    assert np.array_equal(content["fid"]["sigma"], covariance)
    other = tmp_path / "network.pkl"
    other.write_bytes(pickle.dumps({"ema": 1}))
    code, output = run("ref", "--data", place / "real", "--dest", other, "--metrics", "fid")
    assert code == 2
    assert "is not a set of reference statistics" in output
