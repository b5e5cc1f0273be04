"""The motif model of Sparling: a local network, a bottleneck of extreme sparsity, and a readout.

    inputs [B, C_in, *space] -> local network -> scores [B, C, *space] -> bottleneck
    -> activations [B, C, *space], nearly all zero -> readout -> a sequence of symbols

Only inputs and sequences are seen in training; where the activations end up, and what their
channels stand for, is what the study measures. Sizes follow Gupta et al. (arXiv 2302.01976) and the
authors' public settings; the small parts (:class:`PatchMotifs`, :class:`SlotReadout`) are ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import SpatialSparsity
from ..nn.scores import sizes_are_fixed
from ..ops.checks import check_same_dtype
from ..ops.exported import exported
from ..sae.normalisation import BatchNorm1d, BatchNorm2d

PAD = -1  # after the end of a label
EPS = 1e-5
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
POOLS = {1: F.max_pool1d, 2: F.max_pool2d}


@exported("sparsekern.models.sparling.MotifOutput")
class MotifOutput(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor
    """[B, L, S + 1], of the symbols at each place of the sequence and of its end."""
    activations: Tensor
    """[B, C, *space]."""
    penalty: Tensor
    """Scalar, what the bottleneck adds to the loss."""


# -- local networks --------------------------------------------------------------------------------


class ResidualMotifs(nn.Module):
    """The published local network: a 1x1 convolution, residual units, and a 1x1 convolution.

    The first convolution leads to `width` channels, the last one to `channels`; a residual unit is
    two 3x3 convolutions, each after batch normalisation and ReLU.

    With `depth` convolutions its receptive field is 2 * depth + 1 in each of `dims` dimensions.
    """

    def __init__(
        self, in_channels: int, channels: int, *, depth: int = 8, width: int = 64, dims: int = 2
    ) -> None:
        super().__init__()
        if depth < 2 or depth % 2:
            raise ValueError(
                f"ResidualMotifs: depth must be an even number of at least 2, got {depth}"
            )
        conv = CONVOLUTIONS[dims]
        self.first = conv(in_channels, width, 1)
        self.units = nn.ModuleList(_residual_unit(width, dims) for _ in range(depth // 2))
        self.last = conv(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Score inputs [B, C_in, *space] -> [B, C, *space]."""
        x = self.first(x)
        for unit in self.units:
            x = x + unit(x)
        scores: Tensor = self.last(x)
        return scores


def _residual_unit(width: int, dims: int) -> nn.Sequential:
    """Make a residual unit: two 3x3 convolutions, each after batch normalisation and ReLU."""
    conv = CONVOLUTIONS[dims]
    norm = BatchNorm1d if dims == 1 else BatchNorm2d
    return nn.Sequential(
        norm(width), nn.ReLU(), conv(width, width, 3, padding=1),
        norm(width), nn.ReLU(), conv(width, width, 3, padding=1),
    )  # fmt: skip


class PatchMotifs(nn.Sequential):
    """A small local network for images: each patch through two hidden layers.

    Patches are of `field` (height, width) pixels, hidden layers of `width` units with batch
    normalisation and ReLU.

    A field no larger than a motif keeps the activations inside it: what sees a motif from outside
    sees less of it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        field: tuple[int, int] = (7, 5),
        width: int = 16,
    ) -> None:
        if any(size % 2 == 0 or size < 1 for size in field):
            raise ValueError(f"PatchMotifs: field must be two odd numbers, got {field}")
        padding = (field[0] // 2, field[1] // 2)
        super().__init__(
            nn.Conv2d(in_channels, width, field, padding=padding, bias=False),
            BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1),
        )


# -- bottlenecks -----------------------------------------------------------------------------------


class PenalizedBottleneck(nn.Module):
    """The bottlenecks that Sparling is compared with: batch normalisation and a penalty.

    The penalty is to make the activations sparse.

    kind "l1": y = relu(z), penalty = weight * mean |y|. kind "kl": a = sigmoid(z),
    y = relu(a - 0.5), penalty = weight * KL(density || mean a) of two coins. kind "none":
    y = relu(z), no penalty.
    """

    def __init__(self, channels: int, kind: str, *, weight: float = 0.0, density: float = 1.0):
        super().__init__()
        if kind not in ("l1", "kl", "none"):
            raise ValueError(f"PenalizedBottleneck: kind must be l1, kl or none, got {kind!r}")
        self.kind, self.penalty_weight, self.density = kind, weight, density
        self.norm = BatchNorm1d(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return activations [B, C, *space] of scores of that shape, and the penalty, a scalar."""
        z = self.norm(x.flatten(2)).view(x.shape)
        if self.kind != "kl":
            y = z.relu()
            weight = self.penalty_weight if self.kind == "l1" else 0.0
            return y, weight * y.mean()
        probability = z.sigmoid()
        p, q = self.density, probability.mean().clamp(EPS**2, 1 - EPS)
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return (probability - 0.5).relu(), self.penalty_weight * divergence


