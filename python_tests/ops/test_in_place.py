"""Outputs may be changed in place as those of torch's own operations: whatever their size and their
number of dimensions, recorded or not."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern.dispatch.launch import KEPT_FROM
from sparsekern.ops import batch_norm, codes_to_dense
from sparsekern.ops.batch_topk import batch_mask
from sparsekern.ops.topk import mask_with_codes

torch.manual_seed(0)
ROWS, CUBE, LARGE = torch.randn(6, 16), torch.randn(2, 3, 16), torch.randn(KEPT_FROM // 4096, 1024)
WEIGHT, ENCODER = torch.randn(16, 8), torch.randn(12, 16)
IMAGE, LAST = torch.randn(4, 5, 6), torch.randn(4, 6, 5).transpose(1, 2)
THRESHOLD = torch.zeros(5)


def selected(x):
    return sparsekern.topk(x.detach(), 3).indices


FUNCTIONS = {
    "topk": lambda x: sparsekern.topk(x, 3).values,
    "topk, relu": lambda x: sparsekern.topk(x, 9, relu=True).values,
    "topk_mask": lambda x: sparsekern.topk_mask(x, 9, relu=True),
    "values of a mask": lambda x: mask_with_codes(x, 9, relu=True)[1],
    "TopK": lambda x: sparsekern.TopK(3)(x),
    "TopK in groups": lambda x: sparsekern.TopK(4, groups=2)(x),
    "batch_topk": lambda x: sparsekern.batch_topk(x, 9, relu=True),
    "values of a batch": lambda x: batch_mask(x, 9, relu=True)[1],
    "codes_to_dense": lambda x: codes_to_dense(x[..., :3].contiguous(), selected(x), x.shape[-1]),
    "linear_topk": lambda x: sparsekern.linear_topk(x, ENCODER[:, : x.shape[-1]], None, 8).values,
    "linear_at": lambda x: sparsekern.linear_at(x, ENCODER, None, selected(x) % 12),
    "sparse_matmul": lambda x: sparsekern.sparse_matmul(
        x[..., :3].contiguous(), selected(x) % 16, WEIGHT
    ),
    "batch_norm": lambda x: batch_norm(x).tensor,
    "threshold_codes": lambda x: sparsekern.threshold_codes(x, THRESHOLD)[0],
    "pointwise_conv": lambda x: sparsekern.pointwise_conv(
        x.reshape(-1)[:1], torch.tensor([7]), (2, 3, 4), torch.ones(5, 3)
    ),
    "pointwise_conv, dense": lambda x: sparsekern.pointwise_conv(
        x.reshape(-1)[:9], torch.arange(9), (2, 3, 4), torch.ones(5, 3)
    ),
}
INPUTS = {"rows": ROWS, "cube": CUBE}
CASES = [(name, kind) for name in FUNCTIONS for kind in INPUTS if name != "threshold_codes"]
CASES += [("threshold_codes", "image"), ("threshold_codes", "channels last")]
CASES += [("batch_norm", "image"), ("batch_norm", "channels last")]
CASES += [(name, "large") for name in ("topk_mask", "TopK", "batch_topk", "codes_to_dense")]
INPUTS |= {"image": IMAGE, "channels last": LAST, "large": LARGE}


def dropped(y):
    torch.manual_seed(1)
    return torch.nn.functional.dropout(y, inplace=True)


def dropped_copy(y):
    torch.manual_seed(1)
    return torch.nn.functional.dropout(y)


FIRST = (torch.tensor(0),)
CHANGES = {
    "mul_": (lambda y: y.mul_(3.0), lambda y: y * 3.0),
    "relu_": (lambda y: y.relu_(), lambda y: y.relu()),
    "dropout": (dropped, dropped_copy),
    "masked_fill_": (
        lambda y: y.masked_fill_(y.detach() > 1, 5.0), lambda y: y.masked_fill(y.detach() > 1, 5.0)
    ),
    "index_put_": (
        lambda y: y.index_put_(FIRST, torch.tensor(2.0)),
        lambda y: y.index_put(FIRST, torch.tensor(2.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_through_changed_outputs(name, kind):
    function = FUNCTIONS[name]
    changes = ["mul_"] if kind == "large" else list(CHANGES)
    for change in changes:
        in_place, copied = CHANGES[change]
        x = INPUTS[kind].clone().requires_grad_()
        found = in_place(function(x))
        other = INPUTS[kind].clone().requires_grad_()
        wanted = copied(function(other))
        assert torch.equal(found, wanted), change
        found.sin().sum().backward()
        wanted.sin().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, msg=change)


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if c[0] != "TopK in groups"])
def test_outputs_that_were_not_recorded_take_part_in_recording_later(name, kind):
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            y = FUNCTIONS[name](INPUTS[kind])
        factor = torch.tensor(2.0, requires_grad=True)
        wanted = y.sum()
        y.mul_(factor).sum().backward()
        torch.testing.assert_close(factor.grad, wanted)


def test_what_a_backward_pass_needs_is_guarded_by_its_version():
    x = ROWS.clone().requires_grad_()
    values, indices = sparsekern.topk(x, 3)
    indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()
    y, _ = sparsekern.threshold_relu(x, torch.zeros(16), channel_dim=-1)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # as after torch.relu
