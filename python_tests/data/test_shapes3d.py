"""Shapes3D: factor arithmetic, the renderer and its calibration, and the file loader."""

import os
import pathlib

import h5py
import numpy as np
import pytest

from sparsekern.data import CountError, DataError
from sparsekern.data.images import files as image_files
from sparsekern.data.images import shapes3d

RED, ORANGE, CYAN, BLUE = 0, 1, 5, 6
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)
MIDDLE = 7  # the orientation of 0 degrees


def draw(floor=RED, wall=CYAN, thing=BLUE, scale=4, shape=SPHERE, orientation=MIDDLE):
    return shapes3d.render(np.array([[floor, wall, thing, scale, shape, orientation]]))[0]


def object_pixels(**factors) -> np.ndarray:
    """Where a blue object covers the red floor and red walls: no other blue but the sky's."""
    image = draw(floor=RED, wall=RED, thing=BLUE, **factors).astype(int)
    return (image[..., 2] > 120) & (image[..., 0] < 100)


def test_index_and_classes_are_inverse():
    indices = np.array([0, 1, 14, 15, 60, 480, 4800, 48000, 479999, 123456])
    classes = shapes3d.classes_of(indices)
    assert (shapes3d.index_of(classes) == indices).all() and classes.dtype == np.int64
    assert classes[1].tolist() == [0, 0, 0, 0, 0, 1], "orientation changes fastest"
    assert classes[3].tolist() == [0, 0, 0, 0, 1, 0]
    assert classes[8].tolist() == [9, 9, 9, 7, 3, 14]
    assert np.prod(shapes3d.SIZES) == shapes3d.COUNT


def test_values_are_those_of_the_published_file():
    values = shapes3d.values_of(np.array([[3, 0, 9, 7, 3, 14], [0, 1, 0, 1, 0, 7]]))
    assert np.allclose(values, [[0.3, 0, 0.9, 1.25, 3, 30], [0, 0.1, 0, 0.82142857, 0, 0]])


@pytest.mark.parametrize("bad", [[-1], [480000]])
def test_classes_of_rejects_what_is_out_of_range(bad):
    with pytest.raises(ValueError, match=r"classes_of: indices must lie in 0\.\.479999"):
        shapes3d.classes_of(np.array(bad))


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((2, 5), np.int64), r"classes must be integers of shape \[\.\.\., 6\]"),
        (np.zeros((2, 6)), r"classes must be integers of shape \[\.\.\., 6\], got float64"),
        (np.array([[0, 0, 0, 0, 4, 0]]), "classes must lie below"),
        (np.array([[0, 0, 0, 0, -1, 0]]), "classes must lie below"),
    ],
)
def test_render_rejects_bad_classes(bad, message):
    with pytest.raises(ValueError, match=f"render: {message}"):
        shapes3d.render(bad)


def test_no_images():
    assert shapes3d.render(np.zeros((0, 6), np.int64)).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("shape", range(4))
def test_known_colours_at_known_places(shape):
    image = draw(shape=shape).astype(int)
    assert image.shape == (64, 64, 3)
    assert (image[:8] == [153, 226, 249]).all(), "sky"
    assert (image[60:, :20, 0] > 240).all() and (image[60:, :20, 1:] == 0).all(), "red floor"
    wall = image[22:36, 6:14]
    assert (wall[..., 1:] > 220).all() and (wall[..., 0] == 0).all(), "cyan wall"
    red, green, blue = image[44, 32]
    assert blue > 200 and red < 60 and green < 160, "blue object"


def test_the_four_shapes_stand_at_the_middle():
    boxes = []
    for shape in range(4):
        rows, columns = np.nonzero(object_pixels(shape=shape))
        assert abs((columns.min() + columns.max()) / 2 - 31.5) <= 1
        assert 48 <= rows.max() <= 57
        boxes.append((np.ptp(rows) + 1, np.ptp(columns) + 1))
    (_, _), (cylinder_height, cylinder_width), (height, width), (tall, narrow) = boxes
    assert abs(height - width) <= 2, "a sphere is round"
    assert tall > 1.5 * narrow, "a capsule is tall"
    assert cylinder_height >= cylinder_width - 3


