"""Stores of activations in other processes: pickled and forked."""

import os
import pickle
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_activations import batches, numbers, put

from sparsekern.data import ActivationStore, DataError

ROWS = (np.arange(4096, dtype=np.float32)[:, None] * [[1, -1, 2]]).astype(np.float32)


@pytest.fixture(params=["a.h5", "packed.h5", "a.npy", "a.safetensors"])
def path(request, tmp_path, monkeypatch):
    """A file of each kind, by a name that holds in the current folder only."""
    monkeypatch.chdir(tmp_path)
    if request.param == "a.npy":
        np.save("a.npy", ROWS)
    elif request.param == "a.safetensors":
        save_file({"activations": torch.from_numpy(ROWS)}, "a.safetensors")
    else:
        put(request.param, ROWS, 64)
    return request.param


def test_a_pickled_store_opens_the_same_files_and_gives_the_same_batches(path, tmp_path):
    with ActivationStore(path, max_norm=4000) as store:
        assert store.outliers > 0
        data = pickle.dumps(store)
        expected = batches(store)
        os.chdir("/")
        with pickle.loads(data) as again:
            assert (again.tokens, again.outliers) == (store.tokens, store.outliers)
            assert all(map(torch.equal, batches(again), expected))
            assert again.paths == (tmp_path / path,)
            assert all(map(torch.equal, batches(pickle.loads(pickle.dumps(again))), expected))


def test_a_pickle_holds_no_rows(path):
    with ActivationStore(path) as store:
        assert len(pickle.dumps(store)) < 1000


def test_a_pickled_store_notices_that_its_file_is_another(path):
    with ActivationStore(path) as store:
        data = pickle.dumps(store)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match="has changed since it was pickled"):
        pickle.loads(data)


def in_a_child(function) -> bool:
    """Whether a forked child ran a function to its end and found it true."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = 1
        try:
            torch.set_num_threads(1)  # torch's own threads are not there
            code = 0 if function() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_reads_its_parents_store(path):
    with ActivationStore(path) as store:
        expected, running = batches(store, seed=3), store.batches(23, seed=1, buffer_rows=64)
        first = [next(running)]  # threads of the parent are reading
        assert in_a_child(lambda: all(map(torch.equal, batches(store, seed=3), expected)))
        assert sorted(numbers(first + list(running))) == list(range(4096))


def test_a_forked_child_is_told_to_make_its_own_iterator(path):
    with ActivationStore(path) as store:
        running = store.batches(23, seed=1, buffer_rows=64)
        next(running)

        def refused():
            with pytest.raises(RuntimeError, match="cannot go on with its parent's iterator"):
                list(running)
            return True

        assert in_a_child(refused)
        assert len(list(running)) == store.count_batches(23) - 1


def test_a_closed_store_says_so(path):
    with ActivationStore(path) as store:
        begun = store.batches(4, seed=0, buffer_rows=16, prefetch=False)
        next(begun)
    with pytest.raises(ValueError, match=r"^batches: the store is closed"):
        list(begun)
    with pytest.raises(ValueError, match=r"^batches: the store is closed"):
        store.batches(4, seed=0)
