"""Whether a readout takes activations for the symbols that they stand for.

Definition, after Gupta et al. (arXiv 2302.01976), section 4: of an input whose label is predicted
exactly, the activations of one motif are moved to the channel of another symbol. The readout is
consistent there if it then predicts the label in which that symbol was replaced. Only local maxima
of each channel take part, before and after: the many activations around a motif may hold more than
its symbol. So an input counts whose label is predicted exactly from its local maxima alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.motifs.domain import Replacement

RADIUS = 5
UNTESTED = -1


def local_maxima(activations: Tensor, radius: int = RADIUS) -> Tensor:
    """Keep the local maxima of activations [B, C, *space], zero or more.

    Those stay of which no larger one of the same channel lies within `radius` positions along every
    dimension of space (one or two).
    """
    pool = {1: F.max_pool1d, 2: F.max_pool2d}[activations.dim() - 2]
    largest = pool(activations, 2 * radius + 1, stride=1, padding=radius)
    return torch.where(activations == largest, activations, 0)


def move_motif(
    activations: Tensor, motif: Sequence[int], margin: int, source: int, to: int
) -> Tensor:
    """Copy activations [C, *space], with those of one motif in another channel.

    Those of channel `source` in the motif's region (symbol, then start and stop along each
    dimension; widened by a margin) move to channel `to`; a larger one that is there already stays.

    Args:
        activations: [C, *space], left as they are.
        motif: symbol, then start and stop along each dimension.
        margin: by how much the region is wider on each side.
        source: channel.
        to: channel.
    """
    copy = activations.clone()
    region = copy  # a view of it
    for dim, (start, stop) in enumerate(zip(motif[1::2], motif[2::2], strict=True), 1):
        first = max(start - margin, 0)
        region = region.narrow(dim, first, min(stop + margin, copy.shape[dim]) - first)
    region[to] = torch.maximum(region[to], region[source])
    region[source] = 0
    return copy


def perturbation_consistency(
    decode: Callable[[Tensor], Tensor],
    activations: Tensor,
    labels: Tensor,
    motifs: Tensor,
    channels: Sequence[int],
    replacements: Callable[[list[int], list[int]], Sequence[Replacement]],
    generator: np.random.Generator,
    *,
    margin: int = 0,
    radius: int = RADIUS,
) -> Tensor:
    """Move one motif's activations in each input, and see whether the label follows.

    Args:
        decode: activations -> labels int64 [B, L], padded with -1.
        activations: [B, C, *space], zero or more.
        labels: int64 [B, L], true ones, padded with -1.
        motifs: int64 [B, M, 1 + 2 d], as for :func:`~.motif_errors.find_motifs`.
        channels: the channel of each symbol; -1 for none.
        replacements: a label and the symbols of the motifs, without their padding -> everything
            that may be replaced in that input.
        generator: draws one replacement for each input.
        margin: by how much a motif's box is widened on each side.
        radius: of local maxima.

    Returns:
        int64 [B]: 1 for a consistent input, 0 for an inconsistent one, -1 for one that was not
        tested: it is not solved, or no motif with activations of its own can be replaced.
    """
    maxima = local_maxima(activations, radius)
    verdicts = torch.full((len(labels),), UNTESTED)
    solved = (decode(maxima).cpu() == labels).all(1)
    changed, expected, places = [], [], []
    for i in solved.nonzero().flatten().tolist():
        rows = [row for row in motifs[i].tolist() if row[0] >= 0]
        label = [symbol for symbol in labels[i].tolist() if symbol >= 0]
        choices = replacements(label, [row[0] for row in rows])
        for place in generator.permutation(len(choices)):
            choice = choices[place]
            row = rows[choice.motif]
            source, to = channels[row[0]], channels[choice.symbol]
            if source < 0 or to < 0 or source == to:
                continue
            after = move_motif(maxima[i], row, margin, source, to)
            if torch.equal(after, maxima[i]):  # no activations of its own
                continue
            changed.append(after)
            expected.append(choice.label + [-1] * (labels.shape[1] - len(choice.label)))
            places.append(i)
            break
    if places:
        follows = (decode(torch.stack(changed)).cpu() == torch.tensor(expected)).all(1)
        verdicts[places] = follows.long()
    return verdicts
