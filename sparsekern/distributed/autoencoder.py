"""The sparse autoencoder whose latents are shared out among processes.

Each process owns some latents (see layout.py): their rows of encoder and dictionary, their biases,
thresholds, counters and the optimizer's state of all of these. It sees the whole batch, computes
the scores and codes of its own latents, and its part of the reconstruction. In a step the processes
exchange

* the candidates for the selection, k a row from each (TopK), or k B of the batch (BatchTopK);
* the sum of the partial reconstructions, [B, D];
* in the backward pass, the gradient of decoder_bias, [D].

Nothing of size [N, D] or [B, N] is ever sent, and nothing of it is stored twice. Selections are
those of one process, and so are losses and gradients, up to rounding.

A second dimension of the mesh, "data", splits the batch: then the gradients of the own latents are
summed over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..nn import BatchTopK, DeadNeuronCounter, JumpReLU, TopK
from ..nn.hooks import has_hooks
from ..nn.scores import Scores, select_largest_of_batch
from ..ops.batch_topk import batch_mask, kept_in_all
from ..ops.codes import Codes, Transposition
from ..ops.count_active import count_active
from ..ops.linear_topk import linear_topk
from ..ops.order import key_of
from ..ops.transpose_codes import transpose_codes
from ..sae.decoding import Decoder
from ..sae.encoding import Encoding, encode
from ..sae.model import FIRST_SCALE, SAELoss, SAEOutput, SparseAutoencoder
from .selection import NO_INDEX, select_in_batch, select_in_rows
from .sharding import Shards
from .statistics import total_variance, value_at_rank

# Numbers of the dictionary that are drawn at a time.
DRAWN = 1 << 22


class ShardedAutoencoder(SparseAutoencoder):
    """A `SparseAutoencoder` whose latents are shared out among processes.

    All processes of the mesh's dimension "latents" must make the same calls with the same rows; of
    its dimension "data" (where it has one) each has other rows of the batch.

    Args:
        features, latents, k, activation and all options: as of `SparseAutoencoder`; thresholds of a
            JumpReLU are given whole. The first weights are those that it would have in one process
            with the same state of torch's generator, on the CPU.
        mesh: from `torch.distributed.device_mesh.init_device_mesh`, with a dimension "latents" and,
            maybe, one "data".
        columns: the latents are dealt in turn to so many columns, of which each process owns
            neighbouring ones; divides latents (and latents / groups), and is the largest number
            of processes. None takes the least divisor of at least 64. A checkpoint can be read by
            models of the same number.

    Attributes:
        encoder [N / columns, columns, D], encoder_bias [N / columns, columns],
            dictionary [N / columns, columns, D], decoder_bias [D]: the parameters, as DTensors. In
            order of memory they are those of `SparseAutoencoder`.
        counter: counts the latents of this process.

    Note:
        `loss` returns the loss of the whole batch, and its gradient is that of the whole batch: no
        wrapper has to average anything. `output.values` and `output.indices` are codes of this
        process's latents alone (the indices count all N); `encode` returns those of all.

    Raises:
        TypeError, ValueError: mesh, columns or an option do not fit.
        RuntimeError: in a forward pass, a hook on the activation, which would see only a part of
            the scores.

    Example::

        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("latents",))
        model = ShardedAutoencoder(768, 131072, k=32, mesh=mesh)
        output, loss = model.loss(x)    # the same rows x in both processes
        loss.total.backward()
    """

    def __init__(
        self,
        features: int,
        latents: int,
        k: int | None = None,
        *,
        mesh: DeviceMesh,
        activation: nn.Module | None = None,
        columns: int | None = None,
        **options: Any,
    ) -> None:
        with torch.device("meta"):
            super().__init__(features, latents, k, activation=activation, **options)
        groups = self.activation.groups if isinstance(self.activation, TopK) else 1
        self._shards = shards = Shards(mesh, latents, groups, columns)
        self._own_parameters: dict[Tensor, Tensor] | None = None
        device = shards.device
        self.counter = DeadNeuronCounter(shards.layout.own, device=device)
        if isinstance(self.activation, JumpReLU):
            self.activation = _ShardedJumpReLU(self.activation, shards)
        else:
            self.activation.to(device)
        own = self._first_rows(latents, features).to(device)
        self.dictionary = nn.Parameter(shards.wrap(own))
        if not self.tied:
            self.encoder = nn.Parameter(shards.wrap(FIRST_SCALE * own))
        self.encoder_bias = nn.Parameter(shards.wrap(own.new_zeros(len(own))))
        self.decoder_bias = nn.Parameter(shards.replicate(own.new_zeros(features)))
        self.register_state_dict_post_hook(_wrap_counts)
        self.register_load_state_dict_pre_hook(_cut_state)

    def _first_rows(self, latents: int, features: int) -> Tensor:
        """Draw the dictionary of one process, a part at a time; return the rows of this one."""
        layout = self._shards.layout
        # torch draws normal numbers in sixteens: parts of them are those of the whole.
        step = max(16, DRAWN // features // 16 * 16)
        starts = list(range(0, max(latents - 16, 1), step))
        own = []
        for start, end in zip(starts, [*starts[1:], latents], strict=True):
            part = torch.randn(end - start, features)
            columns = torch.arange(start, end) % layout.columns
            mine = (columns >= layout.first) & (columns < layout.first + layout.width)
            own.append(nn.functional.normalize(part[mine], dim=1))
        return torch.cat(own)

    # -- what differs from one process -------------------------------------------------------------

    def _own(self, tensor: Tensor) -> Tensor:
        local = self._shards.local(tensor)
        known = self._own_parameters
        if known is None or not local.requires_grad:
            return self._shards.data.shared(local)
        if tensor not in known:  # its gradient is then summed once, not for each use
            known[tensor] = self._shards.data.shared(local)
        return known[tensor]

    def _total(self, part: Tensor) -> Tensor:
        return self._shards.data.total(part)

    def _all_rows(self, x: Tensor) -> Tensor:
        return self._shards.data.gather(x).flatten(0, 1)

    def _variance(self, x: Tensor) -> Tensor:
        return total_variance(x, self._shards.data)

    def _value_at_rank(self, parts: Iterable[Tensor], rank: int) -> Tensor:
        return value_at_rank(parts, rank, self._shards)

    def _count_rows(self, x: Tensor) -> int:
        rows = super()._count_rows(x)
        if self._shards.data.size == 1:
            return rows
        return int(self._shards.data.sum(torch.tensor(rows, device=x.device)))

    def _scores(self, x: Tensor) -> Scores:
        scores = super()._scores(x)
        pre_bias = scores.pre_bias
        processes = self._shards.latents
        return Scores(
            processes.shared(scores.x),
            scores.weight,
            scores.bias,
            None if pre_bias is None else processes.shared(pre_bias),
            scores.scale,
        )

    def _partial(self) -> Decoder:
        """Return the decoder of the own latents, without a bias."""
        decoder = self._decoder()
        return Decoder(decoder.dictionary, None, decoder.norms)

    def _counts_of_all(self, latents: Tensor) -> list[int]:
        count = torch.tensor([len(latents)], device=latents.device)
        counts: list[int] = self._shards.latents.gather_bytes(count)[0].flatten().tolist()
        return counts

    def _largest(
        self, x: Tensor, k: int, latents: Tensor | None = None, most: int | None = None
    ) -> tuple[Tensor, Tensor, Transposition | None]:
        scores = self._scores(x)
        selected = self._select(scores, k, latents=latents, most=most)
        values, indices, transposition, *_ = self._codes(scores, *selected)
        return values, indices, transposition

    def _decode(
        self,
        values: Tensor,
        indices: Tensor,
        transposition: Transposition | None = None,
        *,
        biased: bool = True,
    ) -> Tensor:
        """Return the reconstruction of codes of own latents in all processes."""
        part = self._partial().sparse(values, indices, transposition)
        total = self._shards.latents.total(part)
        return _biased(total, self._own(self.decoder_bias)) if biased else total

    def encode(self, x: Tensor, k: int | None = None) -> Codes:
        """Return the codes of activations x, of all latents.

        Args:
            x: [..., D], the same in all processes of the mesh's dimension "latents".
            k: keep the k largest scores instead of applying the activation.

        Returns:
            Codes as of `SparseAutoencoder.encode`.
        """
        rows = self._rows(x).values
        if k is None and not isinstance(self.activation, TopK):
            own = self._encode_own(rows)
            codes = self._gathered(own.values, own.indices, own.values.detach() != 0)
            order = key_of(codes.values).argsort(dim=-1, descending=True, stable=True)
            return Codes(codes.values.gather(-1, order), codes.indices.gather(-1, order))
        if k is None:
            self._check_hooks()
        k, groups = (self.activation.k, self.activation.groups) if k is None else (k, 1)
        scores = self._scores(rows)
        indices, selected = self._select(scores, k, groups=groups)
        own = self._codes(scores, indices, selected)
        return self._gathered(own.values, own.indices, selected)

    def _gathered(self, values: Tensor, indices: Tensor, selected: Tensor) -> Codes:
        """Return the selected codes [..., m] of all processes, by ascending index.

        They are as wide as the fullest row needs, and at least 1; shorter rows end in zeros.
        """
        processes = self._shards.latents
        count = selected.sum(-1).amax() if selected.numel() else selected.new_zeros((), dtype=int)
        width = max(1, int(processes.largest(count)))
        order = (~selected).byte().argsort(dim=-1, stable=True)[..., :width]
        values, indices, selected = (t.gather(-1, order) for t in (values, indices, selected))
        indices = torch.where(selected, self._shards.layout.of_all(indices), NO_INDEX)
        missing = (0, width - indices.shape[-1])
        values = torch.where(selected, values, 0)
        values = processes.gather(nn.functional.pad(values, missing)).movedim(0, -2).flatten(-2)
        padded = nn.functional.pad(indices, missing, value=NO_INDEX)
        indices = processes.gather_bytes(padded)[0].movedim(0, -2).flatten(-2)
        indices, order = indices.sort(dim=-1, stable=True)
        exist = indices < NO_INDEX
        count = exist.sum(-1).amax() if exist.numel() else exist.new_zeros((), dtype=int)
        width = max(1, int(count))
        values = values.gather(-1, order)[..., :width]
        return Codes(values, torch.where(exist, indices, 0)[..., :width])

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Return the reconstruction [..., D] of codes [..., k], the same in all processes."""
        layout = self._shards.layout
        column = indices % layout.columns - layout.first
        own = (column >= 0) & (column < layout.width)
        # Those of others become latents of this process with values of zero.
        indices = indices.div(layout.columns, rounding_mode="floor") * layout.width
        indices = indices + column.remainder(layout.width)
        return self._decode(torch.where(own, self._shards.latents.shared(values), 0), indices)

    # -- forward passes ----------------------------------------------------------------------------

    def _output_and_loss(
        self, x: Tensor, variance: Tensor | None, rows: int | None
    ) -> tuple[SAEOutput, SAELoss]:
        self._own_parameters = {}
        try:
            return super()._output_and_loss(x, variance, rows)
        finally:
            self._own_parameters = None

    def _reconstruct(self, x: Tensor) -> tuple[SAEOutput, Tensor, list[Tensor]]:
        shards = self._shards
        rows = self._rows(x)
        encoding = self._encode_own(rows.values)
        prefixes = [shards.layout.below(prefix) for prefix in self.prefixes]
        parts = self._partial()(encoding, prefixes)
        totals = shards.latents.total(torch.stack(parts) if prefixes else parts[0].unsqueeze(0))
        bias = self._own(self.decoder_bias)
        decoded = [rows.restore(_biased(total, bias)) for total in totals]
        if self.training:
            self._count(encoding, x)
        penalty = encoding.penalty
        if isinstance(self.activation, (JumpReLU, nn.ReLU)):  # else it is zero
            penalty = self._total(shards.latents.total(penalty))
        indices = shards.layout.of_all(encoding.indices)
        return SAEOutput(decoded[-1], encoding.values, indices), penalty, decoded[:-1]

    def _count(self, encoding: Encoding, x: Tensor) -> None:
        values, indices = encoding.values.detach(), encoding.indices
        if self._shards.data.size == 1:
            if encoding.dense:
                self.counter.update(values)
            else:
                self.counter.update(indices=indices, values=values)
            return
        counts = count_active(indices, self._shards.layout.own, values)
        self.counter.update(counts=self._shards.data.sum(counts), rows=self._count_rows(x))

    def _encode_own(self, x: Tensor) -> Encoding:
        """Return the codes of the own latents, by the activation over all latents."""
        layer, scores = self.activation, self._scores(x)
        self._check_hooks()
        if isinstance(layer, TopK):
            return self._codes(scores, *self._select(scores, layer.k, groups=layer.groups))
        if isinstance(layer, BatchTopK) and self.training:
            return self._batch_topk(layer, scores)
        return encode(layer, scores, self._width)

    def _check_hooks(self) -> None:
        if has_hooks(self.activation):
            raise RuntimeError(
                f"ShardedAutoencoder: the activation must have no hooks, got {self.activation} "
                "with some, which would see the scores of one process alone"
            )

    @torch.no_grad()
    def _select(
        self,
        scores: Scores,
        k: int,
        *,
        groups: int = 1,
        latents: Tensor | None = None,
        most: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Select the k largest scores of each row among the latents of all processes.

        Args:
            scores: of the own latents.
            k: how many to select, of all processes' latents.
            groups: select k / groups of each group.
            latents: own latents to select from; None for all.
            most: latents to select from in the process that has most; None with all.

        Returns:
            Own latents, int64 [..., m], and bool [..., m]: True for those that are selected.
        """
        layout = self._shards.layout
        count = layout.own if latents is None else len(latents)
        k_of_group = k // groups
        candidates = min(k_of_group, count // groups)
        width = min(k_of_group, (layout.largest if most is None else most) // groups)
        shape = (*scores.x.shape[:-1], groups, candidates)
        if candidates == 0:
            values = scores.x.new_empty(shape)
            indices = values.new_empty(shape, dtype=torch.int64)
        else:
            values, indices = linear_topk(
                scores.x, scores.weight, scores.bias, groups * candidates,
                pre_bias=scores.pre_bias, scale=scores.scale, groups=groups, latents=latents,
                relu=False,
            )  # fmt: skip
        values, indices = values.view(shape), indices.view(shape)
        selected = select_in_rows(
            values, layout.of_all(indices), k_of_group, width, self._shards.latents
        )
        return _narrowed(indices.flatten(-2), selected.flatten(-2))

    def _batch_topk(self, layer: BatchTopK, scores: Scores) -> Encoding:
        """Return the own ones of the codes of the k B largest scores of the batch."""
        x, own = scores.x, self._shards.layout.own
        rows = x.numel() // x.shape[-1]
        all_rows = self._count_rows(x)
        total = kept_in_all("BatchTopK", layer.k, all_rows)
        # Those of the whole batch may all be of the own rows and latents.
        share = min(layer.k if rows == all_rows else -(-total // max(rows, 1)), own)
        unscaled = scores.unscaled() if self._width.favours_dense(own) else None
        found = select_largest_of_batch(share, scores, self._width, unscaled)
        if found is None:
            z = scores.all(unscaled)
            _, values, positions = batch_mask(z.detach(), share, relu=True)
            positive = ~(values <= 0)
            values, positions = values[positive], positions[positive]
            selected = self._select_in_batch(layer, values, positions, rows, total)
            kept = z.new_zeros(z.numel(), dtype=torch.bool)
            kept[positions[selected]] = True
            codes = torch.where(kept.view(z.shape), z.relu(), 0)
            every = torch.arange(own, device=z.device).expand(z.shape)
            return Encoding(codes, every, None, _zero(z), dense=True)
        values, indices, kept = found
        positions = self._flat(indices)[kept]
        kept = kept.masked_scatter(
            kept, self._select_in_batch(layer, values[kept], positions, rows, total)
        )
        return self._codes(scores, *_narrowed(indices, kept))

    def _flat(self, indices: Tensor) -> Tensor:
        """Return the positions [..., m] of own latents in the own scores, row by row."""
        rows = torch.arange(indices[..., :1].numel(), device=indices.device)
        return indices + rows.view(*indices.shape[:-1], 1) * self._shards.layout.own

    def _select_in_batch(
        self, layer: BatchTopK, values: Tensor, positions: Tensor, rows: int, total: int
    ) -> Tensor:
        """Select the largest among the candidates of all processes; update the threshold.

        Args:
            layer: whose threshold it is.
            values: [m], candidates of this process.
            positions: [m], in the own scores.
            rows: of this process.
            total: how many to select.

        Returns:
            bool [m], True for candidates of this process that are selected.
        """
        shards, layout = self._shards, self._shards.layout
        row, own = positions // layout.own, positions % layout.own
        before = shards.data.gather_bytes(torch.tensor([rows], device=row.device))[0]
        row = row + before[: shards.data.rank].sum()
        positions = row * layout.latents + layout.of_all(own)
        # Among the processes that share the rows, then among all.
        selected, values, kept = select_in_batch(values, positions, total, shards.latents)
        if shards.data.size > 1:
            among_all, values, _ = select_in_batch(values, kept, total, shards.data)
            selected = selected & torch.isin(positions, kept[among_all])
        layer.observe(values)
        return selected

    def _codes(self, scores: Scores, indices: Tensor, selected: Tensor) -> Encoding:
        """Return the codes of selected own latents, with their gradients."""
        transposition = transpose_codes(indices, scores.latents)
        values = torch.where(selected, scores.at(indices, transposition).relu(), 0)
        return Encoding(values, indices, transposition, _zero(values))


def _biased(part: Tensor, bias: Tensor) -> Tensor:
    return (part + bias).to(part.dtype)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


def _narrowed(indices: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out places that no row needs; on a CPU, since the host has to know their number.

    Args:
        indices: [..., m].
        selected: bool [..., m].

    Returns:
        Both as wide as the fullest row needs. Shorter rows end in places that are not selected.
    """
    if selected.is_cuda or selected.numel() == 0:
        return indices, selected
    width = int(selected.sum(-1).max())
    if width == selected.shape[-1]:
        return indices, selected
    order = (~selected).byte().argsort(dim=-1, stable=True)[..., :width]
    return indices.gather(-1, order), selected.gather(-1, order)


class _ShardedJumpReLU(JumpReLU):
    """A JumpReLU of the own latents, whose parameter is a DTensor.

    Args:
        layer: of all latents.
        shards: the processes.
    """

    def __init__(self, layer: JumpReLU, shards: Shards) -> None:
        thresholds = layer.log_threshold.detach()
        super().__init__(1, bandwidth=layer.bandwidth, dtype=thresholds.dtype)
        self.n = layer.n
        self._shards = shards
        self.log_threshold = nn.Parameter(shards.wrap(shards.layout.cut(thresholds)))

    @property
    def threshold(self) -> Tensor:
        """Threshold of each of the own latents, differentiable."""
        shards = self._shards
        return shards.data.shared(shards.local(self.log_threshold)).exp()


# -- the state of a model --------------------------------------------------------------------------


def _wrap_counts(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Let the counts of the own latents be known as a part of all."""
    name = f"{prefix}counter.rows_since_fired"
    if name in state:
        state[name] = model._shards.wrap(state[name])


def _cut_state(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the own rows of a state of all latents, of one process or of several."""
    shards: Shards = model._shards
    for name, current in model.state_dict(prefix=prefix).items():
        given = state.get(name)
        if not isinstance(current, DTensor) or given is None:
            continue
        if not isinstance(given, DTensor):
            given = given.to(current.device)
            cut = current.dim() > 1 and given.shape[:1] == (shards.layout.latents,)
            given = shards.wrap(shards.layout.cut(given)) if cut else shards.replicate(given)
        is_count = name == f"{prefix}counter.rows_since_fired"
        state[name] = shards.local(given) if is_count else given