@pytest.mark.parametrize("shape", range(4))
def test_objects_grow_with_scale(shape):
    areas = [object_pixels(shape=shape, scale=scale).sum() for scale in range(8)]
    assert (np.diff(areas) > 0).all()
    assert 2 < areas[-1] / areas[0] < 5


def test_orientation_turns_the_room():
    first, middle, last = (draw(orientation=turn).astype(int) for turn in (0, MIDDLE, 14))
    # The side walls are darker; at each end another one is seen, at 0 degrees neither.
    assert (middle[26:34, [2, 61], 1] > 200).all()
    assert (first[26:34, 61, 1] < 200).all() and (first[26:34, 2, 1] > 200).all()
    assert (last[26:34, 2, 1] < 200).all() and (last[26:34, 61, 1] > 200).all()


def test_the_object_casts_a_shadow_to_the_right():
    image = draw(shape=CUBE, scale=7).astype(int)
    assert (image[50:58, 44:54, 0] < 150).any() and (image[50:58, 2:12, 0] > 200).all()


def test_hues_change_nothing_but_their_region():
    base, floor, wall, thing = draw(), draw(floor=ORANGE), draw(wall=ORANGE), draw(thing=ORANGE)
    changed = [(other != base).any(-1) for other in (floor, wall, thing)]
    assert changed[0][62, 5] and changed[1][30, 10] and changed[2][44, 32]
    # Only pixels on an outline belong to two regions.
    assert (changed[0] & changed[1]).sum() < 150 and (changed[0] & changed[2]).sum() < 150


def test_batches_equal_single_images():
    classes = shapes3d.classes_of(np.random.default_rng(0).integers(0, shapes3d.COUNT, 20))
    classes[5:9, 3:] = classes[4, 3:]
    single = np.concatenate([shapes3d.render(row[None]) for row in classes])
    assert (shapes3d.render(classes) == single).all()


# Classes at which the renderer comes nearest to the frames, which carry no labels.
FRAMES = (
    (0, 1, 0, 5, 2, 4),
    (4, 7, 2, 4, 1, 5),
    (4, 5, 8, 0, 0, 6),
    (8, 3, 9, 4, 0, 10),
    (2, 8, 8, 0, 2, 4),
    (5, 9, 6, 1, 1, 7),
    (5, 5, 1, 0, 0, 10),
    (9, 2, 9, 5, 0, 11),
    (7, 2, 6, 1, 2, 2),
    (0, 6, 6, 0, 3, 7),
    (4, 7, 4, 6, 1, 3),
    (3, 3, 2, 1, 1, 1),
    (4, 4, 1, 1, 1, 7),
    (0, 9, 8, 0, 1, 2),
    (0, 1, 5, 1, 0, 0),
    (0, 9, 5, 1, 2, 2),
    (0, 3, 5, 5, 0, 8),
    (0, 1, 3, 5, 1, 12),
    (0, 4, 4, 1, 1, 0),
    (0, 8, 0, 1, 3, 13),
    (0, 6, 7, 3, 0, 11),
    (0, 1, 2, 1, 0, 10),
    (0, 6, 4, 0, 0, 14),
    (0, 1, 0, 6, 1, 7),
    (0, 4, 3, 5, 3, 2),
)


@pytest.fixture
def frames() -> np.ndarray:
    default = pathlib.Path(__file__).parents[3] / "shared" / "data" / "shapes3d_frames.npz"
    path = pathlib.Path(os.environ.get("SHAPES3D_FRAMES", default))
    if not path.is_file():
        pytest.skip(
            f"no frames at {path}: put the 25 frames of the published 3dshapes.gif there "
            "(.npz, images: uint8 [25, 64, 64, 3]), or set SHAPES3D_FRAMES to their path"
        )
    with np.load(path) as file:
        return file["images"]


def test_calibration_on_frames_of_the_published_animation(frames):
    assert frames.shape == (len(FRAMES), 64, 64, 3)
    images = shapes3d.render(np.array(FRAMES)).astype(float)
    error = np.abs(images - frames).mean((1, 2, 3))
    print(f"mean absolute error of 255: {error.mean():.2f}, by frame {np.round(error, 1).tolist()}")
    # What is left is mostly outlines: the frames were cropped about half a pixel off, each its way.
    assert error.mean() <= 5
    assert error.max() <= 6.5


