"""The sparse autoencoder, with its activations and auxiliary losses.

    codes          = activation((x - decoder_bias) @ encoder.T + encoder_bias)
    reconstruction = codes @ dictionary + decoder_bias
    FVU            = sum |x - reconstruction|^2 / sum |x - mean over the batch of x|^2
    total          = FVU + auxk_weight * AuxK + multi_weight * FVU of the multi_k largest codes
                   + sparsity_weight * sparsity + sum over prefixes of the FVU of the prefix

The activation is TopK (Gao et al. 2024), TopK in groups, BatchTopK (Bussmann et al. 2024, arXiv
2412.06410), JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435) or ReLU. `sparsity` is the mean
number of active latents of a row for JumpReLU (its L0, with the straight-through gradient), and the
mean sum of a row's codes for ReLU (L1). With a target, JumpReLU's is (L0 / target - 1)^2 (ibid.,
appendix on other sparsity losses). `prefixes` make a Matryoshka autoencoder (Bussmann et al.
2025, arXiv 2503.17547): the reconstruction from the first latents alone has a loss, too.

AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2) trains dead latents to reconstruct the error.
With e = x - reconstruction, held constant, and e' the reconstruction of e from the auxk largest
scores among the dead latents alone (without decoder_bias, which e does not contain),

    AuxK = min(1, dead / auxk) * sum |e - e'|^2 / sum |x - mean over the batch of x|^2

Multi-TopK (ibid., appendix A.3; 4 k with weight 1/8) keeps the autoencoder usable at other k.

The scores [B, N] are never stored, and the gradients of both matrices are sums over active codes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn import BatchTopK, DeadNeuronCounter, JumpReLU, TopK
from ..nn.batch_topk import value_at_rank_of_parts
from ..nn.recomputation import RecentStates, recomputing
from ..nn.scores import Scores, Width, sizes_are_fixed
from ..nn.wrappers import has_other_processes, is_cut, is_fully_sharded
from ..ops.batch_topk import check_share
from ..ops.checks import check_above_zero, check_count, check_floating
from ..ops.codes import Codes, Transposition
from ..ops.exported import exported
from ..ops.linear_topk.checks import check_layer
from .decoding import Decoder
from .encoding import check_activation, encode
from .statistics import (
    Rows,
    at_least_float32,
    gather_rows,
    geometric_median,
    normalized_rows,
    squared_error,
    total_variance,
)
from .wrappers import ASKED_BY_WRAPPER, Wrapper

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..integrations.checkpoints import Checkpoint

# Lower bound for squared norms in denominators.
SMALLEST_NORM = 1e-30
# Norm of the encoder's rows at first. Measured with TopK on activations of several layers of a
# sentence model, N / D from 2 to 16 and k from 8 to 64: norms of 0.3 to 0.6 learn fastest; with 1,
# FVU after 150 steps of 1024 rows is 5 % to 80 % larger. The best norm is about 0.75 times the one
# whose reconstructions have the least error.
FIRST_SCALE = 0.5
FORWARD_ROWS = 1024
SHARE_OF_BEST = 0.75
# Scores that calibration computes at a time, 64 MiB in float32.
CALIBRATED_SCORES = 1 << 24


@exported("sparsekern.models.sae.SAEOutput")
class SAEOutput(NamedTuple):
    """Result of a forward pass: reconstruction [..., D], values [..., w], indices [..., w].

    For TopK w = k and indices ascend; for others see :meth:`SparseAutoencoder.encode`.
    """

    reconstruction: Tensor
    values: Tensor
    indices: Tensor


@exported("sparsekern.models.sae.SAELoss")
class SAELoss(NamedTuple):
    """The loss and its parts, scalars.

    total = fvu + auxk_weight * auxk + multi_weight * multi + sparsity_weight * sparsity + prefixes
    """

    total: Tensor
    fvu: Tensor
    auxk: Tensor
    multi: Tensor
    sparsity: Tensor
    prefixes: Tensor


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder with few of N latents active.

    Args:
        features: D, width of the activations it is trained on.
        latents: N, width of the sparse layer.
        k: active latents per row, 1..N; short for ``activation=TopK(k)``.
        activation: `sparsekern.TopK`, `BatchTopK`, `JumpReLU` (one threshold a latent) or
            `torch.nn.ReLU`, instead of k. It is applied to codes, not to all N scores, except where
            many are active, or where it has hooks: these see all N, and the codes are then as wide.
        sparsity_weight: weight of the activation's own sparsity loss: L0 for JumpReLU, L1 for ReLU.
            None takes 1 with target_l0 and 0 without. With 0 these two do not become sparse, unless
            the caller adds a loss.
        target_l0: for JumpReLU, the number of active latents of a row that the sparsity loss, then
            (L0 / target_l0 - 1)^2, leads to; None: the loss is L0 itself. `calibrate` at the end
            removes the remaining difference of a few percent.
        prefixes: numbers of first latents, ascending and below N, whose reconstructions have a loss
            of their own (Matryoshka).
        auxk: dead latents per row in the auxiliary loss; 0 leaves it out. The paper takes a power
            of two near D / 2; in short training k is better.
        auxk_weight: weight of that loss.
        multi_k: active latents per row in the second reconstruction; 0 leaves it out.
        multi_weight: weight of its FVU.
        dead_after: rows (tokens) without firing after which a latent is dead.
        distributed: count dead latents over all processes (see `DeadNeuronCounter`).
        tied: one matrix for encoder and dictionary, which is `dictionary` in the state_dict.
        scale_scores: rank and decode by scores times the norms of the dictionary's rows (SAELens'
            rescale_acts_by_decoder_norm): the dictionary may then have rows of any norm.
        normalize_rows: encode rows with their mean subtracted and divided by their standard
            deviation, and give reconstructions both back (OpenAI's TopK autoencoders, SAELens'
            normalize_activations="layer_norm"). D is then at least 2.
        subtract_bias: subtract decoder_bias before the encoder (SAELens' apply_b_dec_to_input);
            Gemma Scope's autoencoders do not.

    Attributes:
        encoder [N, D], encoder_bias [N], dictionary [N, D], decoder_bias [D]: the parameters. The
            dictionary's rows begin with norm 1, the encoder as half of it; `initialize` fits its
            scale to activations.
        counter: the :class:`DeadNeuronCounter`, updated by each forward pass in training mode
            (once for what gradient checkpointing computes twice).

    Raises:
        ValueError, TypeError: a size is not an integer or out of its range.

    Example:
        >>> import torch
        >>> model = SparseAutoencoder(16, 64, k=4)
        >>> output, loss = model.loss(torch.randn(8, 16))
        >>> output.indices.shape
        torch.Size([8, 4])
    """

    # Of models that a version without these arguments pickled.
    subtract_bias = True
    normalize_rows = False

    def __init__(
        self,
        features: int,
        latents: int,
        k: int | None = None,
        *,
        activation: nn.Module | None = None,
        sparsity_weight: float | None = None,
        target_l0: float | None = None,
        prefixes: Sequence[int] = (),
        auxk: int = 0,
        auxk_weight: float = 1 / 32,
        multi_k: int = 0,
        multi_weight: float = 1 / 8,
        dead_after: int = 10_000_000,
        distributed: bool = False,
        tied: bool = False,
        scale_scores: bool = False,
        subtract_bias: bool = True,
        normalize_rows: bool = False,
    ) -> None:
        super().__init__()
        check_count("SparseAutoencoder", "features", features, 2**31 - 1, "what a tensor can hold")
        check_count("SparseAutoencoder", "latents", latents, 2**31 - 1, "what an index can hold")
        for name, value in (("auxk", auxk), ("multi_k", multi_k)):
            if value:
                check_count("SparseAutoencoder", name, value, latents, "the number of latents")
        check_count("SparseAutoencoder", "dead_after", dead_after, 2**62, "rows")
        if (k is None) == (activation is None):
            raise ValueError(
                "SparseAutoencoder: one of k and activation must be given, "
                f"got k = {k} and activation = {activation}"
            )
        _check_prefixes(prefixes, latents)
        dictionary = nn.functional.normalize(torch.randn(latents, features), dim=1)
        self.dictionary = nn.Parameter(dictionary)
        self._tied = tied
        if not tied:
            self.encoder = nn.Parameter(FIRST_SCALE * dictionary)
        self.encoder_bias = nn.Parameter(torch.zeros(latents))
        self.decoder_bias = nn.Parameter(torch.zeros(features))
        self.counter = DeadNeuronCounter(latents, distributed=distributed)
        self.activation = TopK(1) if activation is None else activation
        check_activation(self.activation, latents)
        if k is not None:
            self.k = k
        elif isinstance(self.activation, (TopK, BatchTopK)):
            self.k = self.activation.k  # set, so that it is in every state_dict
        self.target_l0 = _check_target(target_l0, self.activation, latents)
        default_weight = 0.0 if self.target_l0 is None else 1.0
        self.sparsity_weight = default_weight if sparsity_weight is None else sparsity_weight
        self.prefixes = tuple(prefixes)
        self._width = Width()
        self._recent = RecentStates()
        self._wrapper = Wrapper()
        self.auxk, self.auxk_weight = auxk, auxk_weight
        self.multi_k, self.multi_weight = multi_k, multi_weight
        self.dead_after = dead_after
        self.scale_scores = scale_scores
        self.subtract_bias = subtract_bias
        if normalize_rows and features < 2:
            raise ValueError(
                "SparseAutoencoder: features must be at least 2 with normalize_rows, got 1"
            )
        self.normalize_rows = normalize_rows

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        k: int | None = None,
        *,
        activation: nn.Module | None = None,
    ) -> Self:
        """Load a checkpoint of ours or another library (docs/migrating.md lists them).

        Weights are what the file holds, bit for bit, on the CPU; dead latents are counted anew, but
        from a checkpoint of ours. The file is read a tensor at a time.

        Args:
            path: the checkpoint's folder, or its one file.
            k: active latents per row, for formats that do not say it (Qwen-Scope and overcomplete);
                None for all others.
            activation: the layer, instead of k.

        Raises:
            ValueError: it is of no known format, is damaged, or has a key or an option that this
                class lacks; the message names file, key and value.
            OSError: a file cannot be read.
        """
        from ..integrations.checkpoints import read

        if k is not None and activation is not None:
            raise ValueError(
                f"from_pretrained: k must be None with an activation, got k = {k} and {activation}"
            )
        return cls._of_checkpoint(read(path, activation if k is None else TopK(k)), path)

    @classmethod
    def _of_checkpoint(cls, saved: Checkpoint, path: str | os.PathLike[str]) -> Self:
        """Make the model that a checkpoint holds; `path` is for errors."""
        layer = saved.activation
        try:
            with torch.device("meta"):  # the first weights would only be replaced
                model = cls(saved.features, saved.latents, activation=layer, **saved.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the model must be one that can be made: {error}") from error
        distributed = model.counter.distributed
        model.counter = DeadNeuronCounter(saved.latents, distributed=distributed)
        state = {f"counter.{name}": tensor for name, tensor in model.counter.state_dict().items()}
        state |= {f"activation.{name}": tensor for name, tensor in layer.state_dict().items()}
        model.load_state_dict(state | saved.tensors, assign=True)
        return model

    def save_pretrained(self, path: str | os.PathLike[str], to: str = "sparsekern") -> None:
        """Write a checkpoint that `from_pretrained` reads.

        Args:
            path: a folder, new or empty.
            to: the format, ``sparsekern`` (which keeps everything), ``saelens``, ``sparsify``,
                ``dictionary_learning``, ``openmoss``, ``overcomplete`` or ``openai`` (which keep
                weights and activation).

        Raises:
            ValueError: an unknown format, one that cannot express this model, or a folder that is
                not empty.
            OSError: the folder cannot be written.
        """
        from ..integrations.checkpoints import write

        write(self._to_checkpoint(), path, to)

    def _to_checkpoint(self) -> Checkpoint:
        """Return what a checkpoint of this model holds; it shares the weights."""
        from ..integrations.checkpoints import Checkpoint
        from ..integrations.checkpoints.own import OPTIONS

        if is_cut(self.decoder_bias):
            raise RuntimeError(
                "save_pretrained: parameters must be whole, got some that fully_shard has cut: "
                "load torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True into a model of one process"
            )
        values = {name: getattr(self, name) for name in OPTIONS if name != "distributed"}
        options = values | {"distributed": self.counter.distributed}
        return Checkpoint(self.activation, self.state_dict(), options)

    @property
    def k(self) -> int | float:
        """Active latents per row, on average for BatchTopK; other activations have no k."""
        if not isinstance(self.activation, (TopK, BatchTopK)):
            raise AttributeError(self._message_without_k())
        return self.activation.k

    @k.setter
    def k(self, k: int | float) -> None:
        layer = self._activation_with_k()
        check: Callable[..., Any] = check_count if isinstance(layer, TopK) else check_share
        what = "the number of latents"
        layer.k = check("SparseAutoencoder", "k", k, self.encoder_bias.numel(), what)

    def _activation_with_k(self) -> TopK | BatchTopK:
        """Return the activation if it has a number k of active latents; else raise."""
        if not isinstance(self.activation, (TopK, BatchTopK)):
            raise TypeError(self._message_without_k())
        return self.activation

    def _message_without_k(self) -> str:
        name = type(self.activation).__name__
        return f"SparseAutoencoder: {name} has no number of active latents k"

    @property
    def tied(self) -> bool:
        """True if encoder and dictionary are one matrix."""
        return self.encoder is self.dictionary

    def __getattr__(self, name: str) -> Any:
        # A tied encoder is no second parameter, which to_empty or load_state_dict(assign=True)
        # would separate from the first.
        if name == "encoder" and self.__dict__.get("_tied"):
            return self.dictionary
        if name == ASKED_BY_WRAPPER and "_wrapper" in self.__dict__:
            self._wrapper.search_again()
        if name == "k":  # its property has raised AttributeError, as hasattr expects
            raise AttributeError(self._message_without_k())
        return super().__getattr__(name)

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        encoder, dictionary = (state.get(prefix + name) for name in ("encoder", "dictionary"))
        if self.tied and encoder is not None:
            if not _equal(encoder, dictionary):
                errors.append(
                    f"SparseAutoencoder: the state has an {prefix}encoder that differs from its "
                    f"{prefix}dictionary, but this model is tied: make one with tied=False"
                )
                return
            if "encoder" not in self._parameters:
                del state[prefix + "encoder"]  # saved by a version with both names
        elif strict and encoder is None and dictionary is not None and not self.tied:
            errors.append(
                f"SparseAutoencoder: the state has {prefix}dictionary but no {prefix}encoder, that "
                "of a tied model, but this one is not: make one with tied=True"
            )
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    # -- what an autoencoder in several processes does otherwise -----------------------------------

    def _rows_of_replicas(self, x: Tensor, method: str) -> Tensor:
        """Return the rows of all processes that have the same weights and other rows."""
        if is_cut(self.decoder_bias) or is_fully_sharded(self):
            raise RuntimeError(
                f"SparseAutoencoder.{method}: it must be called before fully_shard, or on a model "
                "with the whole state (torch.distributed.checkpoint.state_dict.get_model_state_dict"
                " with full_state_dict=True), since it needs all parameters"
            )
        if not has_other_processes():
            return x
        wrapper = self._wrapper.found(self)
        if isinstance(wrapper, DistributedDataParallel):
            return gather_rows(x, wrapper.process_group)
        return gather_rows(x, None) if self.counter.distributed else x

    def _own(self, tensor: Tensor) -> Tensor:
        """Return the part of a parameter, or of its gradient, that this process computes with."""
        return tensor

    def _total(self, part: Tensor) -> Tensor:
        """Return a sum over the rows of the whole batch from that over the rows given here."""
        return part

    def _all_rows(self, x: Tensor) -> Tensor:
        """Return the whole batch from the rows given here, [rows, D] each."""
        return x

    def _value_at_rank(self, parts: Iterable[Tensor], rank: int) -> Tensor:
        """Return the rank-th largest of all scores, whose parts are given here."""
        return value_at_rank_of_parts(parts, rank)

    def _variance(self, x: Tensor) -> Tensor:
        """Return the variance of the whole batch, of which x [..., D] is what is given here."""
        return total_variance(x)

    def _counts_of_all(self, latents: Tensor) -> list[int]:
        """Return the number of some latents in each process; given are those of this one."""
        return [len(latents)]

    def _rows_of_batch(self, x: Tensor) -> int:
        """Return the rows of the whole batch, of which x [..., D] is what is given here."""
        return x.numel() // x.shape[-1]

    def _count_rows(self, x: Tensor) -> int:
        """Return the rows of the whole batch to divide by: at least 1."""
        return max(1, self._rows_of_batch(x))

    # -- the parts of a forward pass ---------------------------------------------------------------

    def _norms(self) -> Tensor | None:
        return self._own(self.dictionary).norm(dim=1) if self.scale_scores else None

    def _rows(self, x: Tensor) -> Rows:
        """Return x [..., D] as it is encoded."""
        if not self.normalize_rows:
            return Rows(x)
        check_floating("SparseAutoencoder", "x", x)
        return normalized_rows(x)

    def _scores(self, x: Tensor) -> Scores:
        """Return the scores of x [..., D] as it is encoded."""
        encoder, bias = self._own(self.encoder), self._own(self.encoder_bias)
        pre_bias = self._own(self.decoder_bias)
        check_layer("SparseAutoencoder", x, encoder, bias, pre_bias, None, None)
        return Scores(x, encoder, bias, pre_bias if self.subtract_bias else None, self._norms())

    def _largest(
        self, x: Tensor, k: int, latents: Tensor | None = None, most: int | None = None
    ) -> tuple[Tensor, Tensor, Transposition | None]:
        """Return the codes of the k largest scores of each row of x [..., D] as it is encoded.

        latents: only these are selected from; most: their number in the process that has most.
        """
        return self._scores(x).topk(k, latents=latents)

    def _decode(
        self,
        values: Tensor,
        indices: Tensor,
        transposition: Transposition | None = None,
        *,
        biased: bool = True,
    ) -> Tensor:
        """Return the reconstruction [..., D] of codes [..., k]; biased: add decoder_bias."""
        return self._decoder().sparse(values, indices, transposition, biased=biased)

    def _decoder(self) -> Decoder:
        norms = self._norms()
        if norms is not None:  # a dictionary row of norm zero has scores of zero
            norms = torch.where(norms > 0, norms, 1)
        return Decoder(self._own(self.dictionary), self._own(self.decoder_bias), norms)

    def encode(self, x: Tensor, k: int | None = None) -> Codes:
        """Return the codes of activations x.

        Args:
            x: [..., D] of the parameters' dtype (or any floating one, inside an autocast region).
            k: keep the k largest scores instead of applying the activation.

        Returns:
            Codes(values [..., w], indices int64 [..., w]). For TopK w is k and indices ascend. For
            the others w is the number of active latents in the fullest row, the largest scores come
            first, and rows with fewer active latents end in zeros.
        """
        if k is not None:
            codes = Codes(*self._scores(self._rows(x).values).topk(k)[:2])
        else:
            encoding = encode(self.activation, self._scores(self._rows(x).values), self._width)
            codes = Codes(encoding.values, encoding.indices)
        return self._wrapper.guard(self, "encode", codes)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Return the reconstruction [..., D] of codes [..., k].

        With normalize_rows it is one of normalized rows, since codes do not tell the others.
        """
        return self._wrapper.guard(self, "decode", self._decode(values, indices))

    def forward(
        self,
        x: Tensor,
        *,
        return_loss: bool = False,
        variance: Tensor | None = None,
        rows: int | None = None,
    ) -> SAEOutput | tuple[SAEOutput, SAELoss]:
        """Reconstruct x [..., D]; with return_loss, return what `loss` does.

        A wrapper that only knows the forward pass can thus train the model:
        ``output, loss = DistributedDataParallel(model)(x, return_loss=True)``.
        """
        result: SAEOutput | tuple[SAEOutput, SAELoss]
        if return_loss:
            result = self._output_and_loss(x, variance, rows)
        else:
            result = self._reconstruct(x)[0]
        return self._wrapper.guard(self, "forward", result)

    def reconstruct(self, x: Tensor) -> tuple[SAEOutput, list[Tensor]]:
        """Reconstruct x [..., D]; return the output and one reconstruction [..., D] a prefix."""
        output, _, prefixes = self._reconstruct(x)
        return self._wrapper.guard(self, "reconstruct", (output, prefixes))

    def _reconstruct(self, x: Tensor) -> tuple[SAEOutput, Tensor, list[Tensor]]:
        """Return the output, the activation's penalty, and the prefixes' reconstructions."""
        rows = self._rows(x)
        encoding = encode(self.activation, self._scores(rows.values), self._width)
        values, indices = encoding.values, encoding.indices
        decoded = self._decoder()(encoding, self.prefixes)
        *prefixes, reconstruction = [rows.restore(part) for part in decoded]
        if self.training and is_fully_sharded(self):
            self.counter.warn_alone()
        if self.training and encoding.dense:
            self.counter.update(values.detach())
        elif self.training:
            self.counter.update(indices=indices, values=values.detach())
        return SAEOutput(reconstruction, values, indices), encoding.penalty, prefixes

    def loss(
        self, x: Tensor, variance: Tensor | None = None, rows: int | None = None
    ) -> tuple[SAEOutput, SAELoss]:
        """Reconstruct x; return the output and its loss.

        In training the call is passed on to a DistributedDataParallel around the model, or to
        fully_shard, as ``model(x, return_loss=True)``: gradients are averaged.

        Args:
            x: [..., D] floating point.
            variance: 0-d, divisor of the errors; None takes that of x.
            rows: divisor of the sparsity; None takes the rows of x. With variance and rows of a
                whole batch, the losses of its parts add up to that of the batch (except that AuxK
                takes the latents dead at each part, and BatchTopK and target_l0 take the part as
                their batch).

        Returns:
            SAEOutput and SAELoss.

        Raises:
            RuntimeError: DistributedDataParallel wraps a larger model, outside whose forward pass
                this is called.
        """
        wrapper = self._wrapper.around(self, "loss")
        if wrapper is None:
            return self._output_and_loss(x, variance, rows)
        result: tuple[SAEOutput, SAELoss] = wrapper(
            x, return_loss=True, variance=variance, rows=rows
        )
        return result

    def _output_and_loss(
        self, x: Tensor, variance: Tensor | None, rows: int | None
    ) -> tuple[SAEOutput, SAELoss]:
        output, penalty, prefix_reconstructions = self._reconstruct(x)
        variance = self._variance(x) if variance is None else variance
        own_rows = self._count_rows(x)
        rows = own_rows if rows is None else rows
        error = self._squared_error(x, output.reconstruction)
        fvu = error / variance
        auxk = self._auxk_error(x, output.reconstruction, error) if self.auxk else fvu.new_zeros(())
        auxk = auxk / variance
        multi = self._multi_error(x) / variance if self.multi_k else fvu.new_zeros(())
        sparsity = penalty / rows
        if self.target_l0 is not None:
            sparsity = own_rows / rows * (penalty / own_rows / self.target_l0 - 1).square()
        prefix_fvus = (self._squared_error(x, part) / variance for part in prefix_reconstructions)
        prefixes = sum(prefix_fvus, fvu.new_zeros(()))
        total = fvu + self.auxk_weight * auxk + self.multi_weight * multi
        total = total + self.sparsity_weight * sparsity + prefixes
        return output, SAELoss(total, fvu, auxk, multi, sparsity, prefixes)

    def _squared_error(self, x: Tensor, estimate: Tensor) -> Tensor:
        return self._total(squared_error(x, estimate))

    def _auxk_error(self, x: Tensor, reconstruction: Tensor, error: Tensor) -> Tensor:
        """Return min(1, dead / auxk) * sum |e - e'|^2, see above."""
        dead, rows = self._dead_latents(error), self._rows(x)
        residual = (x - reconstruction).detach()
        if sizes_are_fixed(x):
            count = dead.sum()
            dead_codes = self._scores(rows.values).only(dead).topk(self.auxk)
            estimate = rows.rescale(self._decode(*dead_codes, biased=False))
            loss = self._squared_error(residual, estimate)
            loss = (count.to(loss.dtype) / self.auxk).clamp_max(1.0) * loss
            return torch.where(count > 0, loss, 0)
        latents = dead.nonzero().squeeze(1)  # the host waits for their number
        counts = self._counts_of_all(latents)
        if sum(counts) == 0:
            return at_least_float32(x.new_zeros(()))
        codes = self._largest(rows.values, min(self.auxk, sum(counts)), latents, max(counts))
        estimate = rows.rescale(self._decode(*codes, biased=False))
        return min(1.0, sum(counts) / self.auxk) * self._squared_error(residual, estimate)

    def _dead_latents(self, error: Tensor) -> Tensor:
        """Return True for dead latents [N].

        In a pass that gradient checkpointing runs again, these are the latents that were dead in
        the first pass, which is recognised by the squared error of its batch.
        """
        dead = self.counter.dead(self.dead_after)
        if recomputing():
            return self._recent.recall(error, dead)
        if self.training:
            self._recent.remember(error, dead)
        return dead

    def _multi_error(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        codes = self._largest(rows.values, self.multi_k)
        return self._squared_error(x, rows.restore(self._decode(*codes)))

    # -- the dictionary's norms --------------------------------------------------------------------

    @torch.no_grad()
    def normalize_dictionary(self) -> None:
        """Give every row of the dictionary norm 1."""
        self._wrapper.cut_again(self, "normalize_dictionary")
        rows = self._own(self.dictionary)
        rows.copy_(nn.functional.normalize(rows, dim=1))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Subtract the part of the dictionary's gradient that is parallel to its rows."""
        self._wrapper.cut_again(self, "remove_parallel_gradient")
        gradient, rows = self.dictionary.grad, self._own(self.dictionary)
        if gradient is not None:
            gradient = self._own(gradient)
            share = (gradient * rows).sum(1, keepdim=True)
            share /= rows.square().sum(1, keepdim=True).clamp_min(SMALLEST_NORM)
            gradient.sub_(share * rows)

    @torch.no_grad()
    def initialize_bias(self, x: Tensor) -> None:
        """Set decoder_bias to the geometric median of activations x [rows, D].

        Several processes: see `initialize`.
        """
        self._initialize_bias(self._rows_of_replicas(x, "initialize_bias"))

    def _initialize_bias(self, x: Tensor) -> None:
        self._own(self.decoder_bias).copy_(geometric_median(self._all_rows(self._rows(x).values)))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Fit first weights to activations x [rows, D].

        decoder_bias becomes their geometric median. Thresholds of BatchTopK and JumpReLU are
        calibrated (see `calibrate`). An encoder that is not tied is scaled to reconstruct them.

        With distributed=True, or where DistributedDataParallel wraps the model, all processes must
        call it, and the rows of all of them count, which each then holds.

        Raises:
            RuntimeError: fully_shard was given the model.
        """
        x = self._rows_of_replicas(x, "initialize")
        self._initialize_bias(x)
        training = self.training
        self.eval()
        self._calibrate(x)
        if not self.tied:
            product = square = at_least_float32(x.new_zeros(()))
            for part in x.split(FORWARD_ROWS):
                rows = self._rows(part)
                bias = self._own(self.decoder_bias)
                estimate = rows.normalize(self(part).reconstruction) - bias
                estimate = at_least_float32(estimate)
                product = product + (estimate * (rows.values - bias)).sum()
                square = square + estimate.square().sum()
            best = self._total(product) / self._total(square)
            if best > 0:  # else no latent is active, or x is not finite
                self._own(self.encoder).mul_(SHARE_OF_BEST * best)
                self._calibrate(x)
        self.train(training)

    @torch.no_grad()
    def fold_normalization(self, scale: float) -> None:
        """Adapt a model of activations that were multiplied by scale to the original ones.

        Biases and thresholds are divided by scale; encoder and dictionary stay. So reconstructions
        and codes are divided by scale, up to rounding, and the same latents are active. With
        normalize_rows nothing changes: such a model does not depend on the scale.

        Raises:
            TypeError, ValueError: scale is not a number above 0.
        """
        check_above_zero("fold_normalization", "scale", scale)
        self._wrapper.cut_again(self, "fold_normalization")
        if self.normalize_rows:
            return
        self.encoder_bias.div_(scale)
        self.decoder_bias.div_(scale)
        if isinstance(self.activation, BatchTopK):
            self.activation.rescale(1 / scale)
        elif isinstance(self.activation, JumpReLU):
            self.activation.log_threshold.sub_(math.log(scale))

    @torch.no_grad()
    def fold_bias(self) -> None:
        """Make subtract_bias False: encoder_bias takes what subtracting decoder_bias did.

        Codes and reconstructions stay, up to rounding. Formats of some libraries have no such
        subtraction.
        """
        self._wrapper.cut_again(self, "fold_bias")
        if self.subtract_bias:
            shift = self._own(self.encoder) @ self._own(self.decoder_bias)
            self._own(self.encoder_bias).sub_(shift)
            self.subtract_bias = False

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Make scale_scores False: the encoder takes the norms of the dictionary's rows.

        These then have norm 1, or 0 where they had. Codes and reconstructions stay, up to rounding.

        Raises:
            ValueError: the model is tied.
        """
        if self.tied:
            raise ValueError("fold_norms: tied must be False, the encoder becomes another matrix")
        self._wrapper.cut_again(self, "fold_norms")
        norms = self._norms()
        if norms is not None:
            self._own(self.encoder).mul_(norms[:, None])
            self._own(self.encoder_bias).mul_(norms)
            self._own(self.dictionary).div_(torch.where(norms > 0, norms, 1)[:, None])
            self.scale_scores = False

    @torch.no_grad()
    def calibrate(self, x: Tensor, l0: float | None = None) -> None:
        """Set the thresholds of BatchTopK or JumpReLU for a number of active latents.

        Rows then have as many on average in evaluation mode. Other activations do not change.

        Args:
            x: [rows, D], thousands of rows from the training data.
            l0: active latents per row; None takes k of BatchTopK and target_l0 of JumpReLU, without
                which its thresholds do not change.

        Several processes: see `initialize`.
        """
        self._calibrate(self._rows_of_replicas(x, "calibrate"), l0)

    def _calibrate(self, x: Tensor, l0: float | None = None) -> None:
        layer = self.activation
        step = max(1, CALIBRATED_SCORES // len(self._own(self.dictionary)))
        parts = (
            self._scores(self._rows(part).values).all()
            for part in x.reshape(-1, x.shape[-1]).split(step)
        )
        rows = self._rows_of_batch(x)
        if isinstance(layer, BatchTopK):
            layer.calibrate_parts(parts, rows, l0, self._value_at_rank)
        elif isinstance(layer, JumpReLU) and (target := l0 or self.target_l0) is not None:
            layer.calibrate_parts(parts, rows, target, self._value_at_rank)


def folded(saved: Checkpoint, path: str | os.PathLike[str], what: Collection[str]) -> Checkpoint:
    """Return a checkpoint whose weights hold what options did.

    Args:
        saved: as it was read.
        path: where from, for errors.
        what: "norms" (`SparseAutoencoder.fold_norms`), "bias" (`fold_bias`).

    Raises:
        ValueError: no model can be made of it, or norms shall be folded and it is tied.
    """
    model = SparseAutoencoder._of_checkpoint(saved, path)
    if "norms" in what:
        model.fold_norms()
    if "bias" in what:
        model.fold_bias()
    return replace(model._to_checkpoint(), metadata=saved.metadata)


def _check_target(target: float | None, activation: nn.Module, latents: int) -> int | float | None:
    if target is None:
        return None
    if not isinstance(activation, JumpReLU):
        name = type(activation).__name__
        raise ValueError(f"SparseAutoencoder: target_l0 must be None with {name}, got {target}")
    what = "the number of latents"
    return check_share("SparseAutoencoder", "target_l0", target, latents, what)


def _equal(one: Tensor, other: Tensor | None) -> bool:
    """Return True if two saved matrices are equal, or may be (without data)."""
    if other is None or one is other or one.is_meta or other.is_meta:
        return other is not None
    return one.shape == other.shape and bool((one == other.to(one.device)).all())


def _check_prefixes(prefixes: Sequence[int], latents: int) -> None:
    for prefix in prefixes:
        check_count("SparseAutoencoder", "prefixes", prefix, latents - 1, "below the latents")
    if any(one >= following for one, following in itertools.pairwise(prefixes)):
        raise ValueError(f"SparseAutoencoder: prefixes must ascend, got {list(prefixes)}")
