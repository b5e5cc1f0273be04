"""The top-k activation as SAELens constructs it."""

from __future__ import annotations

import torch

from ..nn.counter import DeadNeuronCounter
from ..nn.topk import TopK as DenseTopK
from ..ops.codes import Codes


class TopK(DenseTopK):
    """Keep the k largest entries of the last dimension, then ReLU: `sae_lens.saes.topk_sae.TopK`.

    Args:
        k: how many to keep, at least 1.
        use_sparse_activations: return a sparse COO tensor, as SAELens does for its own decoder.
        counter: as for `sparsekern.TopK`.

    Shape: x [..., n] floating point -> [..., n] of the same dtype, dense or coalesced COO.

    Raises:
        TypeError, ValueError: k is not an integer or not in 1..n; use_sparse_activations is not a
        bool.
    """

    def __init__(
        self,
        k: int,
        use_sparse_activations: bool = False,
        *,
        counter: DeadNeuronCounter | None = None,
    ) -> None:
        super().__init__(k, counter=counter)
        if not isinstance(use_sparse_activations, bool):
            raise TypeError(
                f"TopK: use_sparse_activations must be a bool, got {use_sparse_activations!r}"
            )
        self.use_sparse_activations = use_sparse_activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., n] for x [..., n], dense, or sparse COO with use_sparse_activations."""
        if self.use_sparse_activations:
            return to_sparse_coo(self.codes(x), x.shape)
        return super().forward(x)


def to_sparse_coo(codes: Codes, shape: torch.Size) -> torch.Tensor:
    """Return ascending codes as a coalesced sparse COO tensor of the dense shape."""
    k = codes.indices.shape[-1]
    rows = torch.arange(codes.indices.numel() // k, device=codes.indices.device)
    coordinates = [codes.indices.reshape(-1)]
    rows = rows.repeat_interleave(k)
    for size in reversed(shape[:-1]):
        coordinates.append(rows % size)
        rows = rows // size
    return torch.sparse_coo_tensor(
        torch.stack(coordinates[::-1]),
        codes.values.reshape(-1),
        size=shape,
        is_coalesced=True,
        check_invariants=False,
    )
