"""Files of image sets: the published layouts, and memory for one copy."""

import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest

from sparsekern.data.images import dsprites, shapes3d
from sparsekern.data.images import files as image_files
from sparsekern.data.images import writing as image_writing

FILES = [(dsprites, "d.npz"), (dsprites, "d.h5"), (shapes3d, "s.hdf5")]
NAMES = [name for _, name in FILES]
COUNT, SEED = 30, 5


@pytest.fixture(scope="module")
def data():
    return {module: module.rendered(COUNT, seed=SEED) for module in (dsprites, shapes3d)}


def arrays(path):
    """All arrays of a file by name."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: file[name] for name in file.files if name != "metadata"}
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def by_hand(path, data):
    """The published layout, from numpy and h5py alone: the names, dtypes and order."""
    values, classes = data.values, data.classes
    if path.suffix == ".npz":
        metadata = np.array({"title": "as published"}, dtype=object)
        np.savez_compressed(
            path, metadata=metadata, imgs=data.images, latents_classes=classes,
            latents_values=values,
        )  # fmt: skip
        return
    fields = {"imgs": data.images, "latents/classes": classes, "latents/values": values}
    if path.name.startswith("s"):
        fields = {"images": data.images, "labels": values}
    with h5py.File(path, "w") as file:
        for name, array in fields.items():
            file.create_dataset(name, data=array)


@pytest.mark.parametrize("module, name", FILES, ids=NAMES)
@pytest.mark.parametrize("chunk_rows", [7, 2048])
def test_our_file_equals_one_made_by_hand(module, name, chunk_rows, data, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "READ_ROWS", 4)
    monkeypatch.setattr(image_writing, "BLOCK_ROWS", 8)
    (tmp_path / "hand").mkdir()
    ours, hand, saved = tmp_path / name, tmp_path / "hand" / name, tmp_path / f"saved-{name}"
    assert module.write(ours, COUNT, seed=SEED, chunk_rows=chunk_rows) == COUNT
    by_hand(hand, data[module])
    data[module].save(saved)
    expected = arrays(hand)
    for path in (ours, saved):
        found = arrays(path)
        assert found.keys() == expected.keys()
        for field, array in expected.items():
            assert found[field].dtype == array.dtype and found[field].shape == array.shape
            assert (found[field] == array).all(), field
    for count in (None, 9):
        batches = [module.load(path, count, seed=2) for path in (ours, hand, saved)]
        for batch in batches:
            assert (batch.images == batches[0].images).all()
            assert (batch.classes == batches[0].classes).all()
        assert len(batches[0]) == (count or COUNT)
    assert {path.name for path in tmp_path.iterdir()} == {"hand", name, saved.name}


def test_the_metadata_are_those_of_the_published_file_and_own_up(tmp_path):
    dsprites.write(tmp_path / "d.npz", 3)
    with np.load(tmp_path / "d.npz", allow_pickle=True, encoding="latin1") as file:
        assert file["metadata"].shape == ()
        metadata = file["metadata"][()]
    assert tuple(metadata["latents_names"]) == dsprites.FACTORS
    assert metadata["latents_sizes"].tolist() == list(dsprites.SIZES)
    values = metadata["latents_possible_values"]
    assert np.allclose(values["orientation"], np.linspace(0, 2 * np.pi, 40))
    dsprites.write(tmp_path / "d.h5", 3)
    shapes3d.write(tmp_path / "s.h5", 3)
    said = [metadata["description"]]
    for name in ("d.h5", "s.h5"):
        with h5py.File(tmp_path / name) as file:
            said.append(file.attrs["description"])
    assert all("Not the published" in text and "rendered" in text for text in said)


def test_a_loader_never_opens_the_pickled_metadata(tmp_path):
    path = tmp_path / "d.npz"
    dsprites.write(path, 3)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["metadata.npy"] = b"no array"
    with zipfile.ZipFile(path, "w") as archive:
        for name, held in content.items():
            archive.writestr(name, held)
    assert len(dsprites.load(path)) == 3


def test_without_a_count_the_whole_set_in_its_own_order(tmp_path, monkeypatch):
    # All of it, but of a smaller set: the first factors have one class each.
    sizes = (1, 1, 1, 2, 2, 15)
    tables = tuple(table[:n] for table, n in zip(shapes3d.VALUES, sizes, strict=True))
    monkeypatch.setattr(
        shapes3d.Shapes3D, "factors", type(shapes3d.Shapes3D.factors)(shapes3d.FACTORS, tables)
    )
    assert shapes3d.write(tmp_path / "s.h5", chunk_rows=16) == 60
    labels = arrays(tmp_path / "s.h5")["labels"]
    assert (labels[:, 5] == np.tile(np.linspace(-30, 30, 15), 4)).all()
    assert (labels[:, 4] == np.tile(np.repeat([0, 1], 15), 2)).all()


@pytest.mark.parametrize("module, name", FILES, ids=NAMES)
def test_loading_needs_no_second_copy(module, name, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "READ_ROWS", 16)
    images = np.zeros((1000, *module.render(np.zeros((0, 6), np.int64)).shape[1:]), np.uint8)
    kind = type(module.rendered(1))
    kind(images, module.classes_of(np.arange(1000)), "").save(tmp_path / name)
    module.load(tmp_path / name, 1)  # imports
    tracemalloc.start()
    try:
        module.load(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.4 * images.nbytes
