"""Check an installed sparsekern: its compiled CPU kernels are there and agree with torch."""

from __future__ import annotations

import torch

import sparsekern

x, weight = torch.randn(512, 4096), torch.randn(4096, 64)
with sparsekern.backend("native"):
    values, indices = sparsekern.topk(x, 32)
    product = sparsekern.sparse_matmul(values, indices, weight)
assert torch.equal(values, torch.topk(x, 32).values)
assert torch.equal(values, x.gather(1, indices))
dense = torch.zeros_like(x).scatter(1, indices, values)
torch.testing.assert_close(product, dense @ weight, rtol=1e-4, atol=1e-4)
print(f"sparsekern {sparsekern.__version__}: topk and sparse_matmul agree with torch")
