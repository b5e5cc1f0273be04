"""Compile a training step, and record it as a CUDA graph: python examples/compile_and_cuda_graph.py

The CUDA graph needs a GPU, and is left out without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

import sparsekern

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
encoder = torch.randn(2048, 128, device=device, requires_grad=True)
dictionary = torch.randn(2048, 128, device=device, requires_grad=True)
x = torch.randn(256, 128, device=device)


def loss_of(x: Tensor) -> Tensor:
    """The error of a reconstruction by 16 latents."""
    values, indices = sparsekern.linear_topk(x, encoder, None, 16, relu=True)
    return (sparsekern.sparse_matmul(values, indices, dictionary) - x).square().mean()


def gradients(loss: Tensor) -> tuple[Tensor, ...]:
    """Of both matrices."""
    return torch.autograd.grad(loss, (encoder, dictionary))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether gradients agree, up to rounding."""
    return all(torch.allclose(a, b, 1e-4, 1e-6) for a, b in zip(one, other, strict=True))


plain = gradients(loss_of(x))
compiled = torch.compile(loss_of, fullgraph=True)  # one graph: no operation breaks it
print(f"compiled without a break; gradients are the same: {same(plain, gradients(compiled(x)))}")

if device == "cpu":
    print("no GPU: the CUDA graph is left out")
else:
    # Work on another stream first, as torch asks for; then record, then replay with new inputs.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(loss_of(x))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gradients(loss_of(x))
    x.copy_(torch.randn_like(x))
    graph.replay()
    agree = same(gradients(loss_of(x)), recorded)
    print(f"recorded as a CUDA graph; gradients are the same: {agree}")
