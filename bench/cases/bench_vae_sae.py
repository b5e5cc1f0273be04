"""The VAE-SAE study: a sparse layer inside a network, and the training step of the model around it.

SparseBottleneck (linear layer, top-k, dictionary) forward and backward, and a step of the full-size
model of the study (64 x 64 images, 32 channels, Adam), on the kernels against the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from measuring.checkout import sparsekern, testing

from sparsekern.benchmarks.problem import Problem, Tensors, region
from sparsekern.benchmarks.timing import forced
from sparsekern.benchmarks.workload import Workload
from sparsekern.models import VAESAE, SparseBottleneck, vae_sae_loss

OPS = ("SparseBottleneck", "VAE-SAE step")
F = torch.nn.functional
REFERENCE = "the reference"


def build(workload: Workload) -> Problem:
    """The problem of the layer or of the step."""
    return _layer(workload) if workload.op == "SparseBottleneck" else _step(workload)


def _on_the_reference(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with sparsekern.backend("reference"):
            return call()

    return run


def _layer(workload: Workload) -> Problem:
    generator = torch.Generator().manual_seed(1)
    shape = (workload.rows, workload.d)
    x, upstream = (torch.randn(shape, generator=generator).to(workload.device) for _ in range(2))
    torch.manual_seed(0)
    layer = SparseBottleneck(workload.d, workload.n, workload.d, workload.k).to(workload.device)
    layer.eval()  # without the count of dead units, which the plain layer below has not
    x.requires_grad_()

    def gradients(of: SparseBottleneck, at: torch.Tensor, down: torch.Tensor) -> Tensors:
        output = of(at).output
        return output.detach(), *torch.autograd.grad(output, (at, *of.parameters()), down)

    def by_torch() -> Tensors:
        linear = layer.to_units
        scores = F.linear(x, linear.weight, linear.bias)
        values, indices = scores.topk(workload.k, sorted=False)
        codes = torch.zeros_like(scores).scatter(-1, indices, values.relu())
        output = torch.addmm(layer.dictionary_bias, codes, layer.dictionary)
        return output.detach(), *torch.autograd.grad(output, (x, *layer.parameters()), upstream)

    def check(backend: str) -> float:
        """Output and gradients against a float64 truth; scales are the largest of each tensor."""
        wide = copy.deepcopy(layer).double()
        with forced("reference"):
            truth = gradients(wide, x.detach().double().requires_grad_(), upstream.double())
            plain = gradients(layer, x, upstream)
        with forced(backend):
            found = gradients(layer, x, upstream)
        return max(
            testing.error_ratio(one, right, other, right.abs().max())
            for one, right, other in zip(found, truth, plain, strict=True)
        )

    def ours() -> Tensors:
        return gradients(layer, x, upstream)

    weights = 2 * workload.n * workload.d * x.element_size()
    return Problem(
        ours=ours,
        peers={REFERENCE: _on_the_reference(ours), "linear, topk, scatter, matmul": by_torch},
        check=check,
        traffic=2 * weights,
        formula="both matrices read, both gradients written",
        roof="copy",
        flops=2 * workload.rows * workload.n * workload.d,
        grad=True,
    )


def _step(workload: Workload) -> Problem:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(workload.rows, 3, 64, 64, generator=generator).to(workload.device)
    torch.manual_seed(0)
    model = VAESAE(3, units=workload.n, k=workload.k, width=32, placement="encoder")
    model = model.to(workload.device)

    def stepper(trained: VAESAE, at: torch.Tensor) -> Callable[[], torch.Tensor]:
        optimizer = torch.optim.Adam(trained.parameters())

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with region(workload):
                output = trained(at)
            loss = vae_sae_loss(output._replace(logits=output.logits.float()), at).total
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def check(backend: str) -> float:
        """Losses of three steps from the same weights, relative to 1e-4: Adam's first steps take
        the sign of gradients whose last bits differ."""
        losses = []
        for name in (backend, "reference"):
            step = stepper(copy.deepcopy(model), images[:16])
            with forced(name), torch.random.fork_rng():
                torch.manual_seed(1)
                losses.append([step().item() for _ in range(3)])
        return max(abs(a - b) / b for a, b in zip(*losses, strict=True)) / 1e-4

    ours = stepper(model, images)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Problem(
        ours=ours,
        peers={REFERENCE: _on_the_reference(ours)},
        check=check,
        traffic=7 * weights,
        formula="Adam reads four and writes three numbers for each weight",
        roof=None,
        grad=True,
    )


def test_vae_sae(job, timed):
    """One case and backend."""
    timed(job, build)
