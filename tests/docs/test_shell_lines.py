"""Every command of README and docs: the real command parses it, and a test runs it at a tiny size or says why not."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import edm2kit
from edm2kit.experiments.demo import pictures
from edm2kit.metrics.reference import save_reference
from edm2kit.snapshots.file_format import save_snapshot
from tests.data.test_cifar import batch, meta, write_tar
from tests.docs.shell_lines import PAGES, ShellLine, click_command, parse, shell_lines
from tests.docs.support import code_blocks, page
from tests.support import ROOT
from tests.support.fakes import tiny_snapshot, tiny_vae
from tests.support.tiny import make_dataset, write_config
from tests.support.tuning import make_run

# the start of a command -> why no test runs it as it stands; all are parsed
NOT_RUN = {
    "pip install": "installs packages",
    "git clone": "needs the network",
    "cd edm2kit": "belongs to git clone",
    "source .venv": "changes the shell only",
    "pre-commit install": "changes the hooks of the clone",
    "python -m pytest": "runs tests",
    "EDM2KIT_GPU_TESTS=1 python -m pytest": "runs tests on a GPU",
    "bash scripts/test.sh": "runs all tests",
    "bash scripts/demo.sh": "takes minutes; `bash scripts/demo.sh --tiny` runs the same steps",
    "bash benchmarks/": "measures for minutes on an idle machine, or on a GPU",
    "python generate.py --preset edm2-img512-s-autog-fid": "downloads 1.6 GB",
    "python generate.py --net diffusers:": "downloads; tests/cli/test_diffusers_networks.py runs such commands",
    "python scripts/reproduce.py run": "downloads, and takes GPU-hours; tests/cli/test_reproduce.py",
    "python scripts/reproduce.py download": "downloads; tests/cli/test_reproduce.py",
    "torchrun --standalone --nproc-per-node 8 scripts/reproduce.py run": "downloads, and takes GPU-hours",
    "python scripts/reproduce.py figure": "downloads; tests/cli/test_reproduce_figure.py runs it with tiny networks",
    "python scripts/reproduce.py plan --table autoguidance-1 --measure": "measures for minutes on a GPU",
    "python scripts/reproduce.py report": "reports runs that take GPU-hours; tests/cli/test_reproduce.py",
    "python -m edm2kit.experiments.lite_features": "large data; tests/experiments/test_lite_features.py measures",
    "python scripts/toy_example.py": "trains for minutes; tests/cli/test_toy.py runs it at a small size",
    "python scripts/measure_solvers.py": "minutes; tests/experiments/solvers measures at a small size",
    "python scripts/cifar10_study.py": "hours; tests/experiments/cifar10 runs the steps at a small size",
    "python scripts/demo_report.py": "needs the results of the demo, and changes documents",
    "python scripts/write_documents.py": "changes documents; tests/scripts/test_write_documents.py runs it elsewhere",
    "python -m edm2kit.experiments.tune.exhaustive": "takes hours",
    "python train.py --config experiments/tune/": "takes minutes; other pages run train.py",
    "python scripts/compare_guidance.py": "takes hours, and changes documents; tests/cli/test_compare.py runs it",
    "python calculate_metrics.py ref --data cifar10-train.zip": "belongs to a study of hours",
    "python scripts/convert_snapshot.py --source edm2-": "downloaded; tests/snapshots/test_published.py converts",
    "python scripts/convert_snapshot.py --source raw-": "downloaded; tests/snapshots/test_published.py converts",
    "python reconstruct_phema.py --indir raw-snapshots": "downloaded; tests/cli/test_phema.py rebuilds",
}
PRINTED = "tests/cli/test_advice.py::test_the_printed_commands_run_as_they_are"
# (page, start of commands) -> the test that runs them
ELSEWHERE = {
    ("README.md", "bash runs/"): PRINTED,
    ("experiments/own_images/README.md", "bash runs/"): PRINTED,
    ("docs/own-images.md", "python train.py --config runs/photos/main.yaml"): PRINTED,
    ("docs/clusters.md", ""): "tests/docs/test_clusters.py::test_every_command_of_the_page_runs",
    ("docs/runs.md", "python train.py doctor"): "tests/cli/test_doctor.py::test_images_that_the_run_did_not_see",
    ("docs/runs.md", "python scripts/report.py"): "tests/experiments/runs/test_report.py::"
    "test_the_command_writes_beside_the_run_or_where_it_is_told",
    ("docs/runs.md", "python train.py --preset cifar10"): "tests/training/test_heldout_loss.py::"
    "test_the_weights_are_those_of_a_run_on_the_other_images_alone",
    ("docs/extend.md", "python"): "tests/docs/test_extend.py::test_the_method_and_the_rule_change_the_images",
}  # fmt: skip
UNPARSED = ("git", "cd", "bash", "source", "pip", "pre-commit", "sbatch", "srun", "mpirun", "mpiexec", "docker",
            "apptainer", "wandb", "for", "test")  # fmt: skip  # not commands of the project
TINY = "--config tiny.yaml --samples 0"


def photos(name: str = "photos", count: int = 12) -> None:
    os.makedirs(name)
    for k, image in enumerate(pictures.draw(0, range(count))[0]):
        Image.fromarray(image).resize((40, 36)).save(f"{name}/{k}.jpg")


def dataset(name: str, size: int = 8) -> None:
    """A folder under the name of a zip; every command takes either."""
    make_dataset(Path(name), 8, 4, size=size)


def snapshots(*names: str) -> None:
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        tiny_snapshot(Path(name), seed)


def reference(name: str) -> None:
    images = torch.randint(0, 256, [8, 3, 8, 8], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_reference(name, edm2kit.measure_reference(images, ["fd_random"]))


def prepare_own_images() -> None:
    photos()
    write_config(Path("tiny.yaml"))
    make_run(Path("runs/photos/main"), 0)


def prepare_data() -> None:
    photos()
    parts = {"batches.meta": meta()}
    for k, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        random = np.random.default_rng(k)
        parts[name] = batch(random.integers(0, 256, (2, 3072), dtype=np.uint8), [0, 1])
    write_tar(Path("cifar-10-python.tar.gz"), {f"cifar-10-batches-py/{name}": data for name, data in parts.items()})
    dataset("photos512.zip", 16)
    tiny_vae(Path("vae"))
    snapshots("classes.safetensors")
    net = edm2kit.load_snapshot("classes.safetensors")
    header = dataclasses.replace(net.header, label_kind="vectors")
    save_snapshot("main.safetensors", net.net.state_dict(), header)
    np.save("vectors.npy", np.random.default_rng(0).random((3, 4), dtype=np.float32))


def prepare_guidance() -> None:
    snapshots("main.safetensors", "weaker.safetensors", "base.safetensors")
    for name in ("mydata.zip", "img64.zip", "demo-out/pictures.zip"):
        dataset(name)
    write_config(Path("tiny.yaml"), network={})


def prepare_metrics() -> None:
    dataset("photos.zip")
    dataset("out")


def prepare_tune() -> None:
    make_run(Path("runs/main"), 0)
    make_run(Path("runs/small"), 1, times=(1000, 2000))
    dataset("heldout.zip")
    reference("real.npz")


def prepare_imagenet() -> None:
    for kind in ("n01440764", "n01443537"):
        photos(f"ILSVRC/train/{kind}", 3)
    tiny_vae(Path("vae"))
    write_config(Path("tiny.yaml"), snapshot_every_nimg=1000, duration_nimg=2000, batch_size=100)
    snapshots("ema/s-2147483-0.070.safetensors", "ema/xs-0134217-0.125.safetensors")


def prepare_any_model() -> None:
    (example,) = (block for block in code_blocks(page("docs/any-model.md"), "python") if "PowerEMA" in block)
    exec(example, {})


def prepare_nothing() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How the commands of a page run: the files that they need, and what replaces large numbers in their texts."""

    prepare: Callable[[], None]
    small: dict[str, str] = dataclasses.field(default_factory=dict)


