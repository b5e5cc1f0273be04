"""Arrays in .npy files, read in slices."""

import os

import numpy as np
import pytest

from sparsekern.data.npy import NpyArray

ARRAYS = {
    "tokens": np.arange(60).reshape(12, 5),
    "images": np.arange(240.0).reshape(10, 4, 3, 2).astype(np.float16),
    "big-endian": np.arange(20, dtype=">f4").reshape(10, 2),
    "column-major": np.asfortranarray(np.arange(24).reshape(8, 3)),
    "mask": np.arange(9) % 2 == 0,
    "nothing beside": np.zeros((4, 0), np.float32),
}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("name", ARRAYS)
def test_slices_are_those_of_the_array(name, version, tmp_path):
    array = ARRAYS[name]
    with open(tmp_path / "a.npy", "wb") as stream:
        np.lib.format.write_array(stream, array, version)
    found = NpyArray(tmp_path / "a.npy")
    assert len(found) == len(array) and found.shape == array.shape
    for rows in (slice(0, 3), slice(2, 4), slice(len(array) - 1, 99), slice(5, 5)):
        part = found[rows]
        assert np.array_equal(part, array[rows]) and part.dtype.isnative
        part[...] = 1  # its own memory
    assert np.array_equal(found[0 : len(array)], array)


def test_what_is_no_array_or_gets_shorter_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds Python objects"):
        NpyArray(path)
    np.save(path, np.ones((1000, 8)))
    found = NpyArray(path)
    os.truncate(path, 3000)
    with pytest.raises(EOFError, match="the file ends at byte 3000"):
        found[0:1000]
    with pytest.raises(EOFError, match="its header claims 64000 bytes, it holds 2872"):
        NpyArray(path)
