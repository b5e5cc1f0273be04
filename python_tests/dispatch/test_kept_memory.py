"""Large outputs on the CPU lie in memory that the next output of their size takes over."""

import copy
import os
import threading

import pytest
import torch

import sparsekern
from sparsekern.dispatch import modules
from sparsekern.dispatch.kept_memory import LIMIT, kept_bytes
from sparsekern.dispatch.launch import KEPT_FROM, new_output

native, reason = modules.native_module("cpu")
pytestmark = pytest.mark.skipif(native is None, reason=str(reason))

COUNT = KEPT_FROM // 4
LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_kept():
    sparsekern.empty_cache()
    yield
    sparsekern.empty_cache()


def test_only_large_outputs_are_kept():
    new_output(LIKE, COUNT - 1)
    assert kept_bytes() == 0
    new_output(LIKE, COUNT)
    assert kept_bytes() == KEPT_FROM
    sparsekern.empty_cache()
    assert kept_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_next_output_takes_over_the_memory(dtype):
    like = torch.empty(0, dtype=dtype)
    rows = KEPT_FROM // like.itemsize // 256
    first = new_output(like, rows, 256)
    assert first.shape == (rows, 256) and first.dtype == dtype and first.is_contiguous()
    place = first.data_ptr()
    row = first[3:4]  # a view keeps the memory alive
    del first
    assert new_output(like, rows, 256).data_ptr() != place
    del row
    assert kept_bytes() == 2 * KEPT_FROM
    assert new_output(like, 128, rows * 2).data_ptr() == place  # of the same size, given out first


def test_outputs_in_use_are_not_given_out():
    outputs = [new_output(LIKE, COUNT).fill_(value) for value in range(3)]
    for value, output in enumerate(outputs):
        assert (output == value).all()


def test_a_size_that_is_not_kept_drops_what_is():
    new_output(LIKE, COUNT)
    kept = new_output(LIKE, COUNT + 1)
    assert kept_bytes() == 0
    del kept
    assert kept_bytes() == KEPT_FROM + 4


def test_freed_on_another_thread():
    held = [new_output(LIKE, COUNT)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert kept_bytes() == KEPT_FROM


def test_gradients_and_masked_activations_are_such_outputs():
    """And a second step in the same memory gives the same numbers."""
    n, d = 8192, 1024
    weight = torch.randn(n, d, requires_grad=True)
    x = torch.randn(1024, n)
    found = []
    for _ in range(2):
        weight.grad = None
        masked = sparsekern.topk_mask(x, 4)
        sparsekern.sparse_matmul(*sparsekern.topk(x, 4), weight).sum().backward()
        found.append((masked.data_ptr(), weight.grad.data_ptr(), masked.clone(), weight.grad + 0))
        del masked
    (*places, mask, grad), (*again, second_mask, second_grad) = found
    assert set(places) == set(again)  # both have the same size
    assert torch.equal(mask, second_mask) and torch.equal(grad, second_grad)
    dense = torch.zeros_like(x).scatter(1, x.topk(4).indices, x.topk(4).values)
    assert torch.equal(mask, dense)
    assert torch.allclose(grad, dense.t() @ torch.ones(1024, d), rtol=1e-5, atol=1e-4)


def test_an_in_place_step_on_a_kept_gradient_and_a_copy_of_the_model():
    """What optimizers, clipping, copying and saving do with a gradient."""
    weight = torch.nn.Parameter(torch.randn(8192, 1024))
    values, indices = sparsekern.topk(torch.randn(16, 8192), 4)
    for _ in range(2):  # the second adds into the first
        sparsekern.sparse_matmul(values, indices, weight).sum().backward()
    expected = (
        2 * torch.autograd.grad(sparsekern.sparse_matmul(values, indices, weight).sum(), weight)[0]
    )
    assert torch.allclose(weight.grad, expected)
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    assert weight.grad.norm() == pytest.approx(1.0, rel=1e-4)
    torch.optim.Adam([weight]).step()
    assert torch.equal(weight.grad.clone().share_memory_(), weight.grad)


LARGE = {
    "topk_mask": lambda: sparsekern.topk_mask(torch.ones(512, 16384), 4),
    "a dictionary's gradient": lambda: dictionary_gradient(torch.ones(8192, 1024)),
    "a transposed dictionary's": lambda: dictionary_gradient(torch.ones(1024, 8192).t()),
}


def dictionary_gradient(weight):
    weight.requires_grad_()
    indices = torch.arange(8).view(2, 4)
    out = sparsekern.sparse_matmul(torch.ones(2, 4), indices, weight)
    return torch.autograd.grad(out.sum(), weight)[0]


@pytest.mark.parametrize("name", LARGE)
def test_storages_are_torchs_own(name, tmp_path):
    """What FSDP, out=, and saving do with a tensor, and what is left for the next output."""
    make = LARGE[name]
    output = make()
    content = output.clone()
    size = output.untyped_storage().nbytes()
    torch.save(output, tmp_path / "output.pt")
    assert torch.equal(torch.load(tmp_path / "output.pt"), content)
    assert torch.equal(copy.deepcopy(output), content)
    storage = output.untyped_storage()
    storage.resize_(0)
    storage.resize_(size)
    output.copy_(content)
    assert torch.equal(output, content)
    output.resize_(3 * 1024, 8192).fill_(1)
    torch.add(torch.ones(2, 3), 1, out=output.resize_(0))
    assert output.tolist() == [[2.0] * 3] * 2
    del output, storage
    again = make()
    assert again.untyped_storage().nbytes() == size and torch.equal(again, content)
    assert again.share_memory_().is_shared()
    place = again.data_ptr()
    del again
    assert make().data_ptr() != place  # another process may still read it
    replaced = make()
    replaced.set_(torch.ones(4).untyped_storage(), 0, (4,))
    assert replaced.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t.untyped_storage(),
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t[1:2].t(),
        lambda t: memoryview(t.numpy()),
        lambda t: torch.utils.dlpack.to_dlpack(t),
    ],
)
def test_whoever_holds_the_memory_keeps_it(hold):
    first = new_output(LIKE, COUNT // 256, 256)
    place = first.data_ptr()
    held = hold(first)
    del first
    assert kept_bytes() == 0
    assert new_output(LIKE, COUNT).data_ptr() != place
    del held
    assert kept_bytes() == 2 * KEPT_FROM


def test_no_more_is_kept_than_the_limit():
    third = LIMIT // 3 // 4  # never written, so it costs addresses only
    outputs = [new_output(LIKE, third + at) for at in range(4)]
    new_output(LIKE, LIMIT // 4 + 1)
    outputs.clear()
    assert 0 < kept_bytes() <= LIMIT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, as on POSIX systems")
def test_a_forked_child_keeps_memory_of_its_own():
    from sparsekern.dispatch import kept_memory

    with kept_memory._lock:  # as if another thread were at it
        child = os.fork()
        if child == 0:
            new_output(LIKE, COUNT)
            os._exit(0 if kept_bytes() == KEPT_FROM else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