# -- readouts --------------------------------------------------------------------------------------


class Widening(nn.Module):
    """A 1x1 convolution to `width` channels, then the maximum over blocks of positions.

    Blocks reach over `pool` positions along each dimension.

    Where few positions are active, only those are convolved: all others of a block have the bias.
    The result is the same, up to rounding; the gradient of equal maxima is shared among them.
    """

    # Share of active positions from which on the dense convolution is faster.
    SPARSE_SHARE = 0.02

    def __init__(self, channels: int, width: int, pool: int, *, dims: int = 2) -> None:
        super().__init__()
        self.pool, self.dims = pool, dims
        self.conv = CONVOLUTIONS[dims](channels, width, 1)

    def forward(self, activations: Tensor) -> Tensor:
        """Widen [B, C, *space] -> [B, width, *(s // pool for s in space)]."""
        check_same_dtype("Widening", activations, self.conv.weight)
        if not activations.is_cuda and not sizes_are_fixed(activations):
            places = (activations.detach() != 0).any(1).nonzero()
            share = len(places) * activations.shape[1] / max(activations.numel(), 1)
            if share < self.SPARSE_SHARE and self.pool > 1:
                return self._convolve_active(activations, places)
        return POOLS[self.dims](self.conv(activations), self.pool)

    def _convolve_active(self, activations: Tensor, places: Tensor) -> Tensor:
        """Convolve only the positions with an activation, places [P, 1 + dims]."""
        batch, _, *space = activations.shape
        cells = [size // self.pool for size in space]
        inside = (places[:, 1:] // self.pool < torch.tensor(cells)).all(1)
        places = places[inside]
        columns = activations.movedim(1, -1)[tuple(places.unbind(1))]
        weight, bias = self.conv.weight.flatten(1), self.conv.bias
        if bias is None:
            raise RuntimeError("Widening: the convolution must have a bias")
        cell = places[:, 0]
        for dim, count in enumerate(cells):
            cell = cell * count + places[:, 1 + dim] // self.pool
        count = batch * math.prod(cells)
        full = torch.bincount(cell, minlength=count) == self.pool**self.dims
        widened = F.linear(columns, weight, bias)  # of another dtype than the bias under autocast
        rows = torch.where(full.unsqueeze(1), -math.inf, bias).to(widened.dtype)
        rows = rows.scatter_reduce(0, cell.unsqueeze(1).expand(-1, len(weight)), widened, "amax")
        return rows.view(batch, *cells, -1).movedim(-1, 1)


class SlotReadout(nn.Module):
    """A small readout of images: widening, pooling, two hidden layers and a classifier.

    The hidden layers have batch normalisation; there is a classifier for each place of the
    sequence.
    """

    def __init__(
        self,
        channels: int,
        space: tuple[int, ...],
        symbols: int,
        length: int,
        *,
        width: int = 16,
        pool: int = 4,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.symbols, self.length = symbols, length
        self.widening = Widening(channels, width, pool, dims=len(space))
        inputs = width * math.prod(size // pool for size in space)
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False), BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False), BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, length * (symbols + 1)),
        )  # fmt: skip

    def forward(self, activations: Tensor, labels: Tensor | None) -> Tensor:
        """Compute logits [B, L, S + 1]; labels are not needed."""
        pooled = self.widening(activations).relu().flatten(1)
        logits: Tensor = self.layers(pooled)
        return logits.view(-1, self.length, self.symbols + 1)

    @torch.no_grad()
    def decode(self, activations: Tensor) -> Tensor:
        """Decode labels int64 [B, L], padded with -1 from the first end on."""
        return pad_after_end(self(activations, None).argmax(-1), self.symbols)


