"""A run of the study in the form the training loop asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...data.motifs.domain import TEST_SEED, VALIDATION_SEED, MotifDomain
from ...models.sparling import (
    MotifModel,
    PatchMotifs,
    PenalizedBottleneck,
    ResidualMotifs,
    SequenceReadout,
    SlotReadout,
    motif_loss,
)
from ...nn import SpatialSparsity
from ...training import AccuracyGatedDensity
from . import measures
from .config import SparlingConfig

# Channels, and depth of the published local network, by domain.
CHANNELS = {"tiny": 4, "digit-circle": 10, "latex": 32, "audio": 10}
DEPTHS = {"digit-circle": 8, "latex": 32, "audio": 16}
# For reports: the networks around the bottleneck.
NETWORKS = {
    "tiny": "Networks of our own: a convolution of 7 x 5 pixels, as large as a stamp, and two of "
    "1 x 1 before the bottleneck (with a larger field a channel can settle beside its motif, where "
    "the metrics do not look); after it a small readout with batch normalisation.",
    **dict.fromkeys(DEPTHS, "Networks around the bottleneck as published."),
}


class Samples:
    """A batch of the training stream: numbers of samples, which are drawn when they are needed."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count


class CheckpointedModel(nn.Module):
    """The model and the annealing of its density: what a checkpoint holds."""

    def __init__(self, model: MotifModel, gate: AccuracyGatedDensity) -> None:
        super().__init__()
        self.model, self.gate = model, gate


def make_model(config: SparlingConfig, domain: MotifDomain) -> MotifModel:
    """Make the model of a run with the weights it starts from, on the CPU."""
    channels, symbols = CHANNELS[config.domain], len(domain.label_symbols)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        bottleneck = _bottleneck(config, domain, channels)
        if config.domain == "tiny":
            motifs: nn.Module = PatchMotifs(domain.in_channels, channels)
            readout: nn.Module = SlotReadout(channels, domain.space, symbols, domain.max_length)
        else:
            depth, dims = DEPTHS[config.domain], len(domain.space)
            motifs = ResidualMotifs(domain.in_channels, channels, depth=depth, dims=dims)
            readout = SequenceReadout(channels, domain.space, symbols, domain.max_length + 1)
        return MotifModel(motifs, bottleneck, readout)


def _bottleneck(config: SparlingConfig, domain: MotifDomain, channels: int) -> nn.Module:
    """Make the bottleneck of a run."""
    if config.bottleneck == "sparsity":
        return SpatialSparsity(
            channels,
            config.density_start,
            config.momentum,
            config.per_channel,
            config.accumulate or None,
            affine=config.affine if config.normalize else None,
        )
    density = config.density_end * domain.density(channels)
    return PenalizedBottleneck(channels, config.bottleneck, weight=config.penalty, density=density)


class SparlingTask:
    """Model, data and annealing; :class:`sparsekern.training.Task` says what the methods are for.

    An epoch is what lies between two validations. `tested` is the domain of the test samples.
    """

    unit = "sample"

    def __init__(
        self,
        config: SparlingConfig,
        domain: MotifDomain,
        tested: MotifDomain,
        device: torch.device,
    ) -> None:
        self.config, self.domain, self.device = config, domain, device
        self.examples = config.validate_every
        channels = CHANNELS[config.domain]
        end = min(config.density_end * domain.density(channels), config.density_start)
        gate = AccuracyGatedDensity(
            config.density_start, end, factor=config.density_factor, fall=config.target_fall
        )
        model = make_model(config, domain)
        if len(domain.space) == 2:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.motifs = model
        self.model = CheckpointedModel(model, gate).to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        self.validation = domain.batch(VALIDATION_SEED, 0, config.validation_samples)
        # On which motif errors are followed through training.
        followed = min(measures.batch_size_for(domain, channels), config.test_samples)
        self.path = tested.batch(TEST_SEED, 0, followed)

    @property
    def sparse(self) -> bool:
        """Whether the bottleneck has a density to anneal."""
        return isinstance(self.motifs.bottleneck, SpatialSparsity)

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        """Set density and learning rate."""
        rate = self.config.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        facts = {"learning_rate": rate}
        if isinstance(self.motifs.bottleneck, SpatialSparsity):
            density = float(self.model.gate.density)
            self.motifs.bottleneck.density = density
            facts["density"] = density
        return facts

    def batches(self, epoch: int, first: int) -> Iterator[Samples]:
        """Yield the numbers of the epoch's samples in the stream."""
        size = self.config.batch_size
        start = epoch * self.examples
        for offset in range(first * size, self.examples, size):
            yield Samples(start + offset, min(size, self.examples - offset))

    def backward(self, batch: Samples) -> dict[str, Tensor]:
        """Add the gradients of the loss."""
        drawn = self.domain.batch(self.config.seed, batch.first, batch.count)
        inputs = measures.on_device(drawn.inputs, self.device)
        labels = measures.pad_labels(drawn.labels, self.domain).to(self.device)
        low = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            output = self.motifs(inputs, labels)
        loss = motif_loss(output, labels)
        loss.backward()
        active = (output.activations.detach() != 0).float().mean()
        return {"loss": loss.detach(), "active": active, "penalty": output.penalty.detach()}

    def evaluate(self, epoch: int) -> Mapping[str, Any]:
        """Measure accuracy on the validation samples, which decides the next epoch's density.

        And, for the report alone, motif errors on some test samples.
        """
        accuracy = measures.accuracy(self.motifs, self.domain, self.validation, self.device)
        gate = self.model.gate
        facts: dict[str, Any] = {"accuracy": accuracy, "target": float(gate.target)}
        facts |= measures.quick_errors(self.motifs, self.domain, self.path, self.device)
        if self.sparse:
            gate.update(accuracy, (epoch + 1) * self.examples)
        return facts
