"""Pickles of arrays, written without pickling objects: read by Python, by this package, and by every numpy."""

import io
import pickle
import pickletools
import warnings

import numpy as np
import pytest

from edm2kit.torch_utils.pickles.reader import load_pickle
from edm2kit.torch_utils.pickles.writer import dump_arrays

RNG = np.random.default_rng(0)
CONTENT = {
    "count": 1281167,
    "numbers": {"zero": 0, "byte": 127, "more": 128, "negative": -129},
    "fid": {"mu": RNG.normal(size=7), "sigma": RNG.normal(size=(4, 5)).T, "empty": np.zeros([0, 3])},
}


def written(content):
    file = io.BytesIO()
    dump_arrays(content, file)
    return file.getvalue()


@pytest.mark.parametrize("read", [pickle.loads, lambda data: load_pickle(io.BytesIO(data))], ids=["pickle", "ours"])
def test_what_is_written_is_read(read):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy 2 moved the functions that old pickles name
        found = read(written(CONTENT))
    assert (found["count"], found["numbers"]) == (CONTENT["count"], CONTENT["numbers"])
    for name, expected in CONTENT["fid"].items():
        array = found["fid"][name]
        assert type(array) is np.ndarray
        assert array.dtype == np.float64
        assert np.array_equal(array, expected)
        array += 1  # arrays can be written to


def test_other_types_become_float64():
    found = pickle.loads(written({"x": np.arange(3, dtype=">i4")}))
    assert found["x"].dtype == np.float64
    assert found["x"].tolist() == [0, 1, 2]


def test_only_numpy_is_named_in_the_file():
    names = {argument for opcode, argument, _ in pickletools.genops(written(CONTENT)) if opcode.name == "GLOBAL"}
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


@pytest.mark.parametrize("value", [1.5, "text", True, None, [1]])
def test_anything_else_is_refused(value):
    with pytest.raises(TypeError, match="cannot be written"):
        written({"x": value})