class SequenceReadout(nn.Module):
    """The published readout: widening to 512 channels, pooling by 8, and a transformer.

    For images a bidirectional LSTM along rows comes before the transformer, with a sinusoidal
    encoding of the column's place.
    """

    def __init__(
        self,
        channels: int,
        space: tuple[int, ...],
        symbols: int,
        length: int,
        *,
        width: int = 512,
        pool: int = 8,
        layers: int = 6,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        dims = len(space)
        self.symbols, self.length = symbols, length
        self.widening = Widening(channels, width, pool, dims=dims)
        self.rows: nn.LSTM | None = None
        if dims == 2:
            self.rows = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        encoder = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True)
        decoder = nn.TransformerDecoderLayer(width, heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers)
        # The symbols, the end, and the beginning.
        self.embedding = nn.Embedding(symbols + 2, width)
        self.classes = nn.Linear(width, symbols + 1)

    def memory(self, activations: Tensor) -> Tensor:
        """Encode activations to what the decoder attends to, [B, places, width]."""
        x = self.widening(activations)
        if self.rows is None:
            x = x.transpose(1, 2)
            x = self.dropout(x + position_encoding(x.shape[1], x))
        else:
            batch, width, height, columns = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(batch * height, columns, width)
            x = self.rows(rows)[0].view(batch, height, columns, width)
            x = self.dropout(x + position_encoding(height, x).unsqueeze(1)).flatten(1, 2)
        memory: Tensor = self.encoder(x)
        return memory

    def forward(self, activations: Tensor, labels: Tensor | None) -> Tensor:
        """Compute logits [B, L, S + 1] of each place, given the true symbols before it.

        Args:
            activations: [B, C, *space].
            labels: int64 [B, L], padded with -1.

        Raises:
            ValueError: there are no labels.
        """
        if labels is None:
            raise ValueError("SequenceReadout: labels must be given; decode() needs none")
        return self._logits(self.memory(activations), target_classes(labels, self.symbols)[:, :-1])

    def _logits(self, memory: Tensor, before: Tensor) -> Tensor:
        """Compute logits [B, l + 1, S + 1] of each place after the classes [B, l] before it."""
        start = before.new_full((len(before), 1), self.symbols + 1)
        x = self.embedding(torch.cat((start, before), 1))
        x = self.dropout(x + position_encoding(x.shape[1], x))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        logits: Tensor = self.classes(self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True))
        return logits

    @torch.no_grad()
    def decode(self, activations: Tensor) -> Tensor:
        """Decode labels int64 [B, L] greedily, padded with -1 from the first end on."""
        memory = self.memory(activations)
        classes = torch.empty(len(memory), 0, dtype=torch.int64, device=memory.device)
        for _ in range(self.length):
            newest = self._logits(memory, classes)[:, -1].argmax(-1, keepdim=True)
            classes = torch.cat((classes, newest), 1)
        return pad_after_end(classes, self.symbols)


def position_encoding(count: int, like: Tensor) -> Tensor:
    """Compute sinusoidal encodings [count, width] of places, like a tensor [..., width]."""
    width = like.shape[-1]
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    angles = torch.arange(count, device=like.device).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width].to(like.dtype)


def pad_after_end(classes: Tensor, end: int) -> Tensor:
    """Replace everything from the first end on in classes [B, L] by the padding."""
    over = (classes == end).long().cumsum(1) > 0
    return classes.masked_fill(over, PAD)


def target_classes(labels: Tensor, end: int) -> Tensor:
    """Replace the padding of labels [B, L] by the end."""
    return torch.where(labels == PAD, end, labels)


# -- the model -------------------------------------------------------------------------------------


class MotifModel(nn.Module):
    """Local network, bottleneck and readout; each can be one's own.

    Args:
        motifs: inputs float [B, C_in, *space] -> scores [B, C, *space].
        bottleneck: :class:`sparsekern.SpatialSparsity`, :class:`PenalizedBottleneck`, or None.
        readout: module of (activations, labels or None) -> logits [B, L, S + 1], with a method
            ``decode(activations)`` -> labels int64 [B, L].
    """

    def __init__(self, motifs: nn.Module, bottleneck: nn.Module | None, readout: nn.Module) -> None:
        super().__init__()
        self.motifs, self.bottleneck, self.readout = motifs, bottleneck, readout

    def activations(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute activations [B, C, *space] of inputs of any dtype, and their penalty."""
        scores: Tensor = self.motifs(inputs.to(next(self.parameters()).dtype))
        if self.bottleneck is None:
            return scores, scores.new_zeros(())
        if isinstance(self.bottleneck, SpatialSparsity):
            return self.bottleneck(scores), scores.new_zeros(())
        activations, penalty = self.bottleneck(scores)
        return activations, penalty

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> MotifOutput:
        """Run the whole model.

        Labels are int64 [B, L], padded with -1; a readout that predicts from the symbols before
        needs them.
        """
        activations, penalty = self.activations(inputs)
        return MotifOutput(self.readout(activations, labels), activations, penalty)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """Predict labels int64 [B, L], padded with -1."""
        labels: Tensor = self.readout.decode(self.activations(inputs)[0])  # type: ignore[operator]
        return labels


def motif_loss(output: MotifOutput, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of the symbols and of one end, a mean, plus the penalty.

    Args:
        output: of the model.
        labels: int64 [B, L], padded with -1.
    """
    end = output.logits.shape[-1] - 1
    classes = target_classes(labels, end)
    counted = (labels != PAD).long().sum(1, keepdim=True) >= torch.arange(
        labels.shape[1], device=labels.device
    )
    classes = classes.masked_fill(~counted, -100)  # the end is asked for once
    entropy = F.cross_entropy(output.logits.flatten(0, 1).float(), classes.flatten())
    return entropy + output.penalty
