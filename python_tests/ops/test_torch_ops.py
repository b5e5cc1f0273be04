"""Operations called through torch.ops, without the public functions: sizes that do not fit are an
error, rows that are too long, too; sizes of zero work, forward and backward."""

import pytest
import torch

import sparsekern
from sparsekern.ops import batch_norm, threshold_codes, threshold_relu

ops = torch.ops.sparsekern


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def i(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


MISFITS = {
    "sparse_matmul: fewer indices": lambda: ops.sparse_matmul(f(8, 4), i(8, 2), f(9, 3), None),
    "sparse_matmul: bias": lambda: ops.sparse_matmul(f(8, 4), i(8, 4), f(9, 3), f(2)),
    "sparse_matmul: bias dtype": lambda: ops.sparse_matmul(
        f(8, 4), i(8, 4), f(9, 3), f(3, dtype=torch.float16)
    ),
    "sparse_matmul: weight dtype": lambda: ops.sparse_matmul(
        f(8, 4), i(8, 4), f(9, 3, dtype=torch.float64), None
    ),
    "sparse_matmul: index dtype": lambda: ops.sparse_matmul(
        f(8, 4), i(8, 4, dtype=torch.int16), f(9, 3), None
    ),
    "backward: fewer rows": lambda: ops.sparse_matmul_backward(
        f(2, 3), f(8, 4), i(8, 4), f(9, 3), True, True
    ),
    "backward: fewer features": lambda: ops.sparse_matmul_backward(
        f(8, 2), f(8, 4), i(8, 4), f(9, 3), True, True
    ),
    "backward: dtype of grad": lambda: ops.sparse_matmul_backward(
        f(8, 3, dtype=torch.float16), f(8, 4), i(8, 4), f(9, 3), True, True
    ),
    "backward: fewer indices": lambda: ops.sparse_matmul_backward(
        f(8, 3), f(8, 4), i(8, 1), f(9, 3), True, True
    ),
    "backward: positions": lambda: ops.sparse_matmul_backward(
        f(8, 3), f(8, 4), i(8, 4), f(9, 3), True, True, i(10), i(3, dtype=torch.int32)
    ),
    "codes_to_dense": lambda: ops.codes_to_dense(f(8, 4), i(8, 2), 9),
    "codes_to_dense: n": lambda: ops.codes_to_dense(f(8, 0), i(8, 0), -1),
    "count_active": lambda: ops.count_active(i(8, 4), 9, f(8, 2)),
    "count_active: n": lambda: ops.count_active(i(0), -1, None),
    "transpose_codes: n": lambda: ops.transpose_codes(i(0), -1),
    "linear_topk: k": lambda: ops.linear_topk(
        f(2, 3), f(9, 3), None, 10, None, None, None, 1, True, False, False
    ),
    "linear_topk: no k": lambda: ops.linear_topk(
        f(2, 3), f(9, 3), None, 0, None, None, None, 1, True, False, False
    ),
    "pointwise_conv": lambda: ops.pointwise_conv(f(5), i(3), f(6, 4), None, 2, 10),
    "pointwise_conv: bias": lambda: ops.pointwise_conv(f(3), i(3), f(6, 4), f(5), 2, 10),
    "pointwise_conv: outer": lambda: ops.pointwise_conv(f(0), i(0), f(6, 4), None, -2, -10),
    "pointwise_conv_backward: outputs": lambda: ops.pointwise_conv_backward(
        f(2, 5, 10), f(3), i(3), f(6, 4)
    ),
    "pointwise_conv_backward: values": lambda: ops.pointwise_conv_backward(
        f(2, 6, 10), f(2), i(3), f(6, 4)
    ),
    "threshold_relu: threshold": lambda: ops.threshold_relu(f(2, 4, 5), f(3), None, None, 1),
    "threshold_relu: shift": lambda: ops.threshold_relu(f(2, 4, 5), f(4), f(4), f(1), 1),
    "threshold_codes: scale alone": lambda: ops.threshold_codes(f(2, 4), f(4), f(4), None, 1),
    "batch_norm: weight": lambda: ops.batch_norm(f(2, 4, 5), f(3), None, 1e-5, 1),
    "batch_norm: empty": lambda: ops.batch_norm(f(0, 4, 5), None, None, 1e-5, 1),
    "batch_norm_backward: grad": lambda: ops.batch_norm_backward(
        f(2, 4, 4), f(2, 4, 5), None, f(4), f(4), 1e-5, 1
    ),
    "batch_norm_backward: mean": lambda: ops.batch_norm_backward(
        f(2, 4, 5), f(2, 4, 5), None, f(3), f(4), 1e-5, 1
    ),
    "adam_step": lambda: ops.adam_step(
        f(4, 5), f(4, 5), f(4, 5), f(4), 0.1, 0.9, 0.999, 1e-8, 0.0, 1, False
    ),
    "channel_threshold: rank": lambda: ops.channel_threshold(f(4, 5), 9, 1),
    "topk: k": lambda: ops.topk(f(4, 5), 6, True, False, False, False),
    "batch_topk: total": lambda: ops.batch_topk(f(4, 5), 21, False),
}


@pytest.mark.parametrize("name", MISFITS)
def test_sizes_that_do_not_fit_are_an_error(name):
    with pytest.raises((ValueError, TypeError)):
        MISFITS[name]()


@pytest.mark.parametrize("size", [2**32, 2**33 + 5])
def test_rows_longer_than_the_kernels_count_are_an_error(size):
    x = torch.zeros(1).expand(1, size)  # takes no memory
    with sparsekern.backend("native"):
        for call in (
            lambda: sparsekern.topk(x, 1),
            lambda: sparsekern.topk_mask(x, 1),
            lambda: sparsekern.batch_topk(x, 1),
            lambda: sparsekern.channel_threshold(x.view(1, 1, size), 0.5),
        ):
            with pytest.raises(ValueError, match="a row must hold at most"):
                call()


# -- sizes of zero ---------------------------------------------------------------------------------


def backward(output, *inputs):
    """Every input gets a gradient of its shape, without anything uninitialised."""
    output.sum().backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.isnan().any()


def leaf(device, *shape):
    return torch.ones(shape, device=device, requires_grad=True)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("d", [0, 4])
@pytest.mark.parametrize("columns", [False, True], ids=["row-major", "column-major"])
def test_products_with_sizes_of_zero(target, rows, k, d, columns):
    device = target.device
    values, bias = leaf(device, rows, k), leaf(device, d)
    weight = leaf(device, *((d, 5) if columns else (5, d)))
    dictionary = weight.t() if columns else weight
    indices = i(rows, k).to(device)
    for transposition in (None, sparsekern.transpose_codes(indices, 5)):
        values.grad = weight.grad = bias.grad = None
        out = sparsekern.sparse_matmul(
            values, indices, dictionary, bias, transposition=transposition
        )
        assert out.shape == (rows, d)
        assert torch.equal(out.detach().cpu(), torch.full((rows, d), 1.0 + k))
        backward(out, values, weight, bias)
    scores = sparsekern.linear_at(leaf(device, rows, d), dictionary, None, indices)
    assert torch.equal(scores.detach().cpu(), torch.full((rows, k), float(d)))


@pytest.mark.parametrize("k", [0, 2])
def test_a_dictionary_without_latents(target, k):
    values, weight = leaf(target.device, 0, k), leaf(target.device, 0, 4)
    indices = i(0, k).to(target.device)
    backward(sparsekern.sparse_matmul(values, indices, weight), values, weight)


@pytest.mark.parametrize("codes", [0, 2])
@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4), (0, 4, 5), (2, 4, 0), (2, 0, 5)], ids=str)
def test_convolutions_with_sizes_of_zero(target, codes, outputs, shape):
    if target.backend == "triton":
        pytest.skip("pointwise_conv has no triton implementation: run on another target")
    count = codes if f(*shape).numel() else 0
    sizes = ((count,), (outputs, shape[1]), (outputs,))
    values, weight, bias = (leaf(target.device, *size) for size in sizes)
    indices = i(count).to(target.device)
    out = sparsekern.pointwise_conv(values, indices, shape, weight, bias)
    assert out.shape == (shape[0], outputs, *shape[2:])
    backward(out, values, weight, bias)


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (3, 0, 6)], ids=str)
def test_selections_from_no_rows(target, shape):
    x = leaf(target.device, *shape)
    backward(sparsekern.topk(x, 2).values, x)
    x = leaf(target.device, *shape)
    backward(sparsekern.topk_mask(x, 2), x)
    x = leaf(target.device, *shape)
    backward(sparsekern.batch_topk(x, 2), x)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (2, 0, 4)], ids=str)
def test_channels_with_sizes_of_zero(target, shape):
    x, threshold = leaf(target.device, *shape), f(shape[1]).to(target.device)
    y, counts = threshold_relu(x, threshold)
    backward(y, x)
    assert counts.tolist() == [0] * shape[1]
    if target.backend != "triton":
        x = leaf(target.device, *shape)
        backward(threshold_codes(x, threshold).values, x)
    if target.name == "native-cpu":
        with pytest.raises(ValueError, match="x must not be empty"):
            batch_norm(x)


def test_nothing_to_count(target):
    indices = i(0).to(target.device)
    assert sparsekern.count_active(indices, 3).tolist() == [0, 0, 0]
    assert sparsekern.transpose_codes(indices, 3).offsets.tolist() == [0, 0, 0, 0]


def test_no_parameters_to_step():
    from sparsekern.ops.adam_step import adam_step

    for shape in ((0, 4), (4, 0), (0,)):
        adam_step(*(f(*shape) for _ in range(4)), lr=0.1, step=1, unit_rows=len(shape) == 2)
