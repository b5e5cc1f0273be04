"""Gradient checkpointing gives the bits of a run without it, and takes each batch in once."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as torchs

from sparsekern import BatchTopK, DeadNeuronCounter, JumpReLU, SpatialSparsity, TopK
from sparsekern.models import PatchMotifs, PenalizedBottleneck, SparseAutoencoder, SparseBottleneck

pytestmark = pytest.mark.slow


def _reentrant(segment, *inputs):
    return torchs.checkpoint(segment, *inputs, use_reentrant=True)


def _plain(segment, *inputs):
    return torchs.checkpoint(segment, *inputs, use_reentrant=False)


def _nested(segment, *inputs):
    return _plain(lambda *again: _plain(segment, *again), *inputs)


def _to_the_end(segment, *inputs):
    with torchs.set_checkpoint_early_stop(False):
        return _plain(segment, *inputs)


WAYS = {f.__name__.strip("_"): f for f in (_reentrant, _plain, _nested, _to_the_end)}


def _run(make, batches, way, *, autocast=False):
    """The outputs, the gradients and the state after three steps of two batches each, whose
    backward passes run in the order of the forward ones or in the other."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    results = []
    for step, order in enumerate((1, -1, 1)):
        optimizer.zero_grad()
        losses = []
        for batch in batches[2 * step : 2 * step + 2]:
            x = batch.clone().requires_grad_()
            context = (
                torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
            )
            with context:
                losses.append((way(model, x) if way else model(x)).float().square().sum())
            results.append(x)
        for loss in losses[::order]:
            loss.backward()
        results += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        results += losses
    state = {**dict(model.named_buffers()), **model.state_dict()}
    return [r.grad if r.is_leaf and r.grad is not None else r for r in results], state


