"""The encoder, a training step and the optimizer of a sparse autoencoder.

linear_topk against the dense layer alone and with torch.topk; a step (forward and backward) of the
autoencoder against the dense layer's forward pass alone and the steps of other packages, whose
reconstruction with the same weights has to be as good; the Adam step on encoder and dictionary
against torch's fused Adam with the projection and the normalization as separate passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import sparsekern

from ... import testing
from ...models import SparseAutoencoder
from ...ops.adam_step import adam_step
from ...ops.adam_step.reference import adam_step_reference
from ...optim import Adam
from ...sae.statistics import total_variance
from .. import peers
from ..problem import Problem, Tensors, region, worst_ratio
from ..timing import forced
from ..workload import Workload

OPS = ("linear_topk", "SparseAutoencoder", "adam_step")
# A workload's fill: `keep_rounded` of the weight; inside `screening(True)`, which a GPU waits for.
COPY_KEPT = "rounded copy kept"
SCREENED = "screened"
F = torch.nn.functional
LARGEST_CHECKED = 2**30

# How far the squared errors of two packages may be apart, relative: float32 sums of about 1e6
# terms in different orders; one rounding of the reconstruction to bfloat16.
AGREEMENT = {"float32": 1e-5, "bfloat16": 2.0**-8}


def build(workload: Workload) -> Problem:
    """Make the problem of one of the three."""
    builders = {"linear_topk": _encoder, "SparseAutoencoder": _step, "adam_step": _adam}
    return builders[workload.op](workload)


def _layer(workload: Workload) -> Tensors:
    """X [B, d], weight [n, d], bias [n]."""
    generator = torch.Generator(workload.device).manual_seed(1)
    dtype = getattr(torch, workload.dtype)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=workload.device)
        return made.normal_(generator=generator)

    d = workload.d
    return normal(workload.rows, d), normal(workload.n, d) / d**0.5, normal(workload.n) / 10


def _encoder(workload: Workload) -> Problem:
    x, weight, bias = _layer(workload)
    k = workload.k
    kept = sparsekern.keep_rounded(weight) if workload.fill == COPY_KEPT else None

    asked = workload.fill == SCREENED

    def ours() -> object:
        return sparsekern.linear_topk(x, weight, bias, k), kept  # which lives as long as this

    def ours_screened() -> object:
        with sparsekern.screening(True):
            return ours()

    def check(backend: str) -> float:
        """Compare sorted values with a float64 truth: products differ in their last bits."""
        with forced(backend), sparsekern.screening(True) if asked else contextlib.nullcontext():
            values = sparsekern.linear_topk(x, weight, bias, k, sorted=True, relu=False).values
        rows = slice(0, 64)
        truth = F.linear(x[rows].double(), weight.double(), bias.double()).topk(k).values
        plain = F.linear(x[rows], weight, bias).topk(k).values
        scale = F.linear(x[rows].abs(), weight.abs(), bias.abs()).amax(1, keepdim=True)
        return testing.error_ratio(values[rows], truth, plain, scale)

    return Problem(
        ours=ours_screened if asked else ours,
        peers={
            "F.linear": lambda: F.linear(x, weight, bias),
            "F.linear, torch.topk": lambda: F.linear(x, weight, bias).topk(k),
        },
        check=check,
        traffic=(x.numel() + weight.numel()) * x.element_size(),
        formula="x and weight read",
        roof="read",
        flops=2 * workload.rows * workload.n * workload.d,
    )


def _step(workload: Workload) -> Problem:
    x, weight, bias = _layer(workload)
    torch.manual_seed(0)
    with torch.device(workload.device):
        model = SparseAutoencoder(workload.d, workload.n, workload.k).to(x.dtype)
    with torch.no_grad():  # neither bias is zero, so that nobody can forget one
        model.encoder_bias.copy_(bias)
        model.decoder_bias.copy_(x[0] / 10)
    leaves = [model.encoder, model.encoder_bias, model.dictionary, model.decoder_bias]
    ours = _gradients(workload, lambda: model.loss(x)[1].total, leaves)
    if workload.mode.endswith("optimizer"):
        ours = _with_optimizer(ours, leaves, model.dictionary)
    others: dict[str, peers.Peer] = {}

    def prepare(names: Sequence[str]) -> None:
        for name in names:
            if name in peers.NAMES and not peers.trouble(name):
                others[name] = peers.build(name, model, x)

    def step_of(name: str) -> Callable[[], Tensors]:
        def step() -> Tensors:
            peer = others[name]
            return _gradients(workload, peer.loss, peer.parameters)()

        return step

    def check(backend: str) -> float:
        if weight.numel() > LARGEST_CHECKED:  # float64 copies would not fit
            return _step(replace(workload, n=2**14, d=2**10)).check(backend)
        _check_agreement(workload, model, x, others)
        return _error_ratio(workload, model, x, leaves, backend)

    calls = {name: step_of(name) for name in peers.NAMES}
    gradients = 2 * weight.numel() * weight.element_size()
    return Problem(
        ours=ours,
        peers={"F.linear forward": lambda: F.linear(x, weight, bias).detach(), **calls},
        check=check,
        traffic=2 * gradients,
        formula="both matrices read, both gradients written",
        roof="copy",
        flops=2 * workload.rows * workload.n * workload.d,
        grad=True,
        prepare=prepare,
    )


def _gradients(
    workload: Workload, loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]
) -> Callable[[], Tensors]:
    """Make a step: the loss, under autocast if the workload says so, and new gradients."""

    def step() -> Tensors:
        with region(workload):
            value = loss()
        return torch.autograd.grad(value, parameters)

    return step


def _with_optimizer(
    gradients: Callable[[], Tensors],
    parameters: Sequence[torch.Tensor],
    dictionary: torch.Tensor,
) -> Callable[[], Tensors]:
    """Make a step that ends with the optimizer's, of so small a rate that the model stays."""
    others = [parameter for parameter in parameters if parameter is not dictionary]
    groups: list[dict[str, Any]] = [
        {"params": [dictionary], "unit_rows": True},
        {"params": others},
    ]
    optimizer = Adam(groups, lr=1e-12)

    def step() -> Tensors:
        for parameter, gradient in zip(parameters, gradients(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        return tuple(parameters)

    return step


@torch.no_grad()
def _check_agreement(
    workload: Workload,
    model: SparseAutoencoder,
    x: torch.Tensor,
    others: dict[str, peers.Peer],
) -> None:
    """AssertionError unless every peer's loss stands for the squared error of ours."""
    if not others:
        return
    with region(workload):
        expected = (model.loss(x)[1].fvu * total_variance(x)).item()
        found = {name: peer.loss().item() * peer.unit for name, peer in others.items()}
    allowed = AGREEMENT[workload.autocast or workload.dtype]
    for name, squared_error in found.items():
        apart = abs(squared_error - expected) / expected
        assert apart <= allowed, f"the squared error of {name} is {apart:.2g} from ours"


def _error_ratio(
    workload: Workload,
    model: SparseAutoencoder,
    x: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    backend: str,
) -> float:
    """Return the worst error ratio of values and gradients, with the same selection.

    What lies within a rounding of the k-th largest score may be selected or not.
    """
    with forced(backend), region(workload):
        output, loss = model.loss(x)
    dtype = output.values.dtype
    actual = [g.to(dtype) for g in torch.autograd.grad(loss.total, leaves)]
    with torch.no_grad():
        rows = slice(0, 64)
        encoder, encoder_bias, _, decoder_bias = (leaf.double() for leaf in leaves)
        centred = x[rows].double() - decoder_bias
        best = F.linear(centred, encoder, encoder_bias).topk(workload.k).values
        scale = F.linear(centred.abs(), encoder.abs(), encoder_bias.abs()).amax(1, keepdim=True)
        values = output.values[rows].sort(descending=True).values
    truth, plain = (
        _selected_gradients(leaves, x, output.indices, wide)
        for wide in (torch.float64, torch.float32)
    )
    return max(testing.error_ratio(values, best, best, scale), *map(_ratio, actual, truth, plain))


def _selected_gradients(
    leaves: Sequence[torch.Tensor], x: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
) -> Tensors:
    """Gradients of the FVU in another dtype, the active latents being given: indices [B, k]."""
    x, *leaves = (tensor.detach().to(dtype) for tensor in (x, *leaves))
    encoder, encoder_bias, dictionary, decoder_bias = (leaf.requires_grad_() for leaf in leaves)
    scores = torch.einsum("bkd,bd->bk", encoder[indices], x - decoder_bias) + encoder_bias[indices]
    estimate = torch.einsum("bk,bkd->bd", scores.relu(), dictionary[indices]) + decoder_bias
    return torch.autograd.grad((x - estimate).square().sum() / total_variance(x), leaves)


def _ratio(actual: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> float:
    """Return the error ratio of one gradient; its magnitude is that of its largest element."""
    actual, truth, plain = (t.reshape(-1, t.shape[-1]) for t in (actual, truth, plain))
    return worst_ratio(actual, truth, plain, truth.abs().amax().expand_as(truth))


def _adam(workload: Workload) -> Problem:
    shape = (workload.n, workload.d)
    generator = torch.Generator().manual_seed(1)
    start = F.normalize(torch.randn(*shape, generator=generator), dim=1)
    grads = [torch.randn(*shape, generator=generator).to(workload.device) for _ in range(2)]
    mine = [[start.clone().to(workload.device), *torch.zeros(2, *shape)] for _ in range(2)]
    theirs = [torch.nn.Parameter(start.clone().to(workload.device)) for _ in range(2)]
    torchs = torch.optim.Adam(theirs, lr=1e-3, fused=True)

    def ours() -> None:
        for unit_rows, (parameter, mean, square), grad in zip(
            (False, True), mine, grads, strict=True
        ):
            adam_step(parameter, grad, mean, square, lr=1e-3, step=10, unit_rows=unit_rows)

    def separate() -> None:
        with torch.no_grad():
            for parameter, grad in zip(theirs, grads, strict=True):
                parameter.grad = grad
            dictionary = theirs[1]
            share = (grads[1] * dictionary).sum(1, keepdim=True)
            dictionary.grad = grads[1] - share * dictionary
            torchs.step()
            dictionary.div_(dictionary.norm(dim=1, keepdim=True))

    def check(backend: str) -> float:
        made = [start[:64].clone(), grads[1][:64].cpu(), *torch.zeros(2, 64, workload.d)]
        truth = [tensor.double() for tensor in made]
        plain = [tensor.clone() for tensor in made]
        actual = [tensor.clone().to(workload.device) for tensor in made]
        with forced(backend):
            adam_step(*actual, lr=1e-3, step=1, unit_rows=True)
        for parameter, gradient, mean, square in (truth, plain):
            adam_step_reference(
                parameter, gradient, mean, square, 1e-3, 0.9, 0.999, 1e-8, 0, 1, True
            )
        return testing.error_ratio(actual[0], truth[0], plain[0], truth[0].abs() + 1)

    elements = 2 * start.numel()
    return Problem(
        ours=ours,
        peers={"fused Adam, projection, normalization": separate},
        check=check,
        traffic=28 * elements,
        formula="four matrices read, three written, for encoder and dictionary",
        roof="copy",
    )
