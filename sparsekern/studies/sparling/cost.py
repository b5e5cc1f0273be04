"""What a training step costs, counted, and how long that would take a GPU, estimated."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...data.motifs.domain import MotifBatch, MotifDomain
from ...models.sparling import MotifModel, motif_loss
from . import measures

# One H200: products in bfloat16 and memory, by its data sheet (989 TFLOP/s dense, 4.8 TB/s), and
# shares of both that networks of small convolutions and transformers of this size reach in
# practice: an assumption, not a measurement.
FLOPS, FLOPS_SHARE = 989e12, 0.25
BANDWIDTH, BANDWIDTH_SHARE = 4.8e12, 0.5
# A module's output is written and read by the next one; its gradient likewise; and both passes read
# what was kept: six times its bfloat16 bytes.
BYTES_PER_ACTIVATION = 6 * 2
COUNTED = 2  # samples in the step that is counted
DRAWN = 32  # samples whose drawing is timed


class Cost(NamedTuple):
    """Of one sample."""

    flops: float
    """Of convolutions, products and attention in training, forward and backward."""
    bytes: float
    """Moved for the outputs of all modules."""

    def gpu_seconds(self) -> float:
        """Estimate the seconds of training on one H200, which is not measured.

        Products and memory do not overlap.
        """
        products = self.flops / (FLOPS * FLOPS_SHARE)
        return products + self.bytes / (BANDWIDTH * BANDWIDTH_SHARE)


def cost_of(model: MotifModel, domain: MotifDomain, device: torch.device) -> Cost:
    """Count the cost of a training step on the first samples of the domain, per sample.

    The readout is counted with its dense convolution, as it runs on a GPU. Leaves the model's
    parameters, their gradients and its running statistics alone.
    """
    batch = domain.batch(0, 0, COUNTED)
    modes = {module: module.training for module in model.modules()}
    elements = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal elements
        outputs = output if isinstance(output, tuple) else (output,)
        elements += sum(tensor.numel() for tensor in outputs if isinstance(tensor, Tensor))

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.random.fork_rng([]):
            _step(model, domain, batch, device)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return Cost(counter.get_total_flops() / COUNTED, BYTES_PER_ACTIVATION * elements / COUNTED)


def draw_seconds(domain: MotifDomain) -> float:
    """Measure how long it takes to draw a sample on one core here."""
    began = time.perf_counter()
    domain.batch(0, 0, DRAWN)
    return (time.perf_counter() - began) / DRAWN


def _step(model: MotifModel, domain: MotifDomain, batch: MotifBatch, device: torch.device) -> None:
    """Run a training step without an update."""
    labels = measures.pad_labels(batch.labels, domain).to(device)
    loss = motif_loss(model(measures.on_device(batch.inputs, device), labels), labels)
    torch.autograd.grad(
        loss,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        allow_unused=True,
    )
