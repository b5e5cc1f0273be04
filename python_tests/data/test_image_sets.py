"""What the image sets with known factors share: shapes and kinds of classes, parts, saving."""

import time

import numpy as np
import pytest
import torch

import sparsekern.data
from sparsekern.data import DSprites, Shapes3D
from sparsekern.data.images import dsprites, shapes3d

MODULES = (dsprites, shapes3d)
SHAPES = {dsprites: (64, 64), shapes3d: (64, 64, 3)}
KINDS = {dsprites: DSprites, shapes3d: Shapes3D}
both = pytest.mark.parametrize("module", MODULES, ids=["dsprites", "shapes3d"])


def some_classes(module, count=12):
    return module.classes_of(np.random.default_rng(0).integers(0, module.COUNT, count))


@both
def test_the_constants_agree_with_the_tables(module):
    factors = KINDS[module].factors
    assert factors.sizes == module.SIZES and factors.count == module.COUNT
    assert tuple(factors.bases.tolist()) == module.BASES and factors.names == module.FACTORS


@both
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (12,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("from_torch", [False, True])
def test_any_leading_dimensions(module, leading, from_torch):
    flat = some_classes(module)[: int(np.prod(leading))]
    expected = module.render(flat).reshape(*leading, *SHAPES[module])
    classes = flat.reshape(*leading, 6)
    images = module.render(torch.from_numpy(classes) if from_torch else classes)
    assert isinstance(images, torch.Tensor if from_torch else np.ndarray)
    assert images.dtype == (torch.uint8 if from_torch else np.uint8)
    assert tuple(images.shape) == (*leading, *SHAPES[module])
    assert (np.asarray(images) == expected).all()
    indices = module.index_of(classes)
    assert indices.shape == leading and (module.classes_of(indices) == classes).all()
    assert module.values_of(classes).shape == classes.shape


@both
def test_any_integers_in_any_memory(module):
    classes = some_classes(module)
    expected = module.render(classes)
    for dtype in (np.uint8, np.int32, np.uint64):
        assert (module.render(classes.astype(dtype)) == expected).all()
    for dtype in (torch.uint8, torch.int16):
        assert (module.render(torch.from_numpy(classes).to(dtype)).numpy() == expected).all()
    assert (module.render(classes.tolist()) == expected).all()
    assert (module.render(classes[::-1]) == expected[::-1]).all()
    read_only = np.asfortranarray(classes)
    read_only.flags.writeable = False
    assert (module.render(read_only) == expected).all()
    assert (module.render(torch.from_numpy(classes.T.copy()).T).numpy() == expected).all()


@both
@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(2, 6), r"integers of shape \[\.\.\., 6\], got float32 \[2, 6\]"),
        (torch.zeros(2, 6, dtype=torch.bool), r"integers of shape .*, got bool \[2, 6\]"),
        (torch.tensor(3), r"integers of shape .*, got int64 \[\]"),
        (torch.full((6,), -1), "classes must lie below"),
        (np.full((1, 6), 2**64 - 1, np.uint64), "classes must lie below"),
        (np.zeros((6, 2), int), r"integers of shape .*, got int64 \[6, 2\]"),
    ],
)
def test_bad_classes(module, bad, message):
    with pytest.raises(ValueError, match=f"^render: classes must .*{message}|^render: {message}"):
        module.render(bad)


@both
def test_rendering_keeps_the_number_of_threads_and_changes_no_input(module):
    classes = torch.from_numpy(some_classes(module))
    before, threads = classes.clone(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        module.render(classes)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (classes == before).all()


@both
def test_a_gpu_draws_what_a_cpu_draws(module):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use: run this test on a machine with one")
    classes = torch.from_numpy(some_classes(module, 3000))
    images = module.render(classes.cuda())
    assert images.is_cuda
    wrong = (images.cpu() != module.render(classes)).float().mean()
    # Sines and roots round differently, and a pixel may lie on an outline.
    assert wrong < 1e-5


@both
def test_blocks_do_not_matter(module, monkeypatch):
    classes = some_classes(module, 40)
    expected = module.render(classes)
    monkeypatch.setattr(module, "CPU_BLOCK", 3)
    assert (module.render(classes) == expected).all()


@both
def test_speed(module):
    """5,000 images a second in a random order; about a tenth of what one quiet core does."""
    classes = module.classes_of(np.random.default_rng(1).permutation(module.COUNT)[:1500])
    classes[:, 3] = 0  # fewer combinations for Shapes3D to trace, which happens once
    module.render(classes)
    rates = []
    for _ in range(5):
        start = time.process_time()  # not what other processes take
        module.render(classes)
        rates.append(len(classes) / (time.process_time() - start))
    assert max(rates) >= 5000


@both
def test_split_and_save(module, tmp_path):
    data = module.rendered(10, seed=2)
    parts = data.split(6, 0, 3)
    assert [len(part) for part in parts] == [6, 0, 3]
    assert all(type(part) is KINDS[module] and part.source == data.source for part in parts)
    assert (np.concatenate([part.images for part in parts]) == data.images[:9]).all()
    name = KINDS[module].__name__
    with pytest.raises(ValueError, match=rf"{name}.split: sizes .* at most 10 .* got 6 \+ 5 = 11"):
        data.split(6, 5)
    with pytest.raises(ValueError, match=rf"{name}.split: sizes must be at least 0, got -1"):
        data.split(3, -1)
    for path in (tmp_path / "again.h5", tmp_path / "again.HDF5"):
        parts[2].save(path)
        again = module.load(path)
        assert (again.images == parts[2].images).all()
        assert (again.classes == parts[2].classes).all()
        assert (again.values == parts[2].values).all()
    with pytest.raises(ValueError, match=rf"{name}.save: path must end in .*, got .*again.txt"):
        data.save(tmp_path / "again.txt")


@both
def test_a_negative_seed_is_no_damage(module, tmp_path):
    module.rendered(3).save(tmp_path / "few.h5")
    for call in (
        lambda: module.load(tmp_path / "few.h5", 2, seed=-1),
        lambda: module.rendered(2, seed=-1),
    ):
        with pytest.raises(ValueError, match=r"^(load|rendered): seed must be at least 0, got -1$"):
            call()


def test_the_package_exports_the_sets():
    assert sparsekern.data.load is dsprites.load and sparsekern.data.rendered is dsprites.rendered
    for name in ("dsprites", "shapes3d", "DSprites", "Shapes3D", "WritingInterrupted"):
        assert name in sparsekern.data.__all__ and hasattr(sparsekern.data, name)
