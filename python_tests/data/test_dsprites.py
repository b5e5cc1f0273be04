"""dSprites: factor arithmetic, the renderer's calibration, and the file loaders."""

import io
import os
import pathlib
import zipfile

import h5py
import numpy as np
import pytest
import torch

from sparsekern.data import DataError, load, rendered
from sparsekern.data.images import dsprites
from sparsekern.data.images import files as image_files

CENTRE = (16, 16)


def draw(shape: int, scale: int = 5, orientation: int = 0, x: int = 16, y: int = 16) -> np.ndarray:
    return dsprites.render(np.array([[0, shape, scale, orientation, x, y]]))[0]


def test_index_and_classes_are_inverse():
    indices = np.array([0, 1, 31, 32, 1024, 40960, 245760, 737279, 123456])
    classes = dsprites.classes_of(indices)
    assert (dsprites.index_of(classes) == indices).all()
    assert classes[1].tolist() == [0, 0, 0, 0, 0, 1], "posY changes fastest"
    assert classes[6].tolist() == [0, 1, 0, 0, 0, 0]
    assert classes[7].tolist() == [0, 2, 5, 39, 31, 31]


def test_values_are_those_of_the_published_file():
    values = dsprites.values_of(np.array([[0, 2, 0, 39, 31, 0], [0, 0, 5, 0, 0, 31]]))
    assert np.allclose(values, [[1, 3, 0.5, 2 * np.pi, 1, 0], [1, 1, 1.0, 0, 0, 1]])


@pytest.mark.parametrize("bad", [[-1], [737280]])
def test_classes_of_rejects_what_is_out_of_range(bad):
    with pytest.raises(ValueError, match=r"classes_of: indices must lie in 0\.\.737279"):
        dsprites.classes_of(np.array(bad))


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((2, 5), np.int64), r"classes must be integers of shape \[\.\.\., 6\]"),
        (np.zeros((2, 6)), r"classes must be integers of shape \[\.\.\., 6\], got float64"),
        (np.array([[0, 3, 0, 0, 0, 0]]), "classes must lie below"),
    ],
)
def test_render_rejects_bad_classes(bad, message):
    with pytest.raises(ValueError, match=message):
        dsprites.render(bad)


@pytest.mark.parametrize(
    "shape, orientation, position, area",
    [  # areas counted on frames of the published animation
        (0, 0, 0, 400),
        (0, 2, 0, 372),
        (0, 14, 0, 368),
        (1, 6, 0, 286),
        (1, 18, 0, 288),
        (2, 6, 0, 227),
        (2, 14, 0, 225),
    ],
)
def test_areas_at_full_scale(shape, orientation, position, area):
    assert draw(shape, orientation=orientation, x=position, y=position).sum() == area


@pytest.mark.parametrize("shape, areas", [(0, (100, 256)), (1, (76, 184)), (2, (58, 140))])
def test_areas_at_smaller_scales(shape, areas):
    assert [draw(shape, scale, x=0, y=0).sum() for scale in (0, 3)] == list(areas)


def test_an_aligned_square_is_twenty_pixels_wide_at_the_corner_position():
    image = draw(0, x=0, y=0)
    assert image[6:26, 6:26].all() and image.sum() == 400


@pytest.mark.parametrize("shape", range(3))
def test_first_and_last_orientation_look_the_same(shape):
    assert (draw(shape, orientation=0) == draw(shape, orientation=39)).all()
    assert (draw(shape, orientation=0) != draw(shape, orientation=15)).any()


@pytest.mark.parametrize("shape", range(3))
def test_position_moves_the_centre(shape):
    for x, y in ((0, 31), (31, 0), (7, 20)):
        rows, columns = np.nonzero(draw(shape, orientation=0, x=x, y=y))
        middle_x, middle_y = columns.min() + columns.max() + 1, rows.min() + rows.max() + 1
        assert abs(middle_x / 2 - (16 + 32 * x / 31)) <= 0.5
        assert abs(middle_y / 2 - (16 + 32 * y / 31)) <= (3 if shape == 2 else 0.5)


