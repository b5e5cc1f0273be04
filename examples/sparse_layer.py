"""A sparse layer of one's own: python examples/sparse_layer.py

A feed-forward block as in a transformer, of whose hidden units k are active for each token. Neither
its hidden layer nor the gradient of that is ever stored as a dense tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparsekern


class SparseFeedForward(nn.Module):
    """x [..., width] -> [..., width]: y = relu(the k largest of x @ up.T + bias) @ down."""

    def __init__(self, width: int, hidden: int, k: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Parameter(torch.randn(hidden, width) * hidden**-0.5)
        self.k = k
        self.counter = sparsekern.DeadNeuronCounter(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block from codes."""
        values, indices = sparsekern.linear_topk(x, self.up.weight, self.up.bias, self.k, relu=True)
        if self.training:
            self.counter.update(indices=indices, values=values.detach())
        return sparsekern.sparse_matmul(values, indices, self.down)


def dense(layer: SparseFeedForward, x: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    values, indices = torch.topk(layer.up(x), layer.k)
    hidden = torch.zeros(*x.shape[:-1], len(layer.down)).scatter(-1, indices, values.relu())
    return hidden @ layer.down


torch.manual_seed(0)
layer = SparseFeedForward(64, 1024, k=16)
x = torch.randn(8, 32, 64)
difference = (layer(x) - dense(layer, x)).detach().abs().max()
print(f"differs from the dense layer by {difference:.0e}")

# It learns a function with structure to find: which of 16 prototypes is nearest.
prototypes = torch.randn(16, 64)
optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
for step in range(1, 201):
    x = torch.randn(256, 64)
    target = prototypes[(x @ prototypes.t()).argmax(-1)]
    loss = (layer(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        dead = float(layer.counter.fraction(20 * 256))
        print(f"step {step}: loss {loss:.3f}, {dead:.0%} of hidden units silent for 20 batches")
