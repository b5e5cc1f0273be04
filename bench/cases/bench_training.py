"""Whole training steps of a sparse autoencoder: forward, backward and optimizer.

Ours is `SparseAutoencoder` with `sparsekern.optim.Adam`, which keeps the dictionary at norm 1. The
dense peer is the same model in plain PyTorch (F.linear, topk, scatter, matmul), its loss compiled
by torch.compile, with torch's fused Adam and the projection and normalization as separate passes.
The package's step takes torch's fused Adam without these passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsekern.benchmarks import peers
from sparsekern.benchmarks.problem import Problem, region
from sparsekern.benchmarks.timing import forced
from sparsekern.benchmarks.workload import Workload
from sparsekern.models import SparseAutoencoder
from sparsekern.optim import Adam
from sparsekern.sae.statistics import squared_error, total_variance

OPS = ("training step",)
PACKAGE = "eai-sparsify"
F = torch.nn.functional
LEARNING_RATE = 1e-4
# Steps whose losses are compared, and how far apart they may be: products differ in their last
# bits, and Adam's first steps take the sign of the gradient.
CHECKED_STEPS = 3
APART = {"": 1e-3, "bfloat16": 2e-2}


class _Dense(torch.nn.Module):
    """The same autoencoder with dense latents."""

    def __init__(self, model: SparseAutoencoder) -> None:
        super().__init__()
        self.k = model.k
        for name, parameter in model.named_parameters():
            setattr(self, name, torch.nn.Parameter(parameter.detach().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The FVU of x [B, d]."""
        scores = F.linear(x - self.decoder_bias, self.encoder, self.encoder_bias)
        values, indices = scores.topk(self.k, sorted=False)
        codes = torch.zeros_like(scores).scatter(1, indices, values.relu())
        reconstruction = F.linear(codes, self.dictionary.t(), self.decoder_bias)
        return squared_error(x, reconstruction) / total_variance(x)


def build(workload: Workload) -> Problem:
    """One step after another, each on the weights that the last one left."""
    torch.manual_seed(0)
    with torch.device(workload.device):
        x = torch.randn(workload.rows, workload.d)
        model = SparseAutoencoder(workload.d, workload.n, workload.k)
    calls = {}
    if not peers.trouble(PACKAGE):
        peer = peers.build(PACKAGE, model, x)
        calls[PACKAGE] = _with_adam(workload, peer.loss, list(peer.parameters))
    matrix = workload.n * workload.d * 4

    def check(backend: str) -> float:
        """Our losses over a few steps against those of the dense model, from the same weights."""
        small = SparseAutoencoder(32, 256, 4).to(workload.device)
        rows = torch.randn(64, 32, device=workload.device)
        dense = _dense(workload, small, rows, compiled=False)
        ours = _ours(workload, small, rows)
        with forced(backend):
            losses = [(ours().item(), dense().item()) for _ in range(CHECKED_STEPS)]
        return max(abs(a - b) / b for a, b in losses) / APART[workload.autocast]

    return Problem(
        ours=_ours(workload, model, x),
        peers={"dense, compiled": _dense(workload, model, x, compiled=True), **calls},
        check=check,
        traffic=2 * 7 * matrix,
        formula="Adam's four matrices read and three written, for encoder and dictionary",
        roof="copy",
        flops=2 * workload.rows * workload.n * workload.d,
        grad=True,
    )


def _ours(
    workload: Workload, model: SparseAutoencoder, x: torch.Tensor
) -> Callable[[], torch.Tensor]:
    rest = [model.encoder, model.encoder_bias, model.decoder_bias]
    groups = [{"params": [model.dictionary], "unit_rows": True}, {"params": rest}]
    optimizer = Adam(groups, lr=LEARNING_RATE)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with region(workload):
            loss = model.loss(x)[1].total
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _dense(
    workload: Workload, model: SparseAutoencoder, x: torch.Tensor, *, compiled: bool
) -> Callable[[], torch.Tensor]:
    dense = _Dense(model)
    loss = torch.compile(dense) if compiled else dense

    @torch.no_grad()
    def project() -> None:
        rows, grad = dense.dictionary, dense.dictionary.grad
        grad.sub_((grad * rows).sum(1, keepdim=True) * rows)

    @torch.no_grad()
    def normalize() -> None:
        dense.dictionary.div_(dense.dictionary.norm(dim=1, keepdim=True))

    return _with_adam(workload, lambda: loss(x), list(dense.parameters()), project, normalize)


def _with_adam(
    workload: Workload,
    loss_of: Callable[[], torch.Tensor],
    parameters: list[torch.Tensor],
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with region(workload):
            loss = loss_of()
        loss.backward()
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()
        return loss.detach()

    return step


def test_training(job, timed):
    """One case and backend."""
    timed(job, build)
