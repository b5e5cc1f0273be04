"""The activation store: order, resuming, prefetching, formats, and bad files."""

import pickle
import threading

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_alone import run_after_torch

from sparsekern.data import ActivationStore, DataError
from sparsekern.data.activations import order as activation_order
from sparsekern.data.prefetch import prefetched

SIZES = (103, 57, 211)  # rows of three files, none a multiple of a chunk, block or batch
CHUNKS = (10, 7, None)
TOKENS = sum(SIZES)
BUFFER = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def numbered(start: int, count: int) -> np.ndarray:
    """Rows [count, 3] that say their number, exactly in float32."""
    return np.arange(start, start + count, dtype=np.float32)[:, None] * [[1, -1, 2]]


def put(path, array: np.ndarray, chunk: int | None = None, **attributes) -> None:
    chunks = None if chunk is None else (chunk, array.shape[1])
    with h5py.File(path, "w") as file:
        file.create_dataset("activations", data=array, chunks=chunks).attrs.update(attributes)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, made, start = tmp_path_factory.mktemp("activations"), [], 0
    for number, (size, chunk) in enumerate(zip(SIZES, CHUNKS, strict=True)):
        made.append(folder / f"{number}.h5")
        put(made[-1], numbered(start, size).astype(np.float32), chunk)
        start += size
    return made


@pytest.fixture
def store(paths):
    with ActivationStore(paths) as store:
        yield store


def batches(store, size=23, **options):
    return list(store.batches(size, **{"seed": 1, "buffer_rows": BUFFER, **options}))


def numbers(found) -> list[int]:
    rows = torch.cat(found)
    assert torch.equal(rows, rows[:, :1] * torch.tensor([1.0, -1.0, 2.0])), "rows came apart"
    return rows[:, 0].int().tolist()


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 23, 64, 371, 10**15])
@pytest.mark.parametrize("buffer_rows", [1, 5, 64, 10_000])
def test_an_epoch_is_a_permutation_of_all_rows(store, size, buffer_rows):
    found = batches(store, size, buffer_rows=buffer_rows)
    assert len(found) == store.count_batches(size)
    assert all(len(batch) == size for batch in found[:-1]) and 1 <= len(found[-1]) <= size
    assert sorted(numbers(found)) == list(range(TOKENS))


def test_the_order_follows_from_seed_and_epoch(store):
    order = numbers(batches(store))
    assert order == numbers(batches(store)) == numbers(batches(store, seed=1, epoch=0))
    others = [numbers(batches(store, **{"seed": s, "epoch": e})) for s, e in ((1, 1), (2, 0))]
    assert order != others[0] and order != others[1] and others[0] != others[1]


def test_the_order_of_rows_does_not_depend_on_the_batch_size(store):
    assert numbers(batches(store, 23)) == numbers(batches(store, 90))


def test_the_order_is_the_same_in_every_version(store):
    # A run of an earlier version must resume to its order: this list never changes.
    assert numbers(batches(store))[:10] == [90, 204, 23, 194, 275, 21, 195, 139, 27, 144]


def test_a_group_draws_from_all_over_the_files(store):
    first_group = np.array(numbers(batches(store, BUFFER))[:50])
    for start, size in zip((0, 103, 160), SIZES, strict=True):
        assert ((first_group >= start) & (first_group < start + size)).any()


def test_without_shuffling_the_rows_keep_the_order_of_the_files(store):
    assert numbers(batches(store, shuffle=False)) == list(range(TOKENS))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("size", [23, 100])
def test_a_pass_that_starts_later_is_the_tail_of_a_full_one(store, size, prefetch):
    for shuffle in (True, False):
        full = batches(store, size, epoch=3, shuffle=shuffle)
        for start in range(len(full) + 1):
            tail = batches(store, size, epoch=3, shuffle=shuffle, start=start, prefetch=prefetch)
            assert len(tail) == len(full) - start
            assert all(map(torch.equal, tail, full[start:]))


def test_starting_later_reads_no_group_before(store, monkeypatch):
    groups, read = [], store._read
    monkeypatch.setattr(store, "_read", lambda *given: groups.append(given) or read(*given))
    total = store.count_batches(23)
    batches(store, start=total - 1)
    assert len(groups) == 1
    assert batches(store, start=total) == [] and len(groups) == 1


def test_prefetching_changes_nothing(store):
    assert all(map(torch.equal, batches(store), batches(store, prefetch=False)))


def test_two_passes_at_once_do_not_disturb_each_other(store):
    pairs = zip(
        store.batches(23, seed=1, buffer_rows=BUFFER),
        store.batches(23, seed=2, buffer_rows=BUFFER),
        strict=True,
    )
    ones, twos = zip(*pairs, strict=True)
    assert all(map(torch.equal, ones, batches(store)))
    assert all(map(torch.equal, twos, batches(store, seed=2)))


def test_a_batch_is_its_own_memory(store):
    kept = [batch.zero_() for batch in store.batches(23, seed=1, buffer_rows=BUFFER)]
    assert sum(len(batch) for batch in kept) == TOKENS
    assert sorted(numbers(batches(store))) == list(range(TOKENS))


