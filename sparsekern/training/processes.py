"""What training asks of the processes that train one model together; here it is one alone."""

from __future__ import annotations

import torch
from torch import Tensor


class Processes:
    """One process, which has all of the model.

    Where several train together, a subclass overrides everything here; all of them then make the
    same calls in the same order.

    Attributes:
        first: True for the process that writes the run folder, the log and the progress bar.
    """

    first = True

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest that any process gave, for each of the numbers."""
        return numbers

    def flags(self, flags: Tensor) -> Tensor:
        """Return True where any process has True, of bool tensors of one shape."""
        return flags

    def share_of_norm(self, tensors: list[Tensor]) -> Tensor:
        """Compute what :meth:`norms` needs of the norm of all tensors; sends nothing."""
        return torch.nn.utils.get_total_norm(tensors)

    def norms(self, shares: list[Tensor], *numbers: int) -> tuple[Tensor, tuple[int, ...]]:
        """Compute norms of all tensors; return with them the largest of some numbers.

        Args:
            shares: of each norm, from :meth:`share_of_norm`.
            numbers: as of :meth:`largest`.

        Returns:
            [norms], not finite where a tensor is not, or where it overflows; and the largest.
        """
        return torch.stack(shares), numbers

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this process holds of a tensor."""
        return tensor

    def saved_shape(self, tensor: Tensor) -> list[int]:
        """Return the shape that a tensor has in a checkpoint."""
        return list(tensor.shape)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a checkpoint has it, in the first process; in others what it likes."""
        return tensor

    def part(self, saved: Tensor, like: Tensor) -> Tensor:
        """Return what belongs in place of `like` from a tensor of a checkpoint."""
        return saved
