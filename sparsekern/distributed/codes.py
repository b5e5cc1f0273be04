"""The codes of a process's own latents, selected among the latents of all processes.

Gradients reach the own latents alone: a code of another process's latent is nobody's business here,
and the sum of all partial reconstructions hands each process the gradient of its part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import BatchTopK
from ..nn.scores import Scores, Width, select_largest_of_batch
from ..ops.batch_topk import batch_mask, kept_in_all
from ..ops.codes import Codes
from ..ops.linear_topk import linear_topk
from ..ops.transpose_codes import transpose_codes
from ..sae.encoding import Encoding
from .selection import NO_INDEX, select_in_batch, select_in_rows
from .sharding import Shards


@dataclass(frozen=True)
class Latents:
    """Some of the own latents.

    Attributes:
        own: int64 [count], ascending.
        most: their number in the process that has most.
    """

    own: Tensor
    most: int


class Selection(NamedTuple):
    """Own latents, some of which are selected.

    Attributes:
        values: [..., m], their scores.
        indices: int64 [..., m].
        chosen: bool [..., m], True for those that are selected.
    """

    values: Tensor
    indices: Tensor
    chosen: Tensor


@torch.no_grad()
def select_largest(
    scores: Scores, k: int, shards: Shards, *, groups: int = 1, latents: Latents | None = None
) -> Selection:
    """Select the k largest scores of each row.

    Args:
        scores: of the own latents.
        k: how many to select, of all processes' latents.
        shards: the processes.
        groups: select k / groups of each group of consecutive latents.
        latents: select from these alone.
    """
    layout, x = shards.layout, scores.x
    count, most = (layout.own, layout.largest) if latents is None else (
        len(latents.own), latents.most
    )  # fmt: skip
    of_group = k // groups
    candidates = min(of_group, count // groups)
    shape = (*x.shape[:-1], groups, candidates)
    if candidates == 0:
        values = x.new_empty(shape, dtype=scores.dtype)
        indices = values.new_empty(shape, dtype=torch.int64)
    else:
        values, indices = linear_topk(
            x, scores.weight, scores.bias, groups * candidates, pre_bias=scores.pre_bias,
            scale=scores.scale, latents=None if latents is None else latents.own, groups=groups,
            relu=False,
        )  # fmt: skip
    values, indices = values.view(shape), indices.view(shape)
    width = min(of_group, most // groups)
    selected = select_in_rows(values, layout.of_all(indices), of_group, width, shards.latents)
    return _narrowed(*(t.flatten(-2) for t in (values, indices, selected)))


def codes_of(scores: Scores, selection: Selection) -> Encoding:
    """Return the codes of selected own latents with their gradients."""
    transposition = transpose_codes(selection.indices, scores.latents)
    values = scores.codes(selection.values, selection.chosen, selection.indices, transposition)
    return Encoding(values, selection.indices, transposition, _zero(values))


def batch_topk(
    layer: BatchTopK,
    scores: Scores,
    width: Width,
    shards: Shards,
    count_rows: Callable[[Tensor], int],
) -> Encoding:
    """Return the codes of those own latents that are among the k B largest of the batch.

    Args:
        layer: in training; its threshold is updated.
        scores: of the own latents.
        width: of the search among them; updated.
        shards: the processes.
        count_rows: returns the rows of the whole batch.
    """
    x, own = scores.x, shards.layout.own
    rows = x.numel() // x.shape[-1]
    all_rows = count_rows(x)
    total = kept_in_all("BatchTopK", layer.k, all_rows)
    # Those of the whole batch may all be of the own rows and latents.
    share = min(layer.k if rows == all_rows else -(-total // max(rows, 1)), own)
    unscaled = scores.unscaled() if width.favours_dense(own) else None
    found = select_largest_of_batch(share, scores, width, unscaled)
    if found is not None:
        values, indices, kept = found
        places = _places(indices, own)[kept]
        in_all = _select_in_batch(layer, values[kept], places, rows, total, shards)
        return codes_of(scores, _narrowed(values, indices, kept.masked_scatter(kept, in_all)))
    z = scores.all(unscaled)
    _, values, places = batch_mask(z.detach(), share, relu=True)
    positive = ~(values <= 0)
    values, places = values[positive], places[positive]
    kept = z.new_zeros(z.numel(), dtype=torch.bool)
    kept[places[_select_in_batch(layer, values, places, rows, total, shards)]] = True
    every = torch.arange(own, device=z.device).expand(z.shape)
    return Encoding(torch.where(kept.view(z.shape), z.relu(), 0), every, None, _zero(z), dense=True)


def _places(indices: Tensor, own: int) -> Tensor:
    """Return the places [..., m] of own latents in their scores, which are [..., own]."""
    rows = torch.arange(indices[..., :1].numel(), device=indices.device)
    return indices + rows.view(*indices.shape[:-1], 1) * own


def _select_in_batch(
    layer: BatchTopK, values: Tensor, places: Tensor, rows: int, total: int, shards: Shards
) -> Tensor:
    """Select the largest among the candidates of all processes; update the threshold.

    Args:
        layer: whose threshold it is.
        values: [m], candidates of this process.
        places: [m], in the own scores.
        rows: of this process.
        total: how many to select.
        shards: the processes.

    Returns:
        bool [m], True for candidates of this process that are selected.
    """
    layout = shards.layout
    row, own = places // layout.own, places % layout.own
    rows_of_each = shards.data.gather_bytes(torch.tensor([rows], device=row.device))[0]
    row = row + rows_of_each[: shards.data.rank].sum()
    positions = row * layout.latents + layout.of_all(own)
    # Among the processes that share the rows, then among all.
    selected, values, kept = select_in_batch(values, positions, total, shards.latents)
    if shards.data.size > 1:
        among_all, values, _ = select_in_batch(values, kept, total, shards.data)
        selected = selected & torch.isin(positions, kept[among_all])
    layer.observe(values)
    return selected


def gather_codes(
    values: Tensor, indices: Tensor, selected: Tensor, shards: Shards, k: int | None = None
) -> Codes:
    """Return the selected codes [..., m] of all processes, by ascending index.

    They are as wide as the fullest row needs, and at least 1; shorter rows end in zeros. k: how
    many each row has, where it is known.
    """
    width = max(1, int(shards.latents.largest(_fullest(selected))))
    if k is not None and selected.shape[:-1].numel() == 0:  # no row says how wide it is
        width = k
    selected, values, indices = _first(width, selected, values, indices)
    values = torch.where(selected, values, 0)
    indices = torch.where(selected, shards.layout.of_all(indices), NO_INDEX)
    missing = (0, width - indices.shape[-1])
    all_values = shards.latents.gather(nn.functional.pad(values, missing))
    (all_indices,) = shards.latents.gather_bytes(
        nn.functional.pad(indices, missing, value=NO_INDEX)
    )
    values, indices = (t.movedim(0, -2).flatten(-2) for t in (all_values, all_indices))
    indices, order = indices.sort(dim=-1, stable=True)
    exist = indices < NO_INDEX
    used = slice(0, max(1, int(_fullest(exist))) if k is None else k)
    return Codes(values.gather(-1, order)[..., used], torch.where(exist, indices, 0)[..., used])


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


def _fullest(selected: Tensor) -> Tensor:
    """Return the number of selected places in the fullest row, 0-d."""
    counts = selected.sum(-1).reshape(-1)
    return counts.amax() if len(counts) else torch.zeros_like(counts.sum())


def _first(width: int, selected: Tensor, *others: Tensor) -> list[Tensor]:
    """Return so many places of each row in all tensors [..., m], the selected ones first."""
    order = (~selected).byte().argsort(dim=-1, stable=True)[..., :width]
    return [tensor.gather(-1, order) for tensor in (selected, *others)]


def _narrowed(values: Tensor, indices: Tensor, chosen: Tensor) -> Selection:
    """Leave out places that no row needs; on a CPU, since the host has to know their number.

    Args:
        values: [..., m].
        indices: [..., m].
        chosen: bool [..., m].

    Returns:
        All as wide as the fullest row needs, and at least 1, if there are candidates. Shorter rows
        end in places that are not selected.
    """
    if chosen.is_cuda:
        return Selection(values, indices, chosen)
    width = max(1, int(_fullest(chosen)))
    if width < chosen.shape[-1]:
        chosen, values, indices = _first(width, chosen, values, indices)
    return Selection(values, indices, chosen)
