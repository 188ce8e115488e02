"""`reproduce.py figure`: the grid of weights and shares, on tiny random networks like DeepFloyd IF."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import generate, reproduce
from tests.support import tiny_diffusers as tiny

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp("IF")
    d = tiny.diffusers()
    tokenizer, encoder = tiny._t5()
    upscaler = tiny._unet2d_condition(
        in_channels=6, out_channels=6, encoder_hid_dim=tiny.TEXT, class_embed_type="timestep", act_fn="gelu"
    )
    d.IFSuperResolutionPipeline(
        tokenizer, encoder, upscaler, tiny.scheduler("IF"), d.DDPMScheduler(), None, None, None,
        requires_safety_checker=False,
    ).save_pretrained(root / "II")  # fmt: skip
    return tiny.save("IF", root / "XL"), tiny.save("IF", root / "M", seed=4), root / "II"


def run(command, *words, code=0):
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert done.exit_code == code, done.output + str(done.exception)
    return done.output


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_figure_is_a_grid_whose_ends_are_the_two_methods(networks, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    main, guide, _ = networks
    out = tmp_path / "figure"
    words = [
        "figure", "--name", "if-mix", "--net", f"diffusers:{main}", "--gnet", f"diffusers:{guide}",
        "--weights", "1,3", "--shares", "0,0.5,1", "--seeds", "7", "--steps", "3", "--outdir", out, "--device", "cpu",
    ]  # fmt: skip
    output = run(reproduce.main, *words)
    assert output.count("Wrote") == 4 + 1  # at weight 1, all shares are one image
    assert "Wrote" not in run(reproduce.main, *words).replace(f"Wrote {out / 'sheet.png'}", "")
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 16
    prompt = (out / "prompts.txt").read_text().strip()
    assert prompt == "A blue jay standing on a large basket of rainbow macarons"
    common = ["--net", f"diffusers:{main}", "--prompt", prompt, "--seeds", "7", "--steps", "3", "--solver", "euler"]
    for share, method in (("0", ["--guidance-method", "cfg"]), ("1", ["--gnet", f"diffusers:{guide}"])):
        alone = tmp_path / f"alone{share}"
        run(generate.main, *common, *method, "--guidance", "3", "--outdir", alone, "--device", "cpu")
        made = out / "base" / f"prompt000-w3-share{share}-000007.png"
        assert abs(pixels(made) - pixels(alone / "000007.png")).max() <= 1
    ends = [pixels(out / "base" / f"prompt000-w3-share{share}-000007.png") for share in ("0", "1")]
    assert (ends[0] != ends[1]).any()
    refusal = run(reproduce.main, *words[:-4], "--steps", "4", "--outdir", out, "--device", "cpu", code=1)
    assert "holds images of other settings" in refusal


def test_images_are_enlarged_by_the_pipeline_of_the_second_stage(networks, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    main, guide, second = networks
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr(tiny.diffusers().DDPMScheduler, "set_timesteps", _few(tiny.diffusers().DDPMScheduler))
    out = tmp_path / "figure"
    run(
        reproduce.main, "figure", "--name", "if-mix", "--net", f"diffusers:{main}", "--gnet", f"diffusers:{guide}",
        "--weights", "2", "--shares", "0.5", "--steps", "2", "--prompts", tmp_path / "prompts.txt",
        "--super-resolution", second, "--outdir", out, "--device", "cpu",
    )  # fmt: skip
    (large,) = (out / "large").iterdir()
    with Image.open(large) as image:
        assert image.size == (8, 8)  # what the tiny second stage was made for


def _few(scheduler):
    """The scheduler's own function with at most 2 steps: the pipeline's default is 50."""
    plain = scheduler.set_timesteps

    def set_timesteps(self, num_inference_steps=None, **options):
        return plain(self, min(num_inference_steps or 2, 2), **options)

    return set_timesteps


def test_the_plan_names_downloads_memory_and_evaluations():
    text = run(reproduce.main, "figure", "--name", "if-mix", "--plan")
    assert "DeepFloyd/IF-I-XL-v1.0: main network, 64x64 pixels; 4.3 B parameters, 8.6 GB in bf16" in text
    assert "https://huggingface.co/DeepFloyd/IF-I-M-v1.0" in text
    assert "1 x 4 x 5 images of 50 steps:" in text
    # 3 guided rows: 2 main for each share below 1, 1 main for share 1; and one image for weight 1
    assert f"{(3 * (4 * 2 + 1) + 1) * 50} evaluations of the main network, {3 * 4 * 50} of the guide" in text


def test_mistakes_are_one_line(networks):
    assert "figure 'x' is unknown; available: if-mix" in run(reproduce.main, "figure", "--name", "x", "--plan", code=1)
    shares = run(reproduce.main, "figure", "--name", "if-mix", "--shares", "0,2", "--plan", code=1)
    assert "shares of autoguidance are from 0 to 1; got 0, 2" in shares
