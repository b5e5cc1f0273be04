"""What a caller hands back, or changes between a forward and its backward pass, is checked where it
is used: an error, never a crash and never a wrong gradient."""

import numpy as np
import pytest
import torch

import sparsekern
from sparsekern import Transposition, testing
from sparsekern.ops.codes_to_dense import codes_to_dense
from sparsekern.ops.linear_at import vector_at

N = 20


def codes(seed=0, dtype=torch.int64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(8, 4, generator=generator)
    indices = torch.randint(0, N, (8, 4), generator=generator).to(dtype)
    weight = torch.randn(N, 6, generator=generator)
    return [t.to(device) for t in (values, indices, weight)]


def weight_gradient(values, indices, weight, transposition):
    weight = weight.clone().requires_grad_()
    out = sparsekern.sparse_matmul(values, indices, weight, transposition=transposition)
    return torch.autograd.grad(out.square().sum(), weight)[0]


def changed(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def swapped(tensor, a, b):
    return changed(changed(tensor, a, tensor[b]), b, tensor[a])


CHANGED = {
    "a position too large": lambda t: t._replace(positions=changed(t.positions, 5, 32)),
    "a huge position": lambda t: t._replace(positions=changed(t.positions, 0, 2**31 - 1)),
    "a negative position": lambda t: t._replace(positions=changed(t.positions, 5, -1)),
    "a position twice": lambda t: t._replace(positions=changed(t.positions, 5, t.positions[6])),
    "two positions swapped": lambda t: t._replace(positions=swapped(t.positions, 0, 31)),
    "a first offset above 0": lambda t: t._replace(offsets=changed(t.offsets, 0, 1)),
    "a last offset too large": lambda t: t._replace(offsets=changed(t.offsets, N, 10**12)),
    "a negative offset": lambda t: t._replace(offsets=changed(t.offsets, 7, -(10**12))),
    "offsets that fall": lambda t: t._replace(offsets=t.offsets.flip(0)),
    "other offsets": lambda t: t._replace(offsets=changed(t.offsets, slice(1, N), 32)),
    "of other indices": lambda t: sparsekern.transpose_codes(
        codes(seed=1, device=t.offsets.device)[1], N
    ),
}
REFUSED = {
    "positions of int64": (TypeError, lambda t: t._replace(positions=t.positions.long())),
    "offsets of int32": (TypeError, lambda t: t._replace(offsets=t.offsets.int())),
    "positions of float32": (TypeError, lambda t: t._replace(positions=t.positions.float())),
    "a list": (TypeError, lambda t: t._replace(positions=t.positions.tolist())),
    "three parts": (TypeError, lambda t: (*t, t.offsets)),
    "a tensor": (TypeError, lambda t: t.offsets),
    "positions [8, 4]": (ValueError, lambda t: t._replace(positions=t.positions.view(8, 4))),
    "too few positions": (ValueError, lambda t: t._replace(positions=t.positions[:-1])),
    "too many offsets": (ValueError, lambda t: t._replace(offsets=t.offsets.repeat(2))),
    "on another device": (ValueError, lambda t: t._replace(offsets=t.offsets.to("meta"))),
}


@pytest.mark.parametrize("how", CHANGED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_changed_transposition_is_refused(target, how, dtype):
    if target.emulated:
        pytest.skip(f"{target.name} gets what a CPU kernel would check; run on another target")
    values, indices, weight = codes(dtype=dtype, device=target.device)
    right = weight_gradient(values, indices, weight, None)
    wrong = CHANGED[how](sparsekern.transpose_codes(indices, N))
    if target.backend == "reference":  # it needs none
        found = weight_gradient(values, indices, weight, wrong)
        target.assert_repeated("weight", found, right)
        return
    if not target.checks_indices:  # a GPU does not look, but reads and writes nothing outside
        assert weight_gradient(values, indices, weight, wrong).isfinite().all()
        rows = torch.ones(8, 6, device=target.device)
        scores = sparsekern.linear_at(rows, weight, None, indices, transposition=wrong)
        assert scores.cpu().shape == (8, 4)
        return
    with pytest.raises(ValueError, match="transposition must be transpose_codes"):
        weight_gradient(values, indices, weight, wrong)
    with pytest.raises(ValueError, match="transposition must be transpose_codes"):
        sparsekern.linear_at(torch.ones(8, 6), weight, None, indices, transposition=wrong)


@pytest.mark.parametrize("how", REFUSED)
def test_a_transposition_of_another_form_is_refused(target, how):
    error, change = REFUSED[how]
    values, indices, weight = codes(device=target.device)
    wrong = change(sparsekern.transpose_codes(indices, N))
    with pytest.raises(error, match="transposition"):
        weight_gradient(values, indices, weight, wrong)
    rows = torch.ones(8, 6, device=target.device)
    with pytest.raises(error, match="transposition"):
        sparsekern.linear_at(rows, weight, None, indices, transposition=wrong)


def test_a_transposition_with_strides_gives_the_same_gradient(target):
    values, indices, weight = codes(device=target.device)
    dense = sparsekern.transpose_codes(indices, N)
    apart = Transposition(*(t.repeat_interleave(2)[::2] for t in dense))
    assert not apart.positions.is_contiguous()
    target.assert_repeated(
        "weight",
        weight_gradient(values, indices, weight, apart),
        weight_gradient(values, indices, weight, dense),
    )


def test_a_transposition_is_checked_by_every_thread(instruction_sets):
    indices = torch.randint(0, 50, (300, 4))
    right = sparsekern.transpose_codes(indices, 50)
    weight = torch.randn(50, 3)
    for name in instruction_sets:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for at in (0, 599, 600, 1199):
                wrong = right._replace(positions=changed(right.positions, at, 10**9))
                with pytest.raises(ValueError, match="transposition"):
                    weight_gradient(torch.randn(300, 4), indices, weight, wrong)
            testing.assert_same(
                f"{name}, {threads} threads",
                vector_at(weight[:, 0], indices, right),
                weight[:, 0][indices],
            )


# -- indices that change between the forward and the backward pass ---------------------------------


def conv(indices):
    values = torch.randn(3, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    return sparsekern.pointwise_conv(values, indices, (2, 4, 100), weight)


def product(indices):
    weight = torch.randn(10, 4, requires_grad=True)
    return sparsekern.sparse_matmul(torch.randn(1, 3), indices.view(1, 3), weight)


def transposed_product(indices):
    indices = indices.view(1, 3)
    transposition = sparsekern.transpose_codes(indices, 10)
    weight = torch.randn(10, 4, requires_grad=True)
    return sparsekern.sparse_matmul(torch.randn(1, 3), indices, weight, transposition=transposition)


def scores(indices):
    weight = torch.randn(10, 4, requires_grad=True)
    return sparsekern.linear_at(torch.randn(1, 4), weight, None, indices.view(1, 3))


def dense(indices):
    values = torch.randn(1, 3, requires_grad=True)
    return codes_to_dense(values, indices.view(1, 3), 10)


@pytest.mark.parametrize("op", [conv, product, transposed_product, scores, dense])
@pytest.mark.parametrize("value", [2**40, -1, -(2**62)])
def test_indices_that_change_before_the_backward_pass_are_an_error(target, op, value):
    if not target.checks_indices:
        pytest.skip(f"{target.name} does not look at indices; run on a CPU target")
    if op is conv and target.backend == "triton":
        pytest.skip("pointwise_conv has no triton implementation: run on another target")
    array = np.array([0, 5, 9])
    out = op(torch.from_numpy(array))
    array[:] = value  # as no version counter tells
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        out.sum().backward()
