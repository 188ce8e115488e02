"""The demo's dataset: endless, repeatable, of ten kinds that differ, varied inside each."""

import numpy as np
from click.testing import CliRunner
from PIL import Image

from edm2kit.experiments.demo.pictures import KINDS, NAMES, SIDE, draw, main, uniforms


def test_a_picture_depends_on_seed_and_number_alone():
    alone, label = draw(7, [123456])
    images, labels = draw(7, [3, 123456, 40])
    np.testing.assert_array_equal(images[1], alone[0])
    assert labels[1] == label[0] == 123456 % 10
    assert (draw(8, [123456])[0] != alone).any()


def test_shapes_types_and_equal_shares():
    images, labels = draw(0, range(40))
    assert images.shape == (40, SIDE, SIDE, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(labels), [4] * len(NAMES))
    assert draw(0, [])[0].shape == (0, SIDE, SIDE, 3)


def test_random_numbers_are_uniform_and_unrelated_across_slots_and_seeds():
    u = np.concatenate([uniforms(seed, np.arange(20000))[:, :20] for seed in (0, 1)], axis=1)
    assert u.min() >= 0
    assert u.max() < 1
    np.testing.assert_allclose(u.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(u.var(axis=0), 1 / 12, atol=0.002)
    correlation = np.corrcoef(u.T) - np.eye(u.shape[1])
    assert abs(correlation).max() < 0.04


def test_every_picture_differs():
    images, _ = draw(0, range(2000))
    assert len({image.tobytes() for image in images}) == 2000


def test_distances_are_negative_inside_and_grow_no_faster_than_the_way_walked():
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    for name, (distance, _) in KINDS.items():
        d = distance(x, y)
        inside = (d < 0).mean() * 9
        assert 0.5 < inside < 3, f"{name} covers {inside:.2f}"
        assert (d[[0, -1]] > 0).all(), name
        steps = np.abs(np.diff(d, axis=0)).max() / (axis[1] - axis[0])
        assert steps < 1.01, f"{name}: an edge of slope {steps:.2f} would be drawn too hard"


def test_a_kind_is_told_by_its_outline():
    """The nearest neighbour by edges alone is of the same kind far more often than by chance (one in ten)."""
    images, labels = draw(0, range(4000))
    edges = np.abs(np.diff(images.astype(np.float32).mean(axis=3), axis=1)).reshape(len(images), -1)
    known, asked = edges[500:], edges[:500]
    far = (asked**2).sum(axis=1)[:, None] - 2 * asked @ known.T + (known**2).sum(axis=1)
    assert (labels[500:][far.argmin(axis=1)] == labels[:500]).mean() > 0.25


def test_folders_of_pictures_by_kind(tmp_path):
    done = CliRunner().invoke(main, ["--dest", str(tmp_path / "out"), "--num", "23", "--seed", "5"])
    assert done.exit_code == 0, done.output
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == sorted(NAMES)
    files = sorted((tmp_path / "out").rglob("*.png"), key=lambda file: file.name)
    assert [file.stem for file in files] == [f"{k:06d}" for k in range(23)]
    images, labels = draw(5, range(23))
    np.testing.assert_array_equal(np.asarray(Image.open(files[22])), images[22])
    assert files[22].parent.name == NAMES[labels[22]]


def test_an_existing_folder_is_left_alone(tmp_path):
    done = CliRunner().invoke(main, ["--dest", str(tmp_path)])
    assert done.exit_code == 1
    assert "already exists" in done.output
    assert list(tmp_path.iterdir()) == []