def test_rendered_subsets_are_deterministic_and_nested():
    small, large = shapes3d.rendered(5, seed=3), shapes3d.rendered(12, seed=3)
    assert (small.images == large.images[:5]).all()
    assert (small.classes == large.classes[:5]).all()
    assert (shapes3d.rendered(5, seed=4).classes != small.classes).any()
    assert small.images.shape == (5, 64, 64, 3) and small.images.dtype == np.uint8
    assert small.values.shape == (5, 6) and len(small) == 5


@pytest.mark.parametrize("count", [0, -1, 480001])
def test_rendered_rejects_a_count_out_of_range(count):
    with pytest.raises(CountError, match=r"rendered: count must lie in 1\.\.480000"):
        shapes3d.rendered(count)


@pytest.fixture(scope="module")
def data():
    return shapes3d.rendered(40, seed=1)


def write(path, images, labels):
    with h5py.File(path, "w") as file:
        for name, array in (("images", images), ("labels", labels)):
            if array is not None:
                file.create_dataset(name, data=array, compression="gzip")
    return path


@pytest.fixture
def hdf5(data, tmp_path):
    return write(tmp_path / "3dshapes.h5", data.images, data.values)


@pytest.mark.parametrize("block", [7, 4096])
def test_load_reads_all_or_a_subset(block, data, hdf5, monkeypatch):
    monkeypatch.setattr(image_files, "READ_ROWS", block)
    whole = shapes3d.load(hdf5)
    assert (whole.images == data.images).all() and (whole.classes == data.classes).all()
    assert whole.source == str(hdf5)
    chosen = np.random.default_rng(5).permutation(40)[:11]
    part = shapes3d.load(hdf5, 11, seed=5)
    assert (part.images == data.images[chosen]).all()
    assert (part.classes == data.classes[chosen]).all()


def test_labels_of_single_precision(data, tmp_path):
    path = write(tmp_path / "single.h5", data.images, data.values.astype(np.float32))
    assert (shapes3d.load(path).classes == data.classes).all()


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=f"^data file not found: {tmp_path}/no.h5$"):
        shapes3d.load(tmp_path / "no.h5")


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "notes.txt"
    for content in (b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"another layout: .* is not HDF5"):
            shapes3d.load(path)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9])
def test_a_truncated_file(kept, hdf5):
    content = hdf5.read_bytes()
    hdf5.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="data file is truncated or damaged"):
        shapes3d.load(hdf5)


def test_a_damaged_file(hdf5):
    with h5py.File(hdf5) as file:
        chunk = file["images"].id.get_chunk_info(0)
    content = bytearray(hdf5.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    hdf5.write_bytes(content)
    with pytest.raises(DataError, match="data file is truncated or damaged"):
        shapes3d.load(hdf5)


BAD_FIELDS = {
    "has no field 'images'": {"images": lambda a: None},
    "has no field 'labels'": {"labels": lambda a: None},
    r"images must be uint8 \[n, 64, 64, 3\], got uint8 \[40, 64, 192\]": {
        "images": lambda a: a.reshape(40, 64, 192)
    },
    "images must be uint8": {"images": lambda a: a.astype(np.float32)},
    r"labels must be floats \[40, 6\], got float64 \[39, 6\]": {"labels": lambda a: a[:39]},
    "labels must be floats": {"labels": lambda a: a.astype(np.int64)},
    r"labels of floor_hue must lie on 0, 0.1, \.\.\., 0.9": {"labels": lambda a: a + 0.03},
    "labels of orientation must lie on -30.*got nan": {
        "labels": lambda a: a * [1, 1, 1, 1, 1, np.nan]
    },
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_a_file_of_another_layout(message, data, tmp_path):
    arrays = {"images": data.images, "labels": data.values}
    for name, change in BAD_FIELDS[message].items():
        arrays[name] = change(arrays[name])
    path = write(tmp_path / "other.h5", **arrays)
    with pytest.raises(DataError, match=f"another layout: .*{message}"):
        shapes3d.load(path)


def test_more_images_than_the_file_holds(hdf5):
    with pytest.raises(CountError, match=r"count must lie in 1\.\.40 \(the number of images\)"):
        shapes3d.load(hdf5, 41)
