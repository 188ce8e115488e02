"""Which images --holdout keeps out, and that the rest is a data set like any other."""

import shutil

import numpy as np
import pytest

from edm2kit.data.dataset import open_source
from edm2kit.data.holdout import split
from tests.support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("images"), num_images=40)


def names(source) -> list[str]:
    return [source.item_name(k) for k in range(len(source))]


def test_every_image_is_on_one_side(folder):
    source = open_source(folder)
    training, heldout = split(source, 0.1)
    assert (len(training), len(heldout)) == (36, 4)
    assert sorted(names(training) + names(heldout)) == names(source)
    for part in (training, heldout):
        for k in range(len(part)):
            number = names(source).index(part.item_name(k))
            raw, label = part[k]
            expected, expected_label = source[number]
            assert np.array_equal(raw, expected)
            assert np.array_equal(label, expected_label)
            assert part.labels[k] == source.labels[number]


def test_a_number_of_images_or_a_share(folder):
    source = open_source(folder)
    assert len(split(source, 7)[1]) == 7
    assert names(split(source, 7)[1]) == names(split(source, 7 / 40)[1])


def test_the_choice_depends_on_names_alone(folder, tmp_path):
    source = open_source(folder)
    heldout = set(names(split(source, 6)[1]))
    fewer = shutil.copytree(folder, tmp_path / "fewer")
    gone = names(split(source, 6)[0])[::3]
    for name in gone:
        (fewer / name).unlink()
    (fewer / "dataset.json").unlink()
    assert set(names(split(open_source(fewer), 6)[1])) == heldout


def test_parts_are_told_apart_from_each_other_and_from_all(folder):
    source = open_source(folder)
    identities = [source.identity(), split(source, 5)[0].identity(), split(source, 6)[0].identity()]
    assert identities[0].items() <= identities[1].items()
    assert identities[1]["holdout"]["num_images"] == 5
    assert identities[1]["holdout"] != identities[2]["holdout"]


@pytest.mark.parametrize("holdout", [1, 39, 0.01, 0.99, 400])
def test_both_sides_need_images(folder, holdout):
    with pytest.raises(ValueError, match=r"--holdout .* of 40 images .* must remain on either side"):
        split(open_source(folder), holdout)