def _check_equal(make, batches, way, **options):
    expected, state = _run(make, batches, None, **options)
    actual, same = _run(make, batches, WAYS[way], **options)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
    for name, tensor in state.items():
        torch.testing.assert_close(same[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def _rows(layer):
    return nn.Sequential(nn.Linear(32, 32), layer, nn.Tanh(), nn.Linear(32, 2))


ROWS = {
    "topk": lambda: _rows(TopK(4, counter=DeadNeuronCounter(32))),
    "topk in groups": lambda: _rows(TopK(4, groups=2, counter=DeadNeuronCounter(32))),
    "batchtopk": lambda: _rows(BatchTopK(4, counter=DeadNeuronCounter(32))),
    "jumprelu": lambda: _rows(JumpReLU(32, threshold=0.1, bandwidth=0.1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROWS)
def test_layers_of_rows(name, way):
    torch.manual_seed(1)
    _check_equal(ROWS[name], torch.randn(6, 8, 32), way)


IMAGES = {
    "mt": lambda: SpatialSparsity(6, 0.1),
    "st": lambda: SpatialSparsity(6, 0.1, per_channel=False),
    "without normalisation": lambda: SpatialSparsity(6, 0.1, affine=None),
    "accumulated": lambda: SpatialSparsity(6, 0.01, accumulate=8),
    "normalised by torch": lambda: SpatialSparsity(6, 0.1, channel_dim=1).to(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IMAGES)
def test_layers_of_images(name, way):
    torch.manual_seed(1)
    sizes = {"normalised by torch": (2, 2)}.get(name, (10, 10))
    make = lambda: nn.Sequential(IMAGES[name](), nn.Tanh(), nn.Conv2d(6, 2, 1))  # noqa: E731
    _check_equal(make, torch.randn(6, 4, 6, *sizes), way)


class _Codes(nn.Module):
    """Codes, whose number follows from the threshold, in the middle of a segment."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = SpatialSparsity(6, 0.1), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (self.scale * self.layer.codes(x).values).tanh().square().sum()


@pytest.mark.parametrize("way", WAYS)
def test_codes_of_images(way):
    torch.manual_seed(1)
    _check_equal(_Codes, torch.randn(6, 4, 6, 10, 10), way)


MODELS = {
    "topk": {"k": 4},
    "auxk": {"k": 4, "auxk": 8, "dead_after": 10, "multi_k": 8},
    "groups, tied": {"activation": lambda: TopK(4, groups=2), "tied": True},
    "prefixes": {"k": 4, "prefixes": (5, 20), "scale_scores": True},
    "batchtopk": {"activation": lambda: BatchTopK(2), "auxk": 8, "dead_after": 10},
    "batchtopk, dense": {"activation": lambda: BatchTopK(20)},
    "jumprelu": {"activation": lambda: JumpReLU(96, threshold=1.8, bandwidth=0.3)},
    "jumprelu, dense": {"activation": lambda: JumpReLU(96, threshold=0.1, bandwidth=0.1)},
    "relu": {"activation": nn.ReLU, "bias": -2.0},
    "relu, dense": {"activation": nn.ReLU, "scale_scores": True},
}


class _Loss(nn.Module):
    def __init__(self, options):
        super().__init__()
        options = dict(options)
        bias = options.pop("bias", 0.0)
        if "activation" in options:
            options["activation"] = options["activation"]()
        if isinstance(options.get("activation"), nn.ReLU | JumpReLU):
            options["sparsity_weight"] = 0.1
        self.model = SparseAutoencoder(16, 96, **options)
        nn.init.constant_(self.model.encoder_bias, bias)

    def forward(self, x):
        output, loss = self.model.loss(x)
        return loss.total + output.reconstruction.square().mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_of_autoencoders(name, way):
    torch.manual_seed(1)
    _check_equal(lambda: _Loss(MODELS[name]), torch.randn(6, 8, 16), way)


@pytest.mark.parametrize("name", ["auxk", "batchtopk", "jumprelu", "relu, dense"])
def test_losses_under_autocast(name):
    torch.manual_seed(1)
    _check_equal(lambda: _Loss(MODELS[name]), torch.randn(6, 8, 16), "plain", autocast=True)


def test_a_path_that_changes_between_two_passes():
    """The widths of the batches between a first pass and its second decide nothing."""
    torch.manual_seed(1)
    batches = torch.randn(6, 8, 16)
    batches[1::2] *= 0.01  # hardly anything is above the thresholds
    _check_equal(lambda: _Loss(MODELS["jumprelu, dense"]), batches, "plain")
    batches[1::2] = -5
    _check_equal(lambda: _Loss(MODELS["batchtopk, dense"]), batches, "plain")


BLOCKS = {
    "standardized": (lambda: SparseBottleneck(16, 64, 16, k=4, standardize=True), (8, 16)),
    "patches": (lambda: PatchMotifs(1, 4, field=(3, 3)), (2, 1, 6, 6)),
    "penalized": (lambda: PenalizedBottleneck(4, "none"), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("way", ["reentrant", "plain"])
@pytest.mark.parametrize("name", BLOCKS)
def test_running_statistics_of_the_models(name, way):
    make, shape = BLOCKS[name]
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.scale = make(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = self.block(x)
            y = y.output if hasattr(y, "output") else y[0] if isinstance(y, tuple) else y
            return (self.scale * y).tanh().sum()

    _check_equal(Block, torch.randn(6, *shape), way)


def test_a_counter_counts_a_checkpointed_batch_once():
    counter = DeadNeuronCounter(4)
    segment = nn.Sequential(TopK(1, counter=counter), nn.Tanh(), nn.Linear(4, 1))
    x = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 3, requires_grad=True)
    _plain(segment, x).sum().backward()
    assert counter.rows_since_fired.tolist() == [0, 3, 3, 3]


@pytest.mark.parametrize("outside", ["checkpoint", "compile"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "spatial"])
def test_compiled_segments_are_taken_in_once(name, outside):
    make = ROWS.get(name, lambda: _rows(SpatialSparsity(32, 0.3, channel_dim=-1)))
    states = []
    for way in (None, outside):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = make()
        run = model
        if way == "checkpoint":
            compiled = torch.compile(model, backend="aot_eager")
            run = lambda x, compiled=compiled: _plain(compiled, x)  # noqa: E731
        elif way == "compile":
            run = torch.compile(lambda x, model=model: _plain(model, x), backend="aot_eager")
        for _ in range(3):
            run(torch.randn(8, 32, requires_grad=True)).sum().backward()
        states.append({**dict(model.named_buffers()), **model.state_dict()})
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, msg=key)
