"""A run of the study in the form the training loop asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models.vae_sae import VAESAE, VAESAEOutput, vae_sae_loss
from ...training import permuted_rows, scheduled_k
from . import measures, revival
from .config import GATED, VAESAEConfig
from .images import Parts, mean_pixel, pixels
from .sparsity import L1Steering, ValidationGate

# Times as rarely MIG is estimated after the schedule.
LATER_MIG = 5


class CheckpointedModel(nn.Module):
    """The model, and what else a checkpoint must hold: all of it in parameters and buffers."""

    steps: Tensor
    active: Tensor

    def __init__(self, model: VAESAE, config: VAESAEConfig) -> None:
        super().__init__()
        self.vae = model
        self.l1 = L1Steering() if config.sparsifier == "l1" else None
        span = config.epochs - config.warm_epochs
        gated = config.schedule == GATED
        self.gate = ValidationGate(config.k_start, config.k_end, span) if gated else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Which units were active on the held-out images after each epoch.
        shape = (config.all_epochs, config.units)
        self.register_buffer("active", torch.zeros(shape, dtype=torch.bool))

    def death_epochs(self, count: int) -> list[int | None]:
        """Find for each unit the last epoch, from 0, after which it was active.

        Of the first count epochs, on the held-out images: -1 if after none, None if after the last
        of them.
        """
        active = self.active[:count].cpu()
        last = torch.where(active, torch.arange(count).unsqueeze(1), -1).amax(0).tolist()
        return [None if epoch == count - 1 else epoch for epoch in last]


def make_model(config: VAESAEConfig, channels: int, mean_pixel: float) -> VAESAE:
    """Make the model of a run with the weights it starts from, on the CPU."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return VAESAE(
            channels,
            latents=config.latents,
            units=config.units,
            k=config.k_start,
            width=config.width,
            mean_pixel=mean_pixel,
            side=config.side,
            placement=config.placement,
            sparsifier=config.sparsifier,
            standardize=config.standardize,
            tied=config.tied,
        )


class VAESAETask:
    """Model, data and schedule; :class:`sparsekern.training.Task` says what the methods are for."""

    unit = "image"

    def __init__(self, config: VAESAEConfig, parts: Parts) -> None:
        self.config, self.parts = config, parts
        images = parts.training.images
        self.device = images.device
        self.examples = len(images)
        model = make_model(config, images.shape[1], mean_pixel(images))
        self.model = CheckpointedModel(model, config).to(self.device)
        self.resamples = False
        self.vae = model
        if config.compile:
            model.encoder.compile()
            model.decoder.compile()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        """Set k."""
        config = self.config
        self.resamples = epoch < revival.RESAMPLED_SHARE * config.epochs
        position, epochs = epoch - config.warm_epochs, config.epochs - config.warm_epochs
        if position < 0:
            k = config.k_start
        elif self.model.gate is not None:
            k = self.model.gate.k
        else:
            k = scheduled_k(config.schedule, config.k_start, config.k_end, position, epochs)
        self.vae.k = k
        return {"k": k}

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """Start an epoch at batch ``first``: row numbers, already on the device.

        So no step waits for a copy.
        """
        config = self.config
        order = list(permuted_rows(self.examples, config.batch_size, config.seed, epoch, first))
        if not order:
            return iter(())
        return iter(torch.cat(order).to(self.device).split(config.batch_size))

    def backward(self, batch: Tensor) -> dict[str, Tensor]:
        """Add the gradients of the loss, then steer L1 and revive dead units."""
        config, l1 = self.config, self.model.l1
        images = pixels(self.parts.training.images[batch])
        output = self._forward(images)
        loss = vae_sae_loss(output, images, config.beta)
        scalars = {"loss": loss.total, "reconstruction": loss.reconstruction, "kl": loss.kl}
        total = loss.total
        if l1 is not None:
            penalty = self.vae.bottleneck.penalty(output.values.float())
            total = total + l1.strength.float() * penalty
            l0 = (output.values.detach() > 0).sum(1).float().mean()
            scalars |= {"penalty": penalty, "strength": l1.strength, "l0": l0}
        if config.revival != "none":
            output.sparse.output.retain_grad()
        total.backward()
        if l1 is not None:
            l1.update(scalars["l0"], self.vae.k)
        if config.revival != "none":
            scalars |= self._revive(output)
        self.model.steps += 1
        return {name: value.detach() for name, value in scalars.items()}

    def _forward(self, images: Tensor) -> VAESAEOutput:
        """Run the model, in bfloat16 where the config asks for it."""
        low = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            output: VAESAEOutput = self.vae(images)
        if not low:
            return output
        # Sums over thousands of pixels need more digits.
        return output._replace(
            logits=output.logits.float(),
            mean=output.mean.float(),
            log_variance=output.log_variance.float(),
        )

    def _revive(self, output: VAESAEOutput) -> dict[str, Tensor]:
        """Revive dead units; return scalars to log."""
        layer, sparse = self.vae.bottleneck, output.sparse
        dead = layer.activity.dead(self.config.dead_after)
        kind = self.config.revival
        if kind == "auxk":
            error = revival.auxiliary_loss(layer, sparse, dead)
            error.backward()
            return {"aux": error}
        if kind == "homeostasis":
            revival.raise_biases(layer, sparse, dead)
        elif self.resamples and int(self.model.steps) % revival.RESAMPLE_EVERY == 0:
            revival.resample(layer, sparse, dead, self.optimizer)
        return {}

    def evaluate(self, epoch: int) -> Mapping[str, Any]:
        """Measure on the held-out images.

        At the end of the schedule and of the run on the test images, too, under "test".
        """
        config, parts = self.config, self.parts
        one_pass = measures.run_over(self.vae, parts.held_out.images)
        self.model.active[epoch] = one_pass.activity.fired > 0
        if self.model.gate is not None and config.warm_epochs <= epoch < config.epochs:
            self.model.gate.update(
                one_pass.reconstruction + one_pass.kl, epoch - config.warm_epochs
            )
        facts: dict[str, Any] = {
            "eval_reconstruction": one_pass.reconstruction,
            "eval_kl": one_pass.kl,
            "eval_l0": one_pass.activity.l0(),
            "eval_dead": one_pass.activity.dead_panel()["never"],
            "train_dead": float(self.vae.activity.fraction(self.examples)),
        }
        if self._wants_mig(epoch):
            facts |= measures.quick_mig(self.vae, parts.test, config.seed)
        if epoch + 1 in (config.epochs, config.all_epochs):
            facts["test"] = measures.measure(self.vae, parts.test, config.seed)
        return facts

    def _wants_mig(self, epoch: int) -> bool:
        """Tell whether MIG is due after an epoch; after the schedule little changes."""
        interval = self.config.mig_every
        if epoch >= self.config.epochs:
            interval *= LATER_MIG
        return interval > 0 and (epoch == 0 or (epoch + 1) % interval == 0)
