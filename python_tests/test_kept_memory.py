"""Large outputs on the CPU lie in memory that the next output of their size takes over."""

import threading

import pytest
import torch

import sparsekern
from sparsekern import _library
from sparsekern.native import KEPT_FROM, new_output

native, reason = _library.native_module("cpu")
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
    assert native.kept_bytes() == 0
    new_output(LIKE, COUNT)
    assert native.kept_bytes() == KEPT_FROM
    sparsekern.empty_cache()
    assert native.kept_bytes() == 0


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
    assert native.kept_bytes() == 2 * KEPT_FROM
    assert new_output(like, 128, rows * 2).data_ptr() == place  # freed last, of the same size


def test_outputs_in_use_are_not_given_out():
    outputs = [new_output(LIKE, COUNT).fill_(value) for value in range(3)]
    for value, output in enumerate(outputs):
        assert (output == value).all()


def test_a_size_that_is_not_kept_drops_what_is():
    new_output(LIKE, COUNT)
    kept = new_output(LIKE, COUNT + 1)
    assert native.kept_bytes() == 0
    del kept
    assert native.kept_bytes() == KEPT_FROM + 4


def test_freed_on_another_thread():
    held = [new_output(LIKE, COUNT)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert native.kept_bytes() == KEPT_FROM


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