def test_the_heart_points_down_and_mirrors():
    # At posX 0 the centre lies between two pixels, so the mirror image is exact.
    image = draw(2, x=0, y=0)
    assert (image[:, :32] == image[:, 31::-1]).all()
    rows = np.flatnonzero(image.any(1))
    assert image[rows[-1]].sum() < image[rows[len(rows) // 3]].sum()


def test_the_window_loses_no_pixel():
    # The same sprites drawn over the whole image, without the window.
    classes = dsprites.classes_of(np.random.default_rng(0).integers(0, dsprites.COUNT, 300))
    centre = 16 + 32 * classes[:, 4:] / 31
    angle = -2 * np.pi * (classes[:, 3] % 39)[:, None, None] / 39
    scale = dsprites.values_of(classes)[:, 2, None, None]
    grid = np.arange(64) + 0.5
    dx = (grid - centre[:, :1])[:, None, :] / scale
    dy = (grid - centre[:, 1:])[:, :, None] / scale
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    outlines = (dsprites._in_square, dsprites._in_ellipse, dsprites._in_heart)
    whole = np.select(
        [classes[:, 1, None, None] == shape for shape in range(3)],
        [inside(torch.from_numpy(u), torch.from_numpy(v)).numpy() for inside in outlines],
    )
    # The two forms of the distance round differently, so a pixel on the very outline may differ.
    assert (whole != dsprites.render(classes)).sum() <= 3


@pytest.fixture
def frames():
    default = pathlib.Path(__file__).parents[3] / "shared" / "data" / "dsprites_frames.npz"
    path = pathlib.Path(os.environ.get("DSPRITES_FRAMES", default))
    if not path.is_file():
        pytest.skip(
            f"no frames at {path}: put frames of the published dsprites.gif there (.npz, imgs: "
            "uint8 [n, 64, 64] of 0 and 1, frame: their numbers), or set DSPRITES_FRAMES to it"
        )
    with np.load(path) as file:
        return file["imgs"], file["frame"]


def test_calibration_on_frames_of_the_published_animation(frames):
    # The animation shows hearts, ellipses from frame 192 on, squares from frame 256 on; it turns
    # and scales them at the first position, and moves them along the border at scale 1.
    images, numbers = frames
    shapes = np.select([numbers < 192, numbers < 256], [2, 1], 0)
    turned = [(s, o, 0, 0) for s in range(6) for o in range(40)]
    moved = [(5, 0, x, y) for x in range(32) for y in range(32) if {x, y} & {0, 31}]
    wrong = np.empty(len(images))
    for shape in range(3):
        rows = np.flatnonzero(shapes == shape)
        drawn = dsprites.render(np.array([(0, shape, *rest) for rest in turned + moved]))
        differs = drawn[None] != images[rows][:, None]
        wrong[rows] = differs.sum((2, 3)).min(1)
    exact = (wrong == 0).mean()
    print(f"{wrong.mean():.3f} wrong pixels a frame, {exact:.1%} of {len(wrong)} frames exact")
    assert wrong.mean() <= 0.6
    assert exact >= 0.75


def test_rendered_subsets_are_deterministic_and_nested():
    small, large, other = rendered(20, seed=3), rendered(50, seed=3), rendered(20, seed=4)
    assert (small.images == large.images[:20]).all()
    assert (small.classes == large.classes[:20]).all()
    assert (small.classes != other.classes).any()
    assert small.images.shape == (20, 64, 64) and small.images.dtype == np.uint8
    assert small.classes.dtype == np.int64 and small.values.shape == (20, 6)
    assert len(np.unique(dsprites.index_of(large.classes))) == 50


@pytest.mark.parametrize("count", [0, -1, 737281])
def test_rendered_rejects_a_count_out_of_range(count):
    with pytest.raises(DataError, match=r"rendered: count must lie in 1\.\.737280"):
        rendered(count)


def test_split_gives_disjoint_parts_and_names_what_is_too_much():
    data = rendered(10)
    first, second = data.split(6, 3)
    assert (np.concatenate([first.classes, second.classes]) == data.classes[:9]).all()
    with pytest.raises(ValueError, match=r"at most 10 .* got 6 \+ 5 = 11"):
        data.split(6, 5)


@pytest.fixture
def data():
    return rendered(40, seed=1)


@pytest.fixture
def npz(data, tmp_path):
    path = tmp_path / "sprites.npz"
    np.savez_compressed(
        path,
        imgs=data.images,
        latents_values=data.values,
        latents_classes=data.classes,
        metadata=np.array({"title": "pickled, as in the published file"}, dtype=object),
    )
    return path


@pytest.fixture
def hdf5(data, tmp_path):
    path = tmp_path / "sprites.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("imgs", data=data.images, compression="gzip")
        file.create_dataset("latents/classes", data=data.classes)
        file.create_dataset("latents/values", data=data.values)
    return path


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
@pytest.mark.parametrize("block", [7, 4096])
def test_load_reads_all_or_a_subset(kind, block, data, request, monkeypatch):
    monkeypatch.setattr(image_files, "READ_ROWS", block)
    path = request.getfixturevalue(kind)
    whole = load(path)
    assert (whole.images == data.images).all() and (whole.classes == data.classes).all()
    assert whole.source == str(path)
    chosen = np.random.default_rng(5).permutation(40)[:11]
    part = load(path, 11, seed=5)
    assert (part.images == data.images[chosen]).all()
    assert (part.classes == data.classes[chosen]).all()


def test_save_writes_what_load_reads(data, tmp_path):
    data.save(tmp_path / "cache.npz")
    again = load(tmp_path / "cache.npz")
    assert (again.images == data.images).all() and (again.classes == data.classes).all()
    with np.load(tmp_path / "cache.npz") as file:
        assert np.allclose(file["latents_values"], data.values)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=f"^data file not found: {tmp_path}/no.npz$"):
        load(tmp_path / "no.npz")


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_file(kind, kept, request):
    path = request.getfixturevalue(kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="data file is truncated or damaged"):
        load(path)


def test_a_damaged_npz(npz):
    content = bytearray(npz.read_bytes())
    content[300:400] = bytes(100)
    npz.write_bytes(content)
    with pytest.raises(DataError, match="data file is truncated or damaged"):
        load(npz)


def test_an_array_that_ends_early(npz, data):
    with zipfile.ZipFile(npz, "w") as archive:
        for name, array in (("imgs", data.images), ("latents_classes", data.classes)):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(
                    file, np.lib.format.header_data_from_array_1_0(array)
                )
                file.write(array.tobytes()[:-5])
    with pytest.raises(DataError, match=r"truncated or damaged: .*imgs ends after 39 rows"):
        load(npz)


def write_npz(path, data, header):
    """An .npz whose arrays start with ``header(array)``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in (("imgs", data.images), ("latents_classes", data.classes)):
            archive.writestr(f"{name}.npy", header(array) + array.tobytes())


def header_of(version):
    def header(array):
        stream = io.BytesIO()
        facts = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_2_0(stream, facts)
        return stream.getvalue().replace(b"NUMPY\x02", b"NUMPY" + bytes([version]), 1)

    return header


@pytest.mark.parametrize("version", [2, 3])
def test_every_version_of_numpys_header(version, npz, data):
    write_npz(npz, data, header_of(version))
    assert (np.load(npz)["imgs"] == data.images).all()
    whole = load(npz)
    assert (whole.images == data.images).all() and (whole.classes == data.classes).all()


@pytest.mark.parametrize(
    "header, message",
    [
        (lambda array: b"what is this", "imgs.npy: the magic string is not correct"),
        (lambda array: b"\x93NUMPY\x01\x00\x08\x00nonsense", "imgs.npy: malformed node"),
        (lambda array: b"\x93NUMPY\x01\x00\x08\x00{'descr'", "imgs.npy: .*EOF"),
        (lambda array: b"\x93NUMPY\x01\x00\x08\x00{[]: 10}", "imgs.npy: unhashable"),
        (header_of(4), "imgs.npy: its header has version 4.0, known are 1.0, 2.0, 3.0"),
    ],
)
def test_an_array_with_a_damaged_header(header, message, npz, data):
    write_npz(npz, data, header)
    with pytest.raises(DataError, match=f"truncated or damaged: {npz} .{message}"):
        load(npz)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"another layout: .* is neither .npz nor HDF5"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"is neither .npz nor HDF5"):
        load(path)


BAD_FIELDS = {
    "no field 'latents_classes'": {"latents_classes": None},
    r"imgs must be uint8 \[n, 64, 64\], got uint8 \[40, 32, 128\]": {
        "imgs": lambda a: a.reshape(40, 32, 128)
    },
    "imgs must be uint8": {"imgs": lambda a: a.astype(np.float32)},
    r"latents_classes must be integers \[40, 6\], got int64 \[39, 6\]": {
        "latents_classes": lambda a: a[:39]
    },
    "latents_classes must be integers": {"latents_classes": lambda a: a.astype(np.float64)},
    "imgs must hold 0 and 1, got 255": {"imgs": lambda a: a * 255},
    "latents_classes must lie below": {"latents_classes": lambda a: a + 1},
    "row-major": {"imgs": np.asfortranarray},
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_a_file_of_another_layout(message, data, tmp_path):
    arrays = {"imgs": data.images, "latents_classes": data.classes}
    for name, change in BAD_FIELDS[message].items():
        array = arrays.pop(name)
        if change is not None:
            arrays[name] = change(array)
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(DataError, match=f"another layout: .*{message}"):
        load(tmp_path / "other.npz")


def test_hdf5_of_another_layout(hdf5):
    with h5py.File(hdf5, "a") as file:
        del file["latents"]
    with pytest.raises(DataError, match=r"another layout: .* has no field 'latents/classes'"):
        load(hdf5)


def test_more_images_than_the_file_holds(npz):
    with pytest.raises(DataError, match=r"count must lie in 1\.\.40 \(the number of images\)"):
        load(npz, 41)
