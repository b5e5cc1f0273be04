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

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from ..dispatch.transforms import is_wrapped
from ..integrations.checkpoints.own import OPTIONS
from ..nn import BatchTopK, DeadNeuronCounter, JumpReLU, TopK
from ..nn.hooks import has_hooks
from ..nn.scores import Scores, sizes_are_fixed
from ..ops.codes import Codes, Transposition
from ..ops.count_active import count_active
from ..ops.order import key_of
from ..sae.decoding import Decoder
from ..sae.encoding import Encoding, encode
from ..sae.model import FIRST_SCALE, SAELoss, SAEOutput, SparseAutoencoder
from .codes import Latents, batch_topk, codes_of, gather_codes, select_largest
from .sharding import Shards
from .state import cut_state, gather_value, wrap_counts
from .statistics import total_variance, value_at_rank

# Numbers of the dictionary that are drawn at a time.
DRAWN = 1 << 22
# Calls whose arguments are compared among processes, on a GPU.
CHECKED = 16

Function = TypeVar("Function", bound=Callable[..., Any])


def _eager(function: Function) -> Function:
    """Let compiled code call a function as it is: its sizes follow from what is selected."""
    disabled: Function = torch.compiler.disable(function)
    return disabled


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
            of processes. None takes the least divisor of at least 64. A checkpoint of several
            processes can be read by models of the same number.

    Attributes:
        encoder [N / columns, columns, D], encoder_bias [N / columns, columns],
            dictionary [N / columns, columns, D], decoder_bias [D]: the parameters, as DTensors. In
            order of memory they are those of `SparseAutoencoder`.
        counter: counts the latents of this process.
        shards: the processes, and which latents this one owns.

    Note:
        `loss` returns the loss of the whole batch, and its gradient is that of the whole batch: no
        wrapper has to average anything. `output.values` and `output.indices` are codes of this
        process's latents alone (the indices count all N); `encode` returns those of all. Compiled
        code calls it as it is.

    Raises:
        TypeError, ValueError: mesh, columns or an option do not fit.
        RuntimeError: in a forward pass: a hook on the activation, which would see only a part of
            the scores; processes that share the latents and get different rows.

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
        self.shards = shards = Shards(mesh, latents, groups, columns)
        self._own_parameters: dict[Tensor, Tensor] | None = None
        self._checked = 0
        meta = torch.get_default_device()
        device = meta if meta.type == "meta" else shards.device
        self.counter = DeadNeuronCounter(shards.layout.own, device=device)
        if isinstance(self.activation, JumpReLU):
            self.activation = _ShardedJumpReLU(self.activation, shards)
        else:
            self.activation.to(shards.device)
        own = _first_rows(latents, features, shards).to(device)
        self.dictionary = nn.Parameter(shards.wrap(own))
        if not self.tied:
            self.encoder = nn.Parameter(shards.wrap(FIRST_SCALE * own))
        self.encoder_bias = nn.Parameter(shards.wrap(own.new_zeros(len(own))))
        self.decoder_bias = nn.Parameter(shards.replicate(own.new_zeros(features)))
        # So that DistributedDataParallel says that it is not needed.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_parameters()]
        self.register_state_dict_post_hook(wrap_counts)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(cut_state)  # type: ignore[no-untyped-call]

    # -- models of one process ---------------------------------------------------------------------

    @classmethod
    def from_model(
        cls, model: SparseAutoencoder, mesh: DeviceMesh, columns: int | None = None
    ) -> ShardedAutoencoder:
        """Share out the latents of a model, which each process has whole.

        Args:
            model: its weights are copied, and its counts; it stays as it is.
            mesh: see the class.
            columns: see the class.
        """
        features, latents = model.decoder_bias.shape[0], len(model.encoder_bias)
        activation = copy.deepcopy(model.activation)
        with torch.device("meta"):
            sharded = cls(
                features, latents, activation=activation, mesh=mesh, columns=columns,
                **_options_of(model),
            )  # fmt: skip
        sharded.load_state_dict(model.state_dict(), assign=True)
        return sharded.train(model.training)

    def gather(self) -> SparseAutoencoder:
        """Return the model with all latents, on the CPU; a copy in each process, which all call."""
        state = {name: gather_value(value) for name, value in self.state_dict().items()}
        layer = self.activation
        if isinstance(layer, JumpReLU):
            layer = JumpReLU(self.shards.layout.latents, bandwidth=layer.bandwidth)
        features, latents = self.decoder_bias.shape[0], self.shards.layout.latents
        with torch.device("meta"):
            model = SparseAutoencoder(
                features, latents, activation=copy.deepcopy(layer), **_options_of(self)
            )
        model.load_state_dict(state, assign=True)
        return model.train(self.training)

    def save_pretrained(self, path: str | os.PathLike[str], to: str = "sparsekern") -> None:
        """Write a checkpoint of all latents, as `SparseAutoencoder.save_pretrained` does.

        All processes must call it; the first of the mesh writes.

        Raises:
            ValueError, OSError: see there.
            RuntimeError: in the other processes, if the first could not write.
        """
        model, error = self.gather(), None
        first = self.shards.latents.rank == self.shards.data.rank == 0
        if first:
            try:
                model.save_pretrained(path, to)
            except (OSError, ValueError) as caught:
                error = caught
        failed = torch.tensor(int(error is not None), device=self.shards.device)
        for group in (self.shards.latents, self.shards.data):
            failed = group.largest(failed)
        if error is not None:
            raise error
        if bool(failed):
            raise RuntimeError(f"save_pretrained: the first process could not write {path}")

    # -- what differs from one process -------------------------------------------------------------

    def _rows_of_replicas(self, x: Tensor, method: str) -> Tensor:
        return x  # what follows knows of the others

    def _own(self, tensor: Tensor) -> Tensor:
        local = self.shards.local(tensor)
        known = self._own_parameters
        if known is None or not local.requires_grad:
            return self.shards.data.shared(local)
        if tensor not in known:  # its gradient is then summed once, not for each use
            known[tensor] = self.shards.data.shared(local)
        return known[tensor]

    def _total(self, part: Tensor) -> Tensor:
        return self.shards.data.total(part)

    def _all_rows(self, x: Tensor) -> Tensor:
        data = self.shards.data
        if data.size == 1:
            return x
        (counts,) = data.gather_bytes(torch.tensor([len(x)], device=x.device))
        most = int(counts.max())
        padded = nn.functional.pad(x, (0, 0, 0, most - len(x)))
        parts = zip(data.gather(padded), counts.flatten().tolist(), strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def _variance(self, x: Tensor) -> Tensor:
        return total_variance(x, self.shards.data)

    def _value_at_rank(self, parts: Iterable[Tensor], rank: int) -> Tensor:
        return value_at_rank(parts, rank, self.shards)

    def _counts_of_all(self, latents: Tensor) -> list[int]:
        count = torch.tensor([len(latents)], device=latents.device)
        counts: list[int] = self.shards.latents.gather_bytes(count)[0].flatten().tolist()
        return counts

    def _rows_of_batch(self, x: Tensor) -> int:
        rows = super()._rows_of_batch(x)
        if self.shards.data.size == 1:
            return rows
        return int(self.shards.data.sum(torch.tensor(rows, device=x.device)))

    def _scores(self, x: Tensor) -> Scores:
        """Return the scores of the own latents."""
        own, processes = super()._scores(x), self.shards.latents
        pre_bias = None if own.pre_bias is None else processes.shared(own.pre_bias)
        return Scores(processes.shared(own.x), own.weight, own.bias, pre_bias, own.scale)

    def _largest(
        self, x: Tensor, k: int, latents: Tensor | None = None, most: int | None = None
    ) -> tuple[Tensor, Tensor, Transposition | None]:
        scores = self._scores(x)
        some = None if latents is None or most is None else Latents(latents, most)
        encoding = codes_of(scores, select_largest(scores, k, self.shards, latents=some))
        return encoding.values, encoding.indices, encoding.transposition

    def _decode(
        self,
        values: Tensor,
        indices: Tensor,
        transposition: Transposition | None = None,
        *,
        biased: bool = True,
    ) -> Tensor:
        """Return the reconstruction from the codes of each process's own latents."""
        part = self._partial_decoder().sparse(values, indices, transposition)
        total = self.shards.latents.total(part)
        return self._with_bias(total) if biased else total

    def _partial_decoder(self) -> Decoder:
        """Return the decoder of the own latents, without a bias."""
        decoder = self._decoder()
        return Decoder(decoder.dictionary, None, decoder.norms)

    def _with_bias(self, total: Tensor) -> Tensor:
        return (total + self._own(self.decoder_bias)).to(total.dtype)

    # -- forward passes ----------------------------------------------------------------------------

    @_eager
    def encode(self, x: Tensor, k: int | None = None) -> Codes:
        """Return the codes of activations x, of all latents.

        Args:
            x: [..., D], the same in all processes of the mesh's dimension "latents".
            k: keep the k largest scores instead of applying the activation.

        Returns:
            Codes as of `SparseAutoencoder.encode`.
        """
        self._check_call(x)
        rows, layer = self._rows(x).values, self.activation
        if k is not None or isinstance(layer, TopK):
            k, groups = (layer.k, layer.groups) if isinstance(layer, TopK) and k is None else (k, 1)
            scores = self._scores(rows)
            selection = select_largest(scores, k or 0, self.shards, groups=groups)
            values, indices, *_ = codes_of(scores, selection)
            return gather_codes(values, indices, selection.chosen, self.shards, k)
        values, indices, *_ = self._encode_own(rows)
        codes = gather_codes(values, indices, values.detach() != 0, self.shards)
        order = key_of(codes.values).argsort(dim=-1, descending=True, stable=True)
        return Codes(codes.values.gather(-1, order), codes.indices.gather(-1, order))

    @_eager
    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Return the reconstruction [..., D] of codes [..., k], the same in all processes."""
        layout = self.shards.layout
        column = indices % layout.columns - layout.first
        own = (column >= 0) & (column < layout.width)
        # Those of others become latents of this process with values of zero.
        row = indices.div(layout.columns, rounding_mode="floor")
        own_indices = row * layout.width + column.remainder(layout.width)
        values = torch.where(own, self.shards.latents.shared(values), 0)
        return self._decode(values, own_indices)

    @_eager
    def _output_and_loss(
        self, x: Tensor, variance: Tensor | None, rows: int | None
    ) -> tuple[SAEOutput, SAELoss]:
        self._own_parameters = {}
        try:
            return super()._output_and_loss(x, variance, rows)
        finally:
            self._own_parameters = None

    @_eager
    def _reconstruct(self, x: Tensor) -> tuple[SAEOutput, Tensor, list[Tensor]]:
        self._check_call(x)
        shards, rows = self.shards, self._rows(x)
        encoding = self._encode_own(rows.values)
        prefixes = [shards.layout.below(prefix) for prefix in self.prefixes]
        parts = self._partial_decoder()(encoding, prefixes)
        totals = shards.latents.total(torch.stack(parts))
        *prefix_reconstructions, reconstruction = [
            rows.restore(self._with_bias(total)) for total in totals
        ]
        if self.training:
            self._count(encoding, x)
        penalty = encoding.penalty
        if isinstance(self.activation, (JumpReLU, nn.ReLU)):  # else it is zero
            penalty = self._total(shards.latents.total(penalty))
        indices = shards.layout.of_all(encoding.indices)
        output = SAEOutput(reconstruction, encoding.values, indices)
        return output, penalty, prefix_reconstructions

    def _encode_own(self, x: Tensor) -> Encoding:
        """Return the codes of the own latents, by the activation over all latents."""
        layer, scores = self.activation, self._scores(x)
        if isinstance(layer, TopK):
            selection = select_largest(scores, layer.k, self.shards, groups=layer.groups)
            return codes_of(scores, selection)
        if isinstance(layer, BatchTopK) and self.training:
            return batch_topk(layer, scores, self._width, self.shards, self._count_rows)
        return encode(layer, scores, self._width)

    def _count(self, encoding: Encoding, x: Tensor) -> None:
        """Count which of the own latents fired, in all rows."""
        values, indices, data = encoding.values.detach(), encoding.indices, self.shards.data
        if data.size > 1:
            counts = data.sum(count_active(indices, self.shards.layout.own, values))
            self.counter.update(counts=counts, rows=self._rows_of_batch(x))
        elif encoding.dense:
            self.counter.update(values)
        else:
            self.counter.update(indices=indices, values=values)

    def _check_call(self, x: Tensor) -> None:
        """Raise unless the processes that share the latents make the same call.

        Their sums would be wrong, and other sizes would wait forever. On a GPU, where the host has
        to wait, only the first calls are checked. Where nothing is sent along "data" in between,
        processes go on, and this raises before they next send something to each other.
        """
        if has_hooks(self.activation):
            raise RuntimeError(
                f"ShardedAutoencoder: the activation must have no hooks, got {self.activation} "
                "with some, which would see the scores of one process alone"
            )
        if sizes_are_fixed(x) or is_wrapped(x):
            raise RuntimeError(
                "ShardedAutoencoder: it must be called as it is, not under torch.func, vmap, "
                "tracing or the capture of a CUDA graph, since sizes follow from what the "
                "processes select"
            )
        if isinstance(self, FSDPModule):
            raise RuntimeError(
                "ShardedAutoencoder: it must not be sharded again by fully_shard: its parameters "
                "are, and its gradients are those of the whole batch"
            )
        processes = self.shards.latents
        self._checked += 1
        if processes.size == 1 or (x.is_cuda and self._checked > CHECKED):
            return
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.element_size(), torch.uint8)
        k = self.activation.k if isinstance(self.activation, (TopK, BatchTopK)) else 0
        facts = [x.numel(), self.training, hash(k), 0]
        own = torch.tensor(facts, dtype=torch.int64, device=x.device)
        own[-1] = x.detach().contiguous().view(bits).sum(dtype=torch.int64) if x.dim() else 0
        if self.shards.data.size == 1:
            processes.look_later(own, _check_same_call)
        else:
            _check_same_call(processes.gather_bytes(own)[0])


def _check_same_call(facts: Tensor) -> None:
    """Raise unless the facts of a call, [processes, 4], are the same in all processes."""
    differ = (facts != facts[0]).any(0).tolist()
    if any(differ):
        names = ("the size of x", "its mode (training or evaluation)", "k", "x")
        raise RuntimeError(
            f"ShardedAutoencoder: {names[differ.index(True)]} must be the same in all processes "
            "that share the latents (give each all rows of the batch), got different ones"
        )


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
        return self._shards.data.shared(self._shards.local(self.log_threshold)).exp()


def _first_rows(latents: int, features: int, shards: Shards) -> Tensor:
    """Draw the dictionary of one process, a part at a time; return the rows of this one."""
    layout = shards.layout
    if torch.get_default_device().type == "meta":
        return torch.empty(layout.own, features)
    # torch draws normal numbers in sixteens: parts of whole ones are those of one draw.
    step = max(16, DRAWN // features // 16 * 16)
    starts = list(range(0, max(latents - 16, 1), step))
    own = []
    for start, end in zip(starts, [*starts[1:], latents], strict=True):
        part = torch.randn(end - start, features, device="cpu")
        columns = torch.arange(start, end, device="cpu") % layout.columns
        mine = (columns >= layout.first) & (columns < layout.first + layout.width)
        own.append(nn.functional.normalize(part[mine], dim=1))
    return torch.cat(own)


def _options_of(model: SparseAutoencoder) -> dict[str, Any]:
    """Return the arguments that make a model like this one, but for sizes and activation."""
    return {name: getattr(model, name) for name in OPTIONS if name != "distributed"}