# -- memory and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_rows", [1, 3, 64, 100, 371, 400])
def test_no_group_is_larger_than_the_buffer(store, buffer_rows):
    no_rows = [np.empty(0, np.int64)] * 3
    plan = activation_order.plan_epoch(store._files, no_rows, buffer_rows, (0, 0))
    sizes = [sum(stop - start for _, start, stop in plan.blocks_of(g)) for g in range(plan.groups)]
    assert sum(sizes) == TOKENS and max(sizes) == plan.capacity <= buffer_rows
    assert len(sizes) <= 2 * -(-TOKENS // buffer_rows), "groups are filled"


def test_blocks_are_whole_chunks(store):
    for buffer_rows in (160, 1000, 10**6):
        for file, chunk in zip(store._files, CHUNKS, strict=True):
            rows = activation_order.block_rows(file, buffer_rows)
            assert chunk is None or rows % chunk == 0 or rows == file.tokens
            assert rows <= max(buffer_rows // 16, chunk or 1)


def test_two_groups_are_in_memory(store, monkeypatch):
    made, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    batches(store)
    large = [tensor for tensor in made if len(tensor) > 23]  # no batch, no part of one
    assert len(large) == 2 and all(len(tensor) <= BUFFER for tensor in large)


def prefetchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "sparsekern-prefetch"]


def test_no_thread_is_left(store):
    options = {"seed": 0, "buffer_rows": BUFFER}
    for _ in store.batches(5, **options):
        assert prefetchers()
        break
    assert not prefetchers(), "after a break"
    list(store.batches(5, **options))
    assert not prefetchers(), "at the end"
    with pytest.raises(KeyError):
        for _ in store.batches(5, **options):
            raise KeyError
    assert not prefetchers(), "after an exception of the consumer"
    iterator = store.batches(5, **options)
    next(iterator)
    iterator.close()
    assert not prefetchers(), "after closing"
    store.batches(5, **options)
    assert not prefetchers(), "never started"


def test_an_error_of_the_thread_reaches_the_consumer(tmp_path):
    array = numbered(0, 300).astype(np.float32)
    array[250, 1] = np.nan
    put(tmp_path / "a.h5", array, 10)
    with ActivationStore(tmp_path / "a.h5") as store:
        iterator = store.batches(10, seed=0, buffer_rows=20, shuffle=False)
        good = []
        with pytest.raises(DataError, match="row 250 of "):
            for batch in iterator:
                good.append(batch)
    assert numbers(good) == list(range(240)), "everything before the bad group came"
    assert not prefetchers()


def test_prefetching_stays_within_its_bound():
    made = []

    def source():
        for i in range(20):
            made.append(i)
            yield i

    items = prefetched(source(), ahead=2)
    taken = [next(items)]
    for item in items:
        assert len(made) <= taken[-1] + 1 + 3
        taken.append(item)
    assert taken == list(range(20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run bench/gpu.sh on one")
def test_batches_on_a_gpu(store):
    on_gpu = batches(store, device="cuda")
    assert all(batch.is_cuda for batch in on_gpu)
    assert all(map(torch.equal, (batch.cpu() for batch in on_gpu), batches(store)))


# -- formats ---------------------------------------------------------------------------------------


def random_rows(dtype: torch.dtype, rows: int = 70, features: int = 5) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(3)).to(dtype)


def save(path, rows: torch.Tensor, **options) -> None:
    """Writes a tensor into the file kind of the suffix."""
    if path.suffix == ".safetensors":
        save_file({"activations": rows}, path)
        return
    half = rows.dtype == torch.bfloat16
    array = (rows.view(torch.uint16) if half else rows).numpy()
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("activations", data=array, **options)
            if half:
                file["activations"].attrs["dtype"] = "bfloat16"


KINDS = [
    ("a.h5", {}),
    ("a.hdf5", {"chunks": (8, 5)}),
    ("narrow.h5", {"chunks": (9, 2)}),
    ("packed.h5", {"chunks": (8, 5), "compression": "gzip", "shuffle": True}),
    ("a.npy", {}),
    ("a.safetensors", {}),
]


@pytest.mark.parametrize(
    "name, options, dtype",
    # numpy has no bfloat16; as uint16 it is refused, see test_activation_files.py
    [(*kind, d) for kind in KINDS for d in DTYPES if (kind[0], d) != ("a.npy", torch.bfloat16)],
)
def test_every_kind_of_file_is_read_to_the_bit(name, options, dtype, tmp_path):
    rows = random_rows(dtype)
    save(tmp_path / name, rows, **options)
    with ActivationStore(tmp_path / name) as store:
        assert (store.tokens, store.features, store.dtype) == (70, 5, dtype)
        assert store.directions is None and store.paths == (tmp_path / name,)
        kept = torch.cat(batches(store, 16, shuffle=False, dtype=dtype))
        assert kept.dtype == dtype and torch.equal(kept, rows)
        wide = torch.cat(batches(store, 16, shuffle=False))
        assert wide.dtype == torch.float32 and torch.equal(wide, rows.float())
        found = torch.cat(batches(store, 16, buffer_rows=20))
        assert torch.equal(*(t.sort(0).values for t in (found, rows.float())))


def test_files_of_several_kinds_follow_each_other(tmp_path):
    rows = random_rows(torch.float16)
    names = [tmp_path / name for name in ("a.safetensors", "b.npy", "c.h5")]
    for path, part in zip(names, rows.split([20, 19, 31]), strict=True):
        save(path, part.clone())
    with ActivationStore(names) as store:
        assert torch.equal(torch.cat(batches(store, shuffle=False, dtype=torch.float16)), rows)


def test_big_endian_files_are_read(tmp_path):
    rows = random_rows(torch.float32)
    put(tmp_path / "a.h5", rows.numpy().astype(">f4"))
    np.save(tmp_path / "b.npy", rows.numpy().astype(">f4"))
    with ActivationStore([tmp_path / "a.h5", tmp_path / "b.npy"]) as store:
        assert torch.equal(torch.cat(batches(store, shuffle=False)), rows.repeat(2, 1))


def test_hdf5_files_after_a_user_block_and_with_rows_never_written(tmp_path):
    rows = numbered(0, 40).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("activations", data=rows, chunks=(8, 3))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("activations", (40, 3), np.float32, chunks=(8, 3))[10:20] = rows[10:20]
    with ActivationStore([tmp_path / "a.h5", tmp_path / "b.h5"]) as store:
        found = torch.cat(batches(store, shuffle=False)).numpy()
    assert np.array_equal(found[:40], rows)
    assert np.array_equal(found[50:60], rows[10:20])
    assert not found[40:50].any() and not found[60:].any()


def test_another_dataset(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["layer/3"] = numbered(0, 9).astype(np.float32)
    with ActivationStore(tmp_path / "a.h5", dataset="layer/3") as store:
        assert store.tokens == 9


@pytest.mark.parametrize("kind", [".h5", ".safetensors"])
def test_directions(kind, tmp_path):
    rows, directions = random_rows(torch.float16), torch.eye(5)
    path = tmp_path / f"a{kind}"
    save(path, rows)
    if kind == ".h5":
        with h5py.File(path, "a") as file:
            file["directions"] = directions.numpy()
    else:
        save_file({"activations": rows, "directions": directions}, path)
    save(tmp_path / "plain.npy", rows)
    with ActivationStore([tmp_path / "plain.npy", path]) as store:
        assert torch.equal(store.directions, directions)
    save_file({"activations": rows, "directions": 2 * directions}, tmp_path / "b.safetensors")
    with ActivationStore([path, tmp_path / "b.safetensors"]) as store:
        with pytest.raises(DataError, match="differ in their directions"):
            _ = store.directions


def test_reading_needs_the_data_extra(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"")
    code = (
        "import sys; sys.modules['h5py'] = None; sys.modules['tqdm'] = None\n"
        "from sparsekern.data import ActivationStore\n"
        f"ActivationStore({str(tmp_path / 'a.h5')!r})"
    )
    run = run_after_torch(code)
    last = run.stderr.strip().splitlines()[-1]
    assert "needs h5py; install it with: pip install 'sparsekern[data]'" in last


def test_rows_held_out_are_in_no_batch(tmp_path):
    rows = torch.arange(1000, dtype=torch.float32).reshape(-1, 1).expand(-1, 4).contiguous()
    rows[707] = torch.inf
    rows[999] = 5000
    paths = [tmp_path / f"{n}.npy" for n in range(3)]
    for path, part in zip(paths, rows.split([300, 500, 200]), strict=True):
        np.save(path, part.numpy())
    options = {"nonfinite": "skip", "max_norm": 9000.0}
    with ActivationStore(paths, held_out=64, **options) as store:
        held = store.held_out_rows()
        trained = torch.cat(list(store.batches(64, seed=0)))
        assert store.held_out == len(held) == 63 and store.tokens == len(trained) == 935
        assert store.skipped == 1 and store.outliers == 1
        assert held.dtype == torch.float32 and (held[:, 0].diff() > 0).all()
        both = torch.cat([held, trained])[:, 0].sort().values
        assert torch.equal(both, rows[:, 0][(rows[:, 0] < 4000)])
        assert int((held[:, 0].diff() > 1).sum()) == 15, "in 16 pieces"
        again = pickle.loads(pickle.dumps(store))
        assert torch.equal(again.held_out_rows(), held)
    with ActivationStore(paths[0], held_out=1000) as store:
        assert store.held_out == 30 and store.tokens == 270, "a tenth at most"
    with ActivationStore(paths[0]) as store:
        assert store.held_out == 0 and store.held_out_rows().shape == (0, 4)
    with pytest.raises(ValueError, match="held_out must be an integer of at least 0, got -1"):
        ActivationStore(paths[0], held_out=-1)