SCENARIOS = {
    "README.md": Scenario(
        prepare_own_images,
        {
            "--seeds 0-63": "--seeds 0-1",
            "--resolution 64": "--resolution 8",
            "--auto": "--auto --channels 16 --throughput 100",
        },
    ),
    "docs/own-images.md": Scenario(
        prepare_own_images,
        {
            "--resolution 64": "--resolution 8",
            "--auto": "--auto --channels 16 --throughput 100",
            "--channels 128": "--channels 16",
            "--preset edm2-img64-xs": TINY,
            "--measure 30s": "--measure 1s",
            "16Mi": "1Ki",
            "4Mi": "1Ki",
            "0016777": "0000001",
            "0004194": "0000001",
            "--channels 64": "--channels 8",
            "--seeds 0-9999": "--seeds 0-3 --steps 2",
            "--num 10000": "--num 4",
        },
    ),
    "docs/data.md": Scenario(
        prepare_data,
        {"64x64": "8x8", "--dest latents.zip": "--dest latents.zip --vae vae", "--seeds 0-63": "--seeds 0-1 --steps 2"},
    ),
    "docs/guidance.md": Scenario(
        prepare_guidance,
        {
            "--seeds 0-63": "--seeds 0-1 --steps 2",
            "--seeds 0-49999": "--seeds 0-7 --steps 2",
            "--preset edm2-img64-s": TINY,
            "--duration 8Mi --snapshot 1Mi": "--duration 1Ki",
            "0008388": "0000001",
            "--outdir runs/distilled": "--outdir runs/distilled --duration 1Ki --batch 64",
            "--metrics fd_lite0": "--metrics fd_random",
        },
    ),
    "docs/metrics.md": Scenario(prepare_metrics, {
            "fd_lite0,fd_random": "fd_random",
            "--num 10000": "--num 8",
            "paper.json mine.json": "out.json out.json",
        }),
    "docs/tune.md": Scenario(
        prepare_tune,
        {
            "--outdir runs/probe": "--outdir runs/probe --num 4 --levels 3",
            "fd_lite0": "fd_random",
            "--budget 4000img --num 500": "--budget 24img --num 4 --halvings 0",
            "--steps 16": "--steps 2",
        },
    ),
    "docs/imagenet.md": Scenario(
        prepare_imagenet,
        {
            "512x512": "16x16",
            "--dest img512-latents.zip": "--dest img512-latents.zip --vae vae",
            "--dest img512.npz": "--dest img512.npz --metrics fd_random",
            "--preset edm2-img512-s --data img512-latents.zip --outdir runs/s --batch-gpu 128": f"{TINY} --data "
            "img512-latents.zip --outdir runs/s",
            "--preset edm2-img512-xs --data img512-latents.zip --outdir runs/xs --duration 128Mi --batch-gpu 128": TINY
            + " --data img512-latents.zip --outdir runs/xs",
            "--num-images 50000": "--num-images 4 --steps 2",
            "--metrics fid,fd_dinov2": "--metrics fd_random",
            "--metrics fid": "--metrics fd_random",
            "0,50000,100000": "0,4,8",
            "--seeds 0-49999": "--seeds 0-3 --steps 2",
        },
    ),
    "docs/any-model.md": Scenario(prepare_any_model),
    "docs/reproduction.md": Scenario(prepare_nothing),
    "experiments/own_images/README.md": Scenario(prepare_own_images, {"--resolution 32": "--resolution 8"}),
    "experiments/tune/README.md": Scenario(prepare_nothing, {"--num 3000": "--num 20"}),
}  # fmt: skip


