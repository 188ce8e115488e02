"""EDM2 snapshots as a folder in the style of diffusers, and as a pipeline."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import generate
from edm2kit.guidance.registry import Choice
from edm2kit.integrations.edm2_pipeline import EDM2Pipeline
from tests.support.fakes import tiny_snapshot

NAMES = ("cat", "dog", "jay")


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots")
    return [tiny_snapshot(folder / f"{seed}.safetensors", seed=seed, label_names=NAMES, label_dim=3) for seed in (0, 1)]


def test_a_folder_in_the_style_of_diffusers_is_the_same_network(snapshots, tmp_path):
    pipe = EDM2Pipeline.from_pretrained(snapshots[0])
    pipe.save_pretrained(tmp_path / "edm2")
    files = sorted(str(path.relative_to(tmp_path / "edm2")) for path in (tmp_path / "edm2").rglob("*.*"))
    assert files == ["model_index.json", "network/config.json", "network/diffusion_pytorch_model.safetensors"]
    index = json.loads((tmp_path / "edm2" / "model_index.json").read_text())
    assert index["_class_name"] == "EDM2Pipeline"
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "jay"}
    loaded = EDM2Pipeline.from_pretrained(tmp_path / "edm2")
    call = {"class_labels": [2, 0], "num_inference_steps": 3, "output_type": "pt"}
    assert torch.equal(loaded(**call).images, pipe(**call).images)


def test_images_are_those_of_generate(snapshots, tmp_path):
    main, guide = (EDM2Pipeline.from_pretrained(path) for path in snapshots)
    image = main(["jay"], num_inference_steps=3, guide=guide, guidance_scale=1.5, seeds=[5]).images[0]
    words = [
        "--net", snapshots[0], "--gnet", snapshots[1], "--guidance", 1.5, "--class", "jay", "--seeds", 5, "--steps", 3,
        "--outdir", tmp_path, "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(generate.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "000005.png")))
    alone = main(["jay"], num_inference_steps=3, seeds=[5]).images[0]
    assert not np.array_equal(np.asarray(image), np.asarray(alone))
    other = main(["jay"], num_inference_steps=3, seeds=[5], choice=Choice("cfg", 2.0)).images[0]
    assert not np.array_equal(np.asarray(other), np.asarray(alone))


def test_without_labels_the_class_is_that_of_the_seed(snapshots):
    pipe = EDM2Pipeline.from_pretrained(snapshots[0])
    assert pipe(num_inference_steps=2, seeds=[3, 4], output_type="pt").images.shape == (2, 3, 8, 8)


def test_mistakes_are_refused(snapshots, tmp_path):
    pipe = EDM2Pipeline.from_pretrained(snapshots[0])
    with pytest.raises(ValueError, match="class 3 is out of range; the network has 3 classes"):
        pipe([3])
    with pytest.raises(ValueError, match="did you mean 'cat'"):
        pipe(["cats"])
    with pytest.raises(ValueError, match="1 seeds for 2 images"):
        pipe([0, 1], seeds=[1])
    with pytest.raises(ValueError, match="output_type is 'np'; expected pil or pt"):
        pipe([0], output_type="np")
    other = EDM2Pipeline.from_pretrained(tiny_snapshot(tmp_path / "other.safetensors", label_dim=5))
    with pytest.raises(ValueError, match="the guide does not fit the network"):
        pipe([0], guide=other)
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        EDM2Pipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ValueError, match="holds a DiTPipeline, not an EDM2Pipeline"):
        EDM2Pipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only snapshots in this project's format"):
        EDM2Pipeline(pipe.snapshot).save_pretrained(tmp_path / "out")
