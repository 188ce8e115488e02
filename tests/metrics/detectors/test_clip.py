"""CLIP and SigLIP encoders through transformers, on tiny models with random weights."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from edm2kit.metrics.detectors import clip
from edm2kit.metrics.detectors.clip import CMMD_MODEL, clip_detector
from edm2kit.metrics.detectors.registry import DETECTORS, load_detector, register_detector
from edm2kit.metrics.scoring import measure_reference, score_images

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
PREPARED = {
    "clip": {
        "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "resample": 3,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    },
    "siglip": {
        "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True, "rescale_factor": 0.00392156862745098,
        "image_mean": MEAN, "image_std": STD,
    },
}  # fmt: skip


def save(folder, kind):
    """A model with text encoder as on the hub, its preprocessing, and the model itself."""
    torch.manual_seed(0)
    if kind == "clip":
        vision = {**VISION, "projection_dim": 12}
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=12))
    else:
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    model.eval().save_pretrained(folder)
    prepare(folder, kind)
    return model


def prepare(folder, kind, **changes):
    content = {name: value for name, value in {**PREPARED[kind], **changes}.items() if value != "absent"}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.fixture(scope="module", params=["clip", "siglip"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, save(folder, request.param)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "clip")
    return tmp_path


def images(seed=0, count=12):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 20, 24), np.uint8))


def plain_embedding(model, kind, pixels):
    """The model's own image features of pixels that Pillow resized."""
    filter = Image.Resampling.BICUBIC if kind == "clip" else Image.Resampling.BILINEAR
    resized = np.stack([Image.fromarray(one.permute(1, 2, 0).numpy()).resize((16, 16), filter) for one in pixels])
    prepared = torch.from_numpy(((resized / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        return model.get_image_features(pixel_values=prepared).pooler_output


@pytest.fixture
def detector(saved):
    register_detector("tiny", clip_detector(saved[1]))
    yield load_detector("tiny")
    del DETECTORS["tiny"]


def test_features_are_the_image_embedding_of_the_model(saved, detector):
    kind, _, model = saved
    assert detector.num_features == {"clip": 12, "siglip": 16}[kind]
    expected = plain_embedding(model, kind, images())
    assert expected.std() > 0
    torch.testing.assert_close(detector(images()), expected, rtol=1e-4, atol=1e-5)


def test_cmmd_of_the_model_is_its_published_formula(saved, detector):
    kind, _, model = saved
    reference = measure_reference(images(1), ["tiny"])
    found = score_images(images(0), reference, ["tiny.mmd"], real=images(1))["tiny.mmd"]
    x, y = (plain_embedding(model, kind, images(seed)).double().numpy() for seed in (0, 1))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))

    def kernel(u, v):
        return np.exp(-((u[:, None] - v[None]) ** 2).sum(axis=2) / (2 * 10**2)).mean()

    assert found == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-3)
    assert found > 0


def test_the_fingerprint_follows_the_weights_and_the_preprocessing(saved, detector, tmp_path):
    kind, folder, _ = saved
    spec = clip_detector(folder)
    assert spec.fingerprint == detector.fingerprint
    assert f"{kind} image embedding" in spec.fingerprint
    torch.manual_seed(1)
    model = save(tmp_path, kind)
    assert clip_detector(tmp_path).fingerprint == spec.fingerprint  # the same weights in another file
    next(iter(model.vision_model.parameters())).data += 1
    model.save_pretrained(tmp_path)
    assert clip_detector(tmp_path).sha256 != spec.sha256
    prepare(folder, kind, image_mean=[0, 0, 0])
    assert clip_detector(folder).fingerprint != spec.fingerprint
    prepare(folder, kind)


def test_the_model_of_cmmd_is_resized_in_pytorch(folder, monkeypatch):
    assert "bicubic-pil to 16x16" in clip_detector(folder).preprocessing
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "projection_dim": 12}
    monkeypatch.setattr(clip, "_CMMD_SHAPE", shape)
    assert "bicubic-no-antialias to 16x16" in clip_detector(folder).preprocessing
    assert CMMD_MODEL == "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"crop_size": {"height": 32, "width": 32}}, "its encoder takes 16x16"),
        ({"do_center_crop": False, "size": {"height": 16, "width": 8}}, "its encoder takes 16x16"),
        ({"do_rescale": False}, "not supported"),
        ({"resample": 0}, "filter 0; expected 2 or 3"),
        ({"resample": "absent"}, "filter None"),
        ({"image_mean": "absent"}, "mean is None"),
    ],
)
def test_unusual_preprocessing_is_refused(folder, changes, reason):
    prepare(folder, "clip", **changes)
    with pytest.raises(ValueError, match=reason):
        clip_detector(folder)


def test_incomplete_folders_are_refused(folder, tmp_path, capfd):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 9}))
    vision = {**config["vision_config"], "projection_dim": 9}
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": vision}))
    with pytest.raises(ValueError, match=r"weights do not fit its config\.json"):
        clip_detector(folder)
    vision = {**config["vision_config"], "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": vision}))
    with pytest.raises(ValueError, match="lacks weights"):
        clip_detector(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(ValueError, match="of kind dinov2; expected clip or siglip"):
        clip_detector(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="Check the folder") as caught:
        clip_detector(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="neither a folder nor a name"):
        clip_detector(tmp_path / "none")
    assert "Traceback" not in capfd.readouterr().err


def test_without_the_extra_or_a_connection_the_next_step_is_named(monkeypatch):
    import transformers

    def offline(*arguments, **named):
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match=f"hf download {CMMD_MODEL} --local-dir DIR") as caught:
        clip_detector()
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'edm2kit\[clip\]'"):
        clip_detector()
