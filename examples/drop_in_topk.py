"""Put TopK in the place of torch.topk, relu and scatter: python examples/drop_in_topk.py

Same outputs, same gradients; the second line tells what a forward and backward pass takes here.
"""

from __future__ import annotations

import time

import torch
from torch import nn

import sparsekern


class TorchTopK(nn.Module):
    """How most autoencoders have it today."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., n]."""
        values, indices = torch.topk(x, self.k)
        return torch.zeros_like(x).scatter(-1, indices, values.relu())


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of a reconstruction loss."""
    return list(torch.autograd.grad((model(x) - x).square().mean(), list(model.parameters())))


def seconds(layer: nn.Module, scores: torch.Tensor) -> float:
    """Of one forward and backward pass; the best of ten."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        layer(scores).sum().backward()
        times.append(time.perf_counter() - began)
    return min(times)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 2048), TorchTopK(32), nn.Linear(2048, 64))
x = torch.randn(256, 64)
before = gradients(model, x)
model[1] = sparsekern.TopK(32)
after = gradients(model, x)
pairs = zip(before, after, strict=True)
largest = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
print(f"gradients differ by {largest:.0e} of the largest at most")

scores = torch.randn(512, 16384, requires_grad=True)
ours, theirs = seconds(model[1], scores), seconds(TorchTopK(32), scores)
print(f"512 x 16384 scores: {1000 * ours:.1f} ms, with torch.topk {1000 * theirs:.1f} ms")
