"""LateTensor: functions that run on codes or layers, and all others, against dense tensors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsekern.integrations.acceleration import LateTensor
from sparsekern.integrations.acceleration.late import (
    LateCodes,
    LateScores,
    content_of,
    dense,
    late_tensor,
)
from sparsekern.integrations.acceleration.norms import normed
from sparsekern.nn.scores import Scores

B, D, N, K = 6, 5, 30, 4


def layer(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (B, D), "weight": (N, D), "bias": (N,), "pre_bias": (D,), "scale": (N,)}
    tensors = {
        name: torch.randn(shape, generator=draw, dtype=dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    tensors["scale"] = tensors["scale"].detach().abs().requires_grad_()
    return Scores(**tensors)


def dense_scores(scores):
    z = F.linear(scores.x - scores.pre_bias, scores.weight, scores.bias)
    return z * scores.scale


def dense_activations(scores):
    values, indices = dense_scores(scores).topk(K)
    return torch.zeros(B, N, dtype=values.dtype).scatter(-1, indices, values.relu())


def late_activations(scores):
    values, indices, transposition = scores.topk(K)
    return late_tensor(LateCodes(values, indices, N, transposition))


def late_scores(scores, relu=False):
    return late_tensor(LateScores(scores, relu, 0, N))


VECTOR = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3
MATRIX = torch.randn(N, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
MASK = torch.arange(N) % 4 == 1

# what runs on codes, without a dense tensor
ON_CODES = {
    "@": lambda a: a @ MATRIX,
    "matmul": lambda a: torch.matmul(a, MATRIX),
    "linear": lambda a: F.linear(a, MATRIX.t().contiguous(), torch.ones(3, dtype=a.dtype)),
    "Linear": lambda a: nn.functional.linear(a, MATRIX.t()),
    "* vector": lambda a: (a * VECTOR) @ MATRIX,
    "vector *": lambda a: torch.mul(VECTOR, a) @ MATRIX,
    "/ vector": lambda a: (a / VECTOR) @ MATRIX,
    "columns": lambda a: a[:, 7:20] @ MATRIX[7:20],
    "columns of ...": lambda a: a[..., 7:20] @ MATRIX[7:20],
    "split": lambda a: sum(p @ m for p, m in zip(
        torch.split(a, [9, 1, 20], dim=1), MATRIX.split([9, 1, 20]), strict=True)),
    "relu": lambda a: a.relu() @ MATRIX,
    "sum of rows": lambda a: a.sum(-1),
    "> 0": lambda a: (a > 0).double().sum(-1),
    "!= 0": lambda a: (a != 0).double().sum(dim=1),
    "bool, float, sum": lambda a: a.detach().bool().float().sum(0),
    "bool, float, sum -2": lambda a: a.detach().bool().float().sum(-2).bool(),
    "selected": lambda a: a[a > 0],
    "smallest": lambda a: a[a > 0].min(),
    "any": lambda a: (a > 0).any(),
    "shape": lambda a: torch.zeros(a.shape) + a.dim() + a.size(-1) + len(a) + a.numel(),
    "to": lambda a: a.to(torch.float32).double() @ MATRIX,
}  # fmt: skip
OTHERS = {
    "exp": lambda a: a.exp(),
    "sum": lambda a: a.sum(),
    "abs": lambda a: a.abs().mean(),
    "> 1": lambda a: (a > 1).double(),
    "+": lambda a: a + 1,
    "1 - a": lambda a: 1 - a,
    "row": lambda a: a[2],
    "column": lambda a: a[:, 3],
    "step": lambda a: a[:, ::2],
    "rows": lambda a: a[1:3],
    "of another mask": lambda a: a[MASK.expand(B, N)],
    "stack": lambda a: torch.stack([a, a]),
    "cat": lambda a: torch.cat([a, a], 1),
    "transpose": lambda a: a.t() @ a,
    "T": lambda a: a.T,
    "a @ a.T": lambda a: a @ a.transpose(0, 1),
    "einsum": lambda a: torch.einsum("bn,nd->bd", a, MATRIX),
    "where": lambda a: torch.where(a > 0, a, -1.0),
    "reshape": lambda a: a.reshape(-1),
    "dropout": lambda a: F.dropout(a, 0.0),
    "norm": lambda a: a.norm(dim=-1),
    "amax": lambda a: a.amax(-1),
    "clone": lambda a: a.clone().mul_(2),
    "sum of rows, kept": lambda a: a.sum(-1, keepdim=True),
    "iteration": lambda a: torch.stack([row.sum() for row in a]),
    "unbind": lambda a: torch.stack(a.unbind(1)),
}


def compare(function, make_late, make_dense, *, stays):
    results = []
    for make in (make_late, make_dense):
        scores = layer()
        tensor = make(scores)
        result = function(tensor)
        if isinstance(tensor, LateTensor):
            assert (tensor._state.dense is None) == stays
        result = dense(result)
        grads = []
        if result.requires_grad:
            result.square().sum().backward()
            grads = [t.grad for t in scores.tensors()]
        results.append((result.detach(), grads))
    (got, got_grads), (expected, grads) = results
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected)
    assert len(got_grads) == len(grads)
    for one, two in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ON_CODES)
def test_codes(name):
    compare(ON_CODES[name], late_activations, dense_activations, stays=True)


@pytest.mark.parametrize("name", OTHERS)
def test_all_else(name):
    compare(OTHERS[name], late_activations, dense_activations, stays=False)
    compare(OTHERS[name], late_scores, dense_scores, stays=False)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sorted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [None, slice(3, 22)], ids=str)
def test_selections_from_scores(relu, sorted, masked, columns):
    def function(scores):
        mask = MASK
        if columns is not None:
            scores, mask = scores[:, columns], mask[columns]
        if masked:
            scores = torch.where(mask[None], scores, -torch.inf)
        values, indices = scores.topk(3, sorted=sorted)
        zeros = torch.zeros_like(scores)
        zeros.scatter_(-1, indices, values)
        return zeros @ MATRIX[columns or slice(None)]

    compare(
        function, lambda s: late_scores(s, relu),
        lambda s: dense_scores(s).relu() if relu else dense_scores(s), stays=True,
    )  # fmt: skip


def test_order_of_a_sorted_selection():
    scores = late_scores(layer())
    values, indices = torch.topk(scores, 7, dim=-1)
    expected = torch.topk(dense_scores(layer()), 7, dim=-1)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)
    smallest = scores.topk(2, largest=False).values
    torch.testing.assert_close(smallest, dense_scores(layer()).topk(2, largest=False).values)
    assert scores.topk(2, dim=0).values.shape == (2, N)
    with pytest.raises(RuntimeError, match="out of range"):
        scores.topk(N + 1)


def test_more_than_the_mask_has():
    scores = torch.where(MASK[None], late_scores(layer()), -torch.inf)
    count = int(MASK.sum())
    expected = torch.where(MASK[None], dense_scores(layer()), -torch.inf).topk(count + 2).values
    torch.testing.assert_close(scores.topk(count + 2, sorted=True).values, expected)


def test_what_it_is():
    late = late_activations(layer())
    assert isinstance(late, torch.Tensor) and late.requires_grad and not late.is_meta
    assert late.device == torch.device("cpu") and late.is_cpu and not late.is_cuda
    assert late.dtype == torch.float64 and late.is_floating_point() and not late.is_sparse
    assert late._state.dense is None
    assert "grad_fn" in repr(late) and f"{late:}" == f"{dense(late):}"
    plain = dense_activations(layer()).detach()
    assert late.tolist() == plain.tolist() and late.detach().numpy().tolist() == plain.tolist()
    assert not late.is_leaf and not late.detach().requires_grad


def test_in_place_changes_are_seen():
    late, plain = (make(layer()) for make in (late_activations, dense_activations))
    with torch.no_grad():
        for tensor in (late, plain):
            tensor[:, 5] = 3.0
            tensor.clamp_(max=2.0)
    torch.testing.assert_close(late @ MATRIX, plain @ MATRIX)
    assert content_of(late) is None
    zeros = torch.zeros_like(late_scores(layer()))
    zeros.add_(1).scatter_(
        -1, torch.zeros(B, 1, dtype=torch.int64), torch.full((B, 1), 9.0).double()
    )
    assert zeros.sum() == B * (N - 1 + 9)


def test_gradient_of_the_tensor_itself():
    grads = []
    for make in (late_activations, dense_activations):
        tensor = make(layer())
        tensor.retain_grad()
        (tensor @ MATRIX).square().sum().backward()
        grads.append(tensor.grad)
    torch.testing.assert_close(*grads)
    hooked = []
    for make in (late_activations, dense_activations):
        tensor = make(layer())
        tensor.register_hook(hooked.append)
        (tensor @ MATRIX).sum().backward()
    torch.testing.assert_close(*hooked)


def test_looking_later_and_without_gradients():
    """The dense tensor is made in the state of autograd in which its codes were."""
    late = late_activations(layer())
    with torch.no_grad():
        assert not late.exp().requires_grad
    assert late.exp().requires_grad
    scores = layer()
    with torch.no_grad():
        still = late_scores(scores)
        assert not still.requires_grad
    assert not still.exp().requires_grad and not still.topk(2, sorted=False).values.requires_grad
    with torch.no_grad():
        assert not late_scores(scores).topk(2, sorted=False).values.requires_grad


def test_scores_of_parameters_that_changed():
    scores = layer()
    late = late_scores(scores)
    with torch.no_grad():
        scores.weight.mul_(2)
    for use in (torch.exp, lambda a: a.topk(2, sorted=False)):
        with pytest.raises(
            RuntimeError, match=r"must be used before the tensors .* change, got ver"
        ):
            use(late)


def test_transforms():
    late = late_activations(layer())
    with pytest.raises(RuntimeError, match=r"must be given a dense tensor, .* pass tensor\.clone"):
        torch.vmap(lambda row: row.sum())(late)
    sums = torch.vmap(lambda row: row.sum())(late.clone())
    torch.testing.assert_close(sums, dense_activations(layer()).sum(-1))
    assert sums.requires_grad
    sums = torch.vmap(lambda row: row.sum())(late_activations(layer()).detach())
    torch.testing.assert_close(sums, dense_activations(layer()).sum(-1).detach())


def test_copies_and_pickles_are_dense():
    late = late_activations(layer()).detach()
    stored = io.BytesIO()
    torch.save(late, stored)
    stored.seek(0)
    for other in (copy.deepcopy(late), torch.load(stored)):
        assert type(other) is torch.Tensor and torch.equal(other, dense(late))


def test_autocast():
    scores, weight = layer(torch.float32), MATRIX.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        late, plain = late_scores(scores), dense_scores(scores)
        acts = late_activations(scores)
        product = (acts * VECTOR.float()) @ weight
        assert acts._state.dense is None and product.dtype == torch.bfloat16
    assert late.dtype == torch.bfloat16
    torch.testing.assert_close(dense(late).float(), plain.float(), rtol=0.02, atol=0.05)


def test_gradients_of_a_dictionary_and_its_norms():
    weight = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    values = torch.rand(B, K, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(N)[:K] for _ in range(B)])

    def product(weight, values):
        decoder = normed(weight)
        codes = LateCodes(values, indices, N).scaled(1 / decoder.norms)
        return codes.product(decoder.dictionary), decoder.norms

    assert torch.autograd.gradcheck(product, (weight, values))
    assert torch.autograd.gradgradcheck(product, (weight, values))
    zeros = torch.zeros(2, 3, requires_grad=True)
    normed(zeros).norms.sum().backward()
    assert torch.equal(zeros.grad, torch.zeros(2, 3))
    only = torch.ones(2, 3, requires_grad=True)
    normed(only).dictionary.sum().backward()
    assert torch.equal(only.grad, torch.ones(2, 3))
