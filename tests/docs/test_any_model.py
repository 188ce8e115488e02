"""The examples of docs/any-model.md run."""

from PIL import Image

from tests.docs.support import code_blocks, page
from tests.support.fakes import tiny_snapshot

EXAMPLES = code_blocks(page("docs/any-model.md"), "python")


def run(word):
    """The names that the example with this word in it leaves behind."""
    (example,) = (block for block in EXAMPLES if word in block)
    names = {}
    exec(example, names)
    return names


def test_a_network_of_ones_own():
    images = run("Adapted(")["images"]
    assert images.shape == (4, 3, 32, 32)
    assert images.isfinite().all()


def test_post_hoc_ema_in_a_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("PowerEMA")
    assert len(list((tmp_path / "ema").iterdir())) == 8


def test_edm2_as_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("main", "guide")):
        tiny_snapshot(tmp_path / f"{name}.safetensors", seed=seed)
    assert isinstance(run("EDM2Pipeline")["image"], Image.Image)
    assert (tmp_path / "edm2" / "model_index.json").is_file()
