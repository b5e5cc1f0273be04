"""Activation files that cannot be used: one clear error each, which names the file."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_activations import batches, numbered, put

from sparsekern.data import ActivationStore, DataError

GOOD = numbered(0, 40).astype(np.float32)


def refuses(path, message: str, **options) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ActivationStore(path, **options)
    assert str(path if not isinstance(path, list) else path[-1]) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no.h5", "no.npy", "no.safetensors", "no.txt"])
def test_a_missing_file(name, tmp_path):
    refuses(tmp_path / name, "^activation file not found: ")
    refuses(tmp_path, "^activation file not found: ")


def test_a_file_of_unknown_kind(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    refuses(tmp_path / "a.txt", r"unknown kind: .*\.h5, \.hdf5, \.npy, \.safetensors")


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.h5", "is not HDF5"),
        ("a.npy", "truncated, damaged or not .npy"),
        ("a.safetensors", "truncated, damaged or not safetensors"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"hello, this is a text of some length" * 9])
def test_a_file_that_is_not_what_its_name_says(name, message, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, message)


@pytest.mark.parametrize("kept", [0.2, 0.7, 0.99])
@pytest.mark.parametrize("name", ["a.h5", "a.npy", "a.safetensors"])
def test_a_truncated_file(name, kept, tmp_path):
    path = tmp_path / name
    if name == "a.h5":
        put(path, GOOD, 8)
    elif name == "a.npy":
        np.save(path, GOOD)
    else:
        save_file({"activations": torch.from_numpy(GOOD)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuses(path, "activation file is truncated")


def test_a_damaged_chunk_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("activations", data=GOOD, chunks=(8, 3), compression="gzip")
        chunk = file["activations"].id.get_chunk_info_by_coord((16, 0))
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with ActivationStore(path) as store:
        with pytest.raises(DataError, match=r"truncated or damaged: .*a.h5: rows 16\.\.23 cannot"):
            batches(store, shuffle=False)


def test_a_file_without_the_dataset_says_what_it_holds(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["layer/3"] = GOOD
        file["notes"] = 3
    refuses(
        tmp_path / "a.h5", r"no dataset 'activations'; it holds layer/3 float32 \[40, 3\], notes"
    )
    refuses(tmp_path / "a.h5", "no dataset 'layer'; it holds", dataset="layer")
    h5py.File(tmp_path / "b.h5", "w").close()
    refuses(tmp_path / "b.h5", "it holds no dataset")
    save_file({"x": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refuses(tmp_path / "a.safetensors", "no tensor 'activations'; it holds x")


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_another_rank(shape, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = np.ones(shape, np.float32)
    np.save(tmp_path / "a.npy", np.ones(shape, np.float32))
    save_file({"activations": torch.ones(shape)}, tmp_path / "a.safetensors")
    for name in ("a.h5", "a.npy", "a.safetensors"):
        refuses(tmp_path / name, r"must be \[tokens, D\], got \[")


@pytest.mark.parametrize("dtype", ["int64", "uint16", "float64"])
def test_another_dtype(dtype, tmp_path):
    put(tmp_path / "a.h5", GOOD.astype(dtype))
    np.save(tmp_path / "a.npy", GOOD.astype(dtype))
    for name in ("a.h5", "a.npy"):
        refuses(tmp_path / name, f"must be float32, float16 or bfloat16 .* got {dtype}")
    save_file({"activations": torch.from_numpy(GOOD.astype("int64"))}, tmp_path / "a.safetensors")
    refuses(tmp_path / "a.safetensors", "must be float32, .* got I64")
    put(tmp_path / "b.h5", GOOD.astype("int64"), dtype="bfloat16")
    refuses(tmp_path / "b.h5", "got int64")


def test_arrays_of_objects_and_columns_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    refuses(tmp_path / "a.npy", "damaged or not .npy")
    np.save(tmp_path / "b.npy", np.asfortranarray(GOOD))
    refuses(tmp_path / "b.npy", "must be in row-major order")


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_an_empty_file(shape, tmp_path):
    put(tmp_path / "a.h5", np.ones(shape, np.float32))
    np.save(tmp_path / "a.npy", np.ones(shape, np.float32))
    save_file({"activations": torch.ones(shape)}, tmp_path / "a.safetensors")
    for name in ("a.h5", "a.npy", "a.safetensors"):
        refuses(tmp_path / name, "^activation file is empty: ")


def test_files_of_different_width_or_dtype(tmp_path):
    put(tmp_path / "a.h5", GOOD)
    put(tmp_path / "b.h5", GOOD[:, :2])
    put(tmp_path / "c.h5", GOOD.astype(np.float16))
    refuses([tmp_path / "a.h5", tmp_path / "b.h5"], "differ in features: 3 in .*a.h5, 2 in .*b.h5")
    refuses([tmp_path / "a.h5", tmp_path / "c.h5"], "differ in dtype: torch.float32 in .*a.h5")


def test_directions_of_another_width(tmp_path):
    put(tmp_path / "a.h5", GOOD)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["directions"] = np.ones((7, 4), np.float32)
    with ActivationStore(tmp_path / "a.h5") as store:
        with pytest.raises(DataError, match=r"a.h5: directions must be \[n, 3\], got \[7, 4\]"):
            _ = store.directions


def test_a_file_that_another_process_writes(tmp_path):
    path = tmp_path / "a.h5"
    put(path, GOOD)
    code = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as writer:
        writer.stdout.readline()
        refuses(path, "^activation file is locked by a writer: ")
        writer.communicate(b"\n")
    ActivationStore(path).close()


def test_a_file_that_this_process_writes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = GOOD
        refuses(tmp_path / "a.h5", "^activation file is locked by a writer: .* in this process")
    ActivationStore(tmp_path / "a.h5").close()


# -- rows that are not finite ----------------------------------------------------------------------

BAD = (3, 250, 260, 261, 369, 370)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def damaged(request, tmp_path):
    """Two files, rows 0..199 and 200..370 together, six rows of which are not finite."""
    rows = torch.from_numpy(numbered(0, 371)).float() / 512  # finite in float16
    for number, row in enumerate(BAD):
        rows[row, number % 3] = [float("nan"), float("inf"), -float("inf")][number % 3]
    rows = rows.to(getattr(torch, request.param))
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, part in zip(paths, rows.split([200, 171]), strict=True):
        save_file({"activations": part.clone()}, path)
    return paths, rows


def test_rows_that_are_not_finite_are_refused_and_named(damaged):
    paths, _ = damaged
    with ActivationStore(paths) as store:
        message = (
            r"^activations are not finite: 6 of 371 rows .*: row 3 of .*a.safetensors, row 50 of "
            r".*b.safetensors, row 60 of .*, row 61 of .*, row 169 of .*, \.\.\. \(nonfinite='skip'"
        )
        for prefetch in (True, False):
            with pytest.raises(DataError, match=message):
                batches(store, buffer_rows=1000, prefetch=prefetch)


def test_rows_that_are_not_finite_are_skipped(damaged):
    paths, rows = damaged
    good = torch.tensor([row not in BAD for row in range(371)])
    with ActivationStore(paths, nonfinite="skip") as store:
        assert store.tokens == 365 and store.skipped == 6
        assert torch.equal(torch.cat(batches(store, shuffle=False, dtype=rows.dtype)), rows[good])
        full = batches(store, dtype=rows.dtype)
        assert len(full) == store.count_batches(23)
        assert torch.equal(torch.cat(full).sort(0).values, rows[good].sort(0).values)
        for start in range(len(full) + 1):
            tail = batches(store, dtype=rows.dtype, start=start)
            assert len(tail) == len(full) - start and all(map(torch.equal, tail, full[start:]))


def test_skipping_nothing_changes_nothing(tmp_path):
    put(tmp_path / "a.h5", GOOD, 8)
    with ActivationStore(tmp_path / "a.h5") as one:
        with ActivationStore(tmp_path / "a.h5", nonfinite="skip") as two:
            assert all(map(torch.equal, batches(one), batches(two)))


def test_a_whole_group_may_be_skipped(tmp_path):
    array = GOOD.copy()
    array[8:24] = np.nan
    put(tmp_path / "a.h5", array, 8)
    with ActivationStore(tmp_path / "a.h5", nonfinite="skip") as store:
        for size in (3, 7, 24, 30):
            full = batches(store, size, buffer_rows=8)
            assert sum(map(len, full)) == 24
            for start in range(len(full) + 1):
                tail = batches(store, size, buffer_rows=8, start=start)
                assert len(tail) == len(full) - start and all(map(torch.equal, tail, full[start:]))


def test_no_finite_row(tmp_path):
    put(tmp_path / "a.h5", np.full((4, 3), np.nan, np.float32))
    refuses(tmp_path / "a.h5", "^activation files hold no finite row: ", nonfinite="skip")


# -- arguments -------------------------------------------------------------------------------------


def test_arguments_out_of_range(tmp_path):
    put(tmp_path / "a.h5", GOOD)
    with pytest.raises(ValueError, match="nonfinite must be one of refuse, skip, got 'drop'"):
        ActivationStore(tmp_path / "a.h5", nonfinite="drop")
    with pytest.raises(ValueError, match="paths must name at least one file"):
        ActivationStore([])
    with ActivationStore(tmp_path / "a.h5") as store:
        for name, value in (
            ("batch_size", 0), ("batch_size", 2.5), ("seed", -1), ("epoch", -1), ("start", -1),
            ("buffer_rows", 0),
        ):  # fmt: skip
            with pytest.raises(
                ValueError, match=f"^batches: {name} must be an integer of at least"
            ):
                store.batches(**{"batch_size": 4, "seed": 0, name: value})
        with pytest.raises(ValueError, match=r"start must lie in 0\.\.10 .* got 11"):
            store.batches(4, seed=0, start=11)
        with pytest.raises(ValueError, match=r"dtype must be floating, got torch.int64"):
            store.batches(4, seed=0, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"^count_batches: batch_size must be"):
            store.count_batches(0)
