"""A linear layer of sparse inputs: the decoder of a sparse autoencoder."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.checks import autocasting, check_count, check_floating
from ..ops.codes import Transposition
from ..ops.sparse_matmul import sparse_matmul


class SparseLinear(nn.Module):
    """Multiply codes, or the dense tensor that they stand for, by a dictionary.

    Equivalent PyTorch: ``latents @ dictionary + bias``, with latents the dense [..., N] tensor.

    Args:
        latents: N, number of latents, at least 1.
        features: D, width of the result, at least 1.
        bias: add a bias.
        device, dtype: of the parameters.

    Attributes:
        weight: the parameter, [N, D] (of a layer made by `from_linear`: [D, N]); row i is latent
            i's direction. It begins as that of an ``nn.Linear(N, D)``.
        bias: [D], or None.
        dictionary: [N, D], the weight or its transposed view.

    Shape: codes ([..., K], [..., K]) or a dense tensor [..., N] -> [..., D] of the dtype of values
    or tensor.

    Raises:
        TypeError, ValueError: sizes that are not integers of at least 1; codes that are neither a
            pair nor a tensor, or do not fit; as `sparse_matmul`.

    Example:
        >>> import torch, sparsekern
        >>> activation, decoder = sparsekern.TopK(2), sparsekern.SparseLinear(16, 4)
        >>> x = torch.randn(3, 16)
        >>> torch.allclose(decoder(activation.codes(x)), decoder(activation(x)), atol=1e-6)
        True
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        latents: int,
        features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("SparseLinear", "latents", latents, 2**31 - 1, "the largest index")
        check_count("SparseLinear", "features", features, 2**31 - 1, "what a tensor can hold")
        self._transposed = False
        self.weight = nn.Parameter(torch.empty(latents, features, device=device, dtype=dtype))
        bound = latents**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear:
        """Make a layer for codes that shares the parameters of an nn.Linear(N, D).

        They are read in place, and their names and shapes in the state_dict stay. Replace the other
        layer by this one: in a model with both, torch's to_empty and load_state_dict(assign=True)
        would give each its own parameters.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"SparseLinear: linear must be an nn.Linear, got {type(linear).__name__}"
            )
        if not isinstance(linear.weight, nn.Parameter):
            raise TypeError(
                "SparseLinear: linear must hold its weight as a parameter, got a parametrized one"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._transposed = True
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    @property
    def dictionary(self) -> torch.Tensor:
        """Dictionary [N, D], row i latent i's direction: the weight, or its transposed view."""
        return self.weight.t() if self._transposed else self.weight

    def forward(
        self,
        codes: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        transposition: Transposition | None = None,
    ) -> torch.Tensor:
        """Return the product [..., D] of codes, or of a dense tensor, with the dictionary.

        Args:
            codes: (values [..., K], indices [..., K]), or a dense tensor [..., N].
            transposition: of the indices, if it is known.
        """
        if isinstance(codes, torch.Tensor):
            return self._dense(codes)
        if not isinstance(codes, tuple) or len(codes) != 2:
            raise TypeError(
                "SparseLinear: codes must be a pair (values, indices) or a dense tensor, "
                f"got {type(codes).__name__}"
            )
        values, indices = codes
        return sparse_matmul(
            values, indices, self.dictionary, self.bias, transposition=transposition
        )

    def _dense(self, latents: torch.Tensor) -> torch.Tensor:
        check_floating("SparseLinear", "codes", latents)
        weight, bias = self.dictionary.t(), self.bias
        n = weight.shape[1]
        if latents.shape[-1] != n:
            raise ValueError(
                f"SparseLinear: a dense tensor must be [..., {n}] (the latents), "
                f"got {list(latents.shape)}"
            )
        if autocasting(latents) or latents.dtype == weight.dtype:
            return nn.functional.linear(latents, weight, bias)
        if weight.dtype != torch.float32 or latents.dtype == torch.float64:
            raise TypeError(
                f"SparseLinear: a dense tensor must have weight's dtype {weight.dtype} or be of 16 "
                f"bits with a float32 weight, got {latents.dtype}"
            )
        return nn.functional.linear(latents.float(), weight, bias).to(latents.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for repr."""
        latents, features = self.dictionary.shape
        return f"latents={latents}, features={features}, bias={self.bias is not None}"