def reason_not_to_run(line: ShellLine) -> str | None:
    for start, reason in NOT_RUN.items():
        if line.text.startswith(start):
            return reason
    for (name, start), test in ELSEWHERE.items():
        if line.page == name and line.text.startswith(start):
            return test
    return None


def test_no_command_has_gaps():
    inline = r"`((?:python |torchrun |bash |edm2kit-)[^`]*)`"
    texts = {name: page(name) for name in PAGES}
    texts |= {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md")}
    found = [f"{name}: {line.text}" for name in PAGES for line in shell_lines(name) if "..." in line.text]
    found += [
        f"{name}: {command}" for name, text in texts.items() for command in re.findall(inline, text) if "..." in command
    ]
    assert found == []


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_run_or_says_why_not(name):
    lines = shell_lines(name)
    assert lines
    assert [line.text for line in lines if name not in SCENARIOS and reason_not_to_run(line) is None] == []


def test_every_reason_is_needed_and_names_tests_that_exist():
    lines = [line for name in PAGES for line in shell_lines(name)]
    assert [start for start in NOT_RUN if not any(line.text.startswith(start) for line in lines)] == []
    for reason in (*NOT_RUN.values(), *ELSEWHERE.values()):
        for named in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert (ROOT / named).exists(), reason
    for test in ELSEWHERE.values():
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("name", PAGES)
def test_the_real_commands_parse_every_line(name, tmp_path, monkeypatch, capsys):
    """In a folder with the files of the checkout, and empty ones for others: some options look for their files."""
    monkeypatch.chdir(tmp_path)
    for folder in ("edm2kit", "experiments", "scripts", "tests", "benchmarks"):
        Path(folder).symlink_to(ROOT / folder)
    Path("runs/toy").mkdir(parents=True)
    for line in shell_lines(name):
        if name == "docs/extend.md" and "my_" in line.text:
            continue  # with files of the page itself; see ELSEWHERE
        for word in line.arguments:
            file = Path(word.rpartition("=")[2])
            if file.suffix not in (".json", ".safetensors") or "://" in word or file.exists():
                continue
            assert not Path(file.parts[0]).is_symlink(), f"{line.text}: {file} is not in the checkout"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        named = [word for word in line.words if Path(word).parts[:1] and Path(Path(word).parts[0]).is_symlink()]
        assert [word for word in named if not Path(word).exists()] == [], line.text
        if not parse(line):
            assert line.words[0] in UNPARSED or line.words[:3] == ("python", "-m", "pytest"), line.text


def run(line: ShellLine, small: dict[str, str]) -> str:
    """The output of a command at its tiny size; raises AssertionError, with the output, if it fails."""
    command, arguments = click_command(line.start), list(line.arguments)
    text = "\0".join(arguments)
    for large, tiny in small.items():
        text = text.replace(large.replace(" ", "\0"), tiny.replace(" ", "\0"))
    done = CliRunner().invoke(command, text.split("\0"))
    assert done.exit_code == 0, f"{line.text}\n{done.output}"
    return done.output


FAST = ("docs/any-model.md", "docs/metrics.md", "docs/reproduction.md", "experiments/tune/README.md")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in SCENARIOS]
)
def test_they_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    scenario = SCENARIOS[name]
    scenario.prepare()
    written = "\n".join(line.text for line in shell_lines(name))
    assert [large for large in scenario.small if large not in written] == [], "these stand for nothing on the page"
    done = 0
    for line in shell_lines(name):
        if reason_not_to_run(line) is None:
            run(line, scenario.small)
            done += 1
    assert done
