"""HDF5 files that are not plain are read as h5py reads them, or refused; so are damaged ones."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import corrupted_files
import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_activation_files import refuses
from test_activations import batches, numbered, put

from sparsekern.data import ActivationStore, DataError, convert
from sparsekern.data.hdf5 import open_hdf5
from sparsekern.data.images import shapes3d

ROWS = np.random.default_rng(0).standard_normal((256, 32)).astype(np.float32)


def read(path, **options) -> np.ndarray:
    """All rows in the order of the file."""
    with ActivationStore(path, **options) as store:
        return torch.cat(batches(store, 60, shuffle=False)).numpy()


def float_type(size: int, bias: int, fields: tuple, big: bool = False) -> h5py.h5t.TypeFloatID:
    kind = (h5py.h5t.IEEE_F32BE if big else h5py.h5t.IEEE_F32LE).copy()
    kind.set_fields(*fields)
    kind.set_size(size)
    kind.set_ebias(bias)
    return kind


# -- types -----------------------------------------------------------------------------------------

TYPES = {
    "bfloat16": lambda: float_type(2, 127, (15, 7, 8, 0, 7)),
    "half": lambda: float_type(2, 15, (15, 10, 5, 0, 10)),
    "half of another bias": lambda: float_type(2, 20, (15, 10, 5, 0, 10)),
    "half with a long exponent": lambda: float_type(2, 31, (15, 9, 6, 0, 9)),
    "single of another bias": lambda: float_type(4, 100, (31, 23, 8, 0, 23)),
    "single with its sign below": lambda: float_type(4, 127, (0, 24, 8, 1, 23)),
    "eight bits": lambda: float_type(1, 7, (7, 3, 4, 0, 3)),
    "three bytes": lambda: float_type(3, 63, (23, 16, 7, 0, 16)),
    "big-endian": lambda: h5py.h5t.IEEE_F32BE,
    "big-endian half": lambda: h5py.h5t.IEEE_F16BE,
}


@pytest.mark.parametrize("chunks", [None, (10, 32)])
@pytest.mark.parametrize("name", TYPES)
def test_floats_of_any_layout_are_converted_as_h5py_does(name, chunks, tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if chunks:
            properties.set_chunk(chunks)
        space = h5py.h5s.create_simple(ROWS.shape)
        made = h5py.h5d.create(file.id, b"activations", TYPES[name](), space, properties)
        h5py.Dataset(made)[...] = ROWS
        file["more"] = np.zeros(1 << 18, "u1")
    with h5py.File(path) as file:
        expected = file["activations"][:]
    if expected.dtype == np.float64:  # h5py needs that for exponents beyond float32's
        refuses(path, "must be float32, float16 or bfloat16")
    else:
        assert np.array_equal(read(path), expected)


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
@pytest.mark.parametrize("said", ["bfloat16", np.bytes_("bfloat16"), np.array(["bfloat16"], "S")])
def test_bfloat16_is_known_however_it_is_said(kind, said, tmp_path):
    rows = torch.from_numpy(ROWS).bfloat16()
    put(tmp_path / "a.h5", rows.view(torch.uint16).numpy().astype(kind), 8, dtype=said)
    assert np.array_equal(read(tmp_path / "a.h5"), rows.float().numpy())


def test_types_that_are_no_floats_are_refused(tmp_path):
    for number, array in enumerate(
        (
            ROWS.astype(np.complex64), ROWS.astype("f8"), ROWS > 0, ROWS.astype("i2"),
            np.zeros((4, 3), [("re", "f4"), ("im", "f4")]), np.full((4, 3), b"text"),
            np.zeros((4, 3), "V4"),
        )
    ):  # fmt: skip
        put(tmp_path / f"{number}.h5", array)
        refuses(tmp_path / f"{number}.h5", "must be float32, float16 or bfloat16")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["activations"] = h5py.Empty("f4")
    refuses(tmp_path / "a.h5", r"must be \[tokens, D\], got \[\]")


# -- places ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with part.h5: rows behind something else."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("part.h5", "w") as file:
        file["before"] = np.zeros(1000, "u1")
        file.create_dataset("rows", data=ROWS, chunks=(10, 32))
        file["whole"] = ROWS
    return tmp_path


def linked(link) -> Path:
    with h5py.File("all.h5", "w") as file:
        file["note"] = np.full(20000, 7.0, "f4")
        file["activations"] = link
    return Path("all.h5")


@pytest.mark.parametrize("name", ["rows", "whole"])
def test_links_lead_to_the_rows_they_name(name, folder):
    assert np.array_equal(read(linked(h5py.ExternalLink("part.h5", name))), ROWS)
    convert("all.h5", "copy.h5")
    assert np.array_equal(read("copy.h5"), ROWS)
    with h5py.File("part.h5", "a") as file:
        file["activations"] = h5py.SoftLink(name)
    assert np.array_equal(read("part.h5"), ROWS)


def test_an_external_link_to_a_file_with_a_user_block(folder):
    with h5py.File("block.h5", "w", userblock_size=1024) as file:
        file["rows"] = ROWS
    assert np.array_equal(read(linked(h5py.ExternalLink("block.h5", "rows"))), ROWS)


def test_links_that_lead_nowhere_are_refused(folder):
    path = linked(h5py.ExternalLink("gone.h5", "rows"))
    refuses(path, "activations leads to rows in gone.h5, which is missing")
    path = linked(h5py.SoftLink("nothing"))
    refuses(path, "has no dataset 'activations'; it holds note")


def test_a_file_behind_a_link_that_this_process_writes_is_refused(folder):
    path = linked(h5py.ExternalLink("part.h5", "rows"))
    with h5py.File("part.h5", "a"):
        refuses(path, "locked by a writer|truncated or damaged|is missing")


def test_external_storage_is_read_whole_or_refused(folder):
    ROWS[:100].tofile("one.bin")
    (folder / "two.bin").write_bytes(b"12345678" + ROWS[100:].tobytes())
    with h5py.File("a.h5", "w") as file:
        places = [("one.bin", 0, 100 * 128), ("two.bin", 8, h5py.h5f.UNLIMITED)]
        file.create_dataset("activations", ROWS.shape, "f4", external=places)
    assert np.array_equal(read("a.h5"), ROWS)
    os.truncate("two.bin", 1000)
    refuses("a.h5", "kept in another file, which is missing or short: two.bin")
    os.remove("one.bin")
    refuses("a.h5", "kept in another file, which is missing or short: one.bin")


def test_a_virtual_dataset_is_read_whole_or_refused(folder):
    layout = h5py.VirtualLayout(ROWS.shape, "f4")
    source = h5py.VirtualSource("part.h5", "rows", ROWS.shape)
    layout[:200], layout[200:] = source[:200], source[200:]
    with h5py.File("a.h5", "w") as file:
        file.create_virtual_dataset("activations", layout)
        layout[:] = h5py.VirtualSource("part.h5", "whole", ROWS.shape)
        file.create_virtual_dataset("all", layout)
    assert np.array_equal(read("a.h5"), ROWS) and np.array_equal(read("a.h5", dataset="all"), ROWS)
    with h5py.File("part.h5", "a") as file:
        del file["rows"]
        file["rows"] = ROWS[:200]
    refuses("a.h5", "is virtual, and 'rows' is missing or too small in .*part.h5")
    os.remove("part.h5")
    refuses("a.h5", "is virtual, and its source is missing: part.h5")
    layout = h5py.VirtualLayout((1 << 40, 32), "f4")
    layout[:256] = source
    with h5py.File("b.h5", "w") as file:
        file.create_virtual_dataset("activations", layout)
    refuses("b.h5", r"claims \[1099511627776, 32\], of which 8192 values have sources")


def test_compact_rows_and_rows_never_written(folder):
    with h5py.File("a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.COMPACT)
        space, kind = h5py.h5s.create_simple((40, 32)), h5py.h5t.IEEE_F32LE
        made = h5py.h5d.create(file.id, b"activations", kind, space, properties)
        h5py.Dataset(made)[...] = ROWS[:40]
        file.create_dataset("never", (40, 3), "f4", fillvalue=2.5)
        some = file.create_dataset("some", (40, 3), "f4", chunks=(8, 3), fillvalue=1.5)
        some[10:20] = 3
    assert np.array_equal(read("a.h5"), ROWS[:40])
    assert (read("a.h5", dataset="never") == 2.5).all()
    with h5py.File("a.h5") as file:
        assert np.array_equal(read("a.h5", dataset="some"), file["some"][:])


def test_chunks_are_looked_up_in_a_table_made_at_opening(folder):
    """HDF5 walks through all chunks to find one: it is not asked again."""
    rows = numbered(0, 4000).astype(np.float32)
    put("a.h5", rows, 2)
    with ActivationStore("a.h5") as store:
        store._files[0]._rows = SimpleNamespace(chunks=(2, 3))
        assert np.array_equal(torch.cat(batches(store, shuffle=False)).numpy(), rows)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_randomly_corrupted_files_are_read_or_refused(tmp_path):
    script = Path(corrupted_files.__file__)
    run = subprocess.run(
        [sys.executable, script, tmp_path, "0", "63"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_claim_of_rows_that_were_never_stored_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        options = {"maxshape": (None, 8), "chunks": (64, 8)}
        file.create_dataset("activations", (1 << 40, 8), "f4", **options)
    refuses(tmp_path / "a.h5", r"truncated or damaged: .* claims \[1099511627776, 8\], 35184372088")
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 40}, 8), }}".encode()
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "a.npy").write_bytes(raw + bytes(64))
    refuses(tmp_path / "a.npy", "its header claims 35184372088832 bytes, it holds 64")
    header = b'{"activations":{"dtype":"F32","shape":[1099511627776,8],"data_offsets":[0,64]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refuses(tmp_path / "a.safetensors", r"'activations' is F32 \[1099511627776, 8\] in 64 bytes")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["activations"] = ROWS
        file.create_dataset("directions", (1 << 40, 32), "f4", chunks=(64, 32))
    with ActivationStore(tmp_path / "b.h5") as store:
        with pytest.raises(DataError, match=r"directions claims \[1099511627776, 32\]"):
            _ = store.directions


def test_bytes_after_an_array_are_no_part_of_it(tmp_path):
    with open(tmp_path / "a.npy", "wb") as stream:
        np.save(stream, ROWS)
        np.save(stream, ROWS)
    refuses(tmp_path / "a.npy", "its header claims 32768 bytes, it holds 65664")


@pytest.fixture(params=["whole.h5", "chunked.h5", "packed.h5", "a.npy", "a.safetensors"])
def opened(request, tmp_path):
    """An open store of 4 MB in a file of each kind, and its rows."""
    rows = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
    path = tmp_path / request.param
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".safetensors":
        save_file({"activations": torch.from_numpy(rows)}, path)
    else:
        packed = {"compression": "lzf"} if path.stem == "packed" else {}
        chunks = None if path.stem == "whole" else (64, 256)
        with h5py.File(path, "w") as file:
            file.create_dataset("activations", data=rows, chunks=chunks, **packed)
    with ActivationStore(path) as store:
        yield store, rows


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(how, opened):
    store, rows = opened
    found = store.batches(64, seed=0, buffer_rows=256, shuffle=False, prefetch=False)
    assert np.array_equal(next(found), rows[:64])
    if how == "truncated":
        os.truncate(store.paths[0], 8192)
    else:
        with open(store.paths[0], "r+b") as file:
            file.seek(1 << 20)
            file.write(bytes(1 << 20))
    with pytest.raises(DataError, match=r"truncated or damaged|has changed since it was opened"):
        list(found)


def test_a_file_that_another_replaces_is_read_to_its_end(opened):
    store, rows = opened
    found = store.batches(64, seed=0, buffer_rows=256, shuffle=False, prefetch=False)
    next(found)
    other = store.paths[0].with_name("other")
    other.write_bytes(b"something else")
    os.replace(other, store.paths[0])
    assert np.array_equal(torch.cat(list(found)), rows[64:])


# -- locks -----------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def without_locks(request, monkeypatch):
    """h5py on a file system that answers flock with an error; the list says what was opened."""
    real, opened = h5py.File, []

    def file(*args, **options):
        opened.append(options.get("locking"))
        if options.get("locking") is False and os.environ.get("HDF5_USE_FILE_LOCKING") != "TRUE":
            return real(*args, **options)
        raise OSError(
            f"Unable to synchronously open file (unable to lock file, errno = {request.param}, "
            "error message = 'it has no locks')"
        )

    monkeypatch.setattr(h5py, "File", file)
    return opened


def test_without_locks_files_are_read_without(without_locks, tmp_path, monkeypatch):
    monkeypatch.undo()
    put(tmp_path / "a.h5", ROWS)
    shapes3d.rendered(3).save(tmp_path / "images.h5")
    monkeypatch.setattr(h5py, "File", without_locks_file := _refusing(37))
    assert np.array_equal(read(tmp_path / "a.h5"), ROWS)
    assert len(shapes3d.load(tmp_path / "images.h5")) == 3
    assert without_locks_file.refused == 2


def _refusing(number):
    real = h5py.File

    def file(*args, **options):
        if options.get("locking") is False:
            return real(*args, **options)
        file.refused += 1
        raise OSError(
            f"Unable to synchronously open file (unable to lock file, errno = {number}, "
            "error message = 'it has no locks')"
        )

    file.refused = 0
    return file


def test_where_locks_are_demanded_and_missing_the_remedy_is_named(without_locks, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    with pytest.raises(DataError, match=r"has no locks .set HDF5_USE_FILE_LOCKING=FALSE") as caught:
        open_hdf5(Path("a.h5"), "data file")
    assert without_locks == [None, False] and "writer" not in str(caught.value)


def test_images_that_another_process_writes_are_locked_not_damaged(tmp_path):
    shapes3d.rendered(3).save(tmp_path / "images.h5")
    code = f"import h5py; f = h5py.File({str(tmp_path / 'images.h5')!r}, 'a'); print(flush=True); "
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code + "input()"], **pipes) as writer:
        writer.stdout.readline()
        with pytest.raises(DataError, match=r"^data file is locked by a writer: "):
            shapes3d.load(tmp_path / "images.h5")
        writer.communicate(b"\n")
