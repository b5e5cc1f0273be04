"""Every public layer and model under what torch does to modules: copies, conversions, meta, export,
compilation, autocast, checkpointing, functional transforms, and inputs of a subclass."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import sparsekern
from sparsekern import models
from sparsekern.models import SparseAutoencoder, SparseBottleneck
from sparsekern.nn import (
    BatchTopK,
    DeadNeuronCounter,
    JumpReLU,
    SparseLinear,
    SpatialSparsity,
    TopK,
)
from sparsekern.ops import codes_to_dense

LATENTS = 64
ROWS, IMAGES, MAPS = (6, 16), (4, 1, 16, 16), (3, 4, 12, 12)
LABELS = torch.tensor([[0, 1, -1], [2, -1, -1], [1, 0, 2]])


class Labelled(nn.Module):
    """A readout with the labels that it needs."""

    def __init__(self, readout):
        super().__init__()
        self.readout = readout

    def forward(self, x):
        return self.readout(x, LABELS.to(x.device))


class Counted(nn.Module):
    """A counter in the place of a layer."""

    def __init__(self):
        super().__init__()
        self.counter = DeadNeuronCounter(16)

    def forward(self, x):
        if self.training:
            self.counter.update(x.detach().relu())
        return x * ~self.counter.dead(1)


def sequences(**options):
    return models.SequenceReadout(
        4, (12, 12), 3, 3, width=8, pool=4, layers=1, heads=2, feedforward=8, dropout=0.0
    )


def motifs():
    return models.MotifModel(
        models.ResidualMotifs(4, 5, depth=2, width=6),
        SpatialSparsity(5, 0.2),
        models.SlotReadout(5, (12, 12), 3, 3, width=6, hidden=8),
    )


MODULES = {
    "TopK": (lambda: TopK(3), ROWS),
    "TopK, groups": (lambda: TopK(4, groups=2), ROWS),
    "TopK, magnitude": (lambda: TopK(3, abs=True), ROWS),
    "TopK, post": (lambda: TopK(3, nn.Softplus()), ROWS),
    "TopK, counter": (lambda: TopK(3, counter=DeadNeuronCounter(16)), ROWS),
    "BatchTopK": (lambda: BatchTopK(3, counter=DeadNeuronCounter(16)), ROWS),
    "JumpReLU": (lambda: JumpReLU(16, threshold=0.3), ROWS),
    "SparseLinear": (lambda: SparseLinear(16, 5), ROWS),
    "DeadNeuronCounter": (Counted, ROWS),
    "SpatialSparsity": (lambda: SpatialSparsity(4, 0.2), MAPS),
    "SparseAutoencoder": (lambda: SparseAutoencoder(16, LATENTS, k=4), ROWS),
    "SparseAutoencoder, tied": (lambda: SparseAutoencoder(16, LATENTS, k=4, tied=True), ROWS),
    "SparseAutoencoder, BatchTopK": (
        lambda: SparseAutoencoder(16, LATENTS, activation=BatchTopK(4)), ROWS,
    ),
    "SparseAutoencoder, JumpReLU": (
        lambda: SparseAutoencoder(16, LATENTS, activation=JumpReLU(LATENTS, threshold=0.3)), ROWS,
    ),
    "SparseAutoencoder, ReLU": (lambda: SparseAutoencoder(16, LATENTS, activation=nn.ReLU()), ROWS),
    "SparseBottleneck": (lambda: SparseBottleneck(16, 40, 5, 4), ROWS),
    "VAESAE": (lambda: models.VAESAE(units=20, k=4, side=16), IMAGES),
    "PatchMotifs": (lambda: models.PatchMotifs(4, 5), MAPS),
    "ResidualMotifs": (lambda: models.ResidualMotifs(4, 5, depth=2, width=6), MAPS),
    "PenalizedBottleneck": (lambda: models.PenalizedBottleneck(4, "l1", weight=0.1), MAPS),
    "Widening": (lambda: models.Widening(4, 6, 2), MAPS),
    "SlotReadout": (lambda: Labelled(models.SlotReadout(4, (12, 12), 3, 3, hidden=8)), MAPS),
    "SequenceReadout": (lambda: Labelled(sequences()), MAPS),
    "MotifModel": (motifs, MAPS),
}  # fmt: skip
every_module = pytest.mark.parametrize("name", MODULES)


def trained(name, dtype=torch.float32):
    """A module that has seen two batches in training, and a batch."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make().to(dtype)
    for _ in range(2):
        module(torch.randn(shape).sigmoid().to(dtype))
    return module, torch.randn(shape).sigmoid().to(dtype)


def tensors(output):
    """Of codes, whose width may depend on how torch runs a model, the dense tensor."""
    if isinstance(output, models.SAEOutput):
        output = output.reconstruction, codes_to_dense(output.values, output.indices, LATENTS)
    leaves = _pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def run(module, x):
    torch.manual_seed(1)  # of what a model draws
    return tensors(module(x))


def loss_of(outputs):
    floating = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    return sum(t.float().sin().square().sum() for t in floating)


def gradients(module, x, call=run):
    """Outputs and gradients of a step of training on a copy, and what it left in the buffers."""
    module, x = copy.deepcopy(module).train(), x.clone().requires_grad_()
    outputs = call(module, x)
    loss_of(outputs).backward()
    leaves = [x, *module.parameters()]
    return outputs, [leaf.grad for leaf in leaves], list(module.buffers())


def assert_same(found, wanted, **tolerance):
    torch.testing.assert_close(found, wanted, equal_nan=True, **(tolerance or EXACT))


EXACT = {"rtol": 0, "atol": 0}


def test_all_public_modules_are_here():
    public = [*map(sparsekern.nn.__dict__.get, sparsekern.nn.__all__)]
    public += map(models.__dict__.get, models.__all__)
    classes = {c for c in public if isinstance(c, type) and issubclass(c, nn.Module)}
    seen = {type(part) for make, _ in MODULES.values() for part in make().modules()}
    assert classes <= seen and len(classes) > 12


@every_module
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict", "meta"])
def test_copies(name, way):
    """They give the same, in both modes, and share nothing with the original."""
    module, x = trained(name)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        with torch.device("meta" if way == "meta" else "cpu"):
            twin = MODULES[name][0]()
        if way == "meta":
            twin.to_empty(device="cpu")
        twin.load_state_dict(copy.deepcopy(module.state_dict()))
    state = copy.deepcopy(module.state_dict())
    assert_same(run(twin.eval(), x), run(module.eval(), x))
    assert_same(gradients(twin, x), gradients(module, x))
    twin.train()(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_same(list(module.state_dict().values()), list(state.values()))


@every_module
def test_conversions(name):
    """To float64 and back everything follows, on meta there are shapes."""
    module, x = trained(name)
    wanted = run(module.eval(), x)
    shapes = [t.shape for t in gradients(module, x)[0]]
    wide = run(copy.deepcopy(module).double().eval(), x.double())
    for one, other in zip(wide, wanted, strict=True):
        assert one.dtype == (torch.float64 if other.is_floating_point() else other.dtype)
    again = copy.deepcopy(module).double().to(x)
    assert_same(run(again.eval(), x), wanted)
    meta = copy.deepcopy(module).to("meta").train()
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    assert [t.shape for t in run(meta, x.to("meta"))] == shapes


@every_module
def test_export(name):
    module, x = trained(name)
    module.eval()
    torch.manual_seed(1)
    program = torch.export.export(module, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_same(run(loaded, x), run(module, x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@every_module
def test_compiled(name):
    torch.compiler.reset()
    module, x = trained(name)
    compiled = lambda m, x: run(torch.compile(m, backend="aot_eager"), x)  # noqa: E731
    found, wanted = gradients(module, x, compiled), gradients(module, x)
    assert_same(found, wanted, rtol=1e-5, atol=1e-6)
    assert_same(compiled(module.eval(), x), run(module, x), rtol=1e-5, atol=1e-6)


@every_module
def test_autocast(name):
    """Outputs are close, gradients are float32 and finite."""
    module, x = trained(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, grads, buffers = gradients(module, x)
        half = run(module.eval(), x)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads if g is not None)
    assert sum(g is not None for g in grads) == sum(g is not None for g in gradients(module, x)[1])
    assert [b.dtype for b in buffers] == [b.dtype for b in module.buffers()]
    for one, other in zip(half, run(module, x), strict=True):
        assert one.shape == other.shape and one.isfinite().all()
    assert [t.shape for t in outputs] == [t.shape for t in gradients(module, x)[0]]


@every_module
def test_checkpointing(name):
    module, x = trained(name)

    def again(module, x):
        torch.manual_seed(1)
        return tensors(checkpoint(module, x, use_reentrant=False))

    assert_same(gradients(module, x, again), gradients(module, x))


@every_module
def test_functional_transforms(name):
    module, x = trained(name, torch.float64)
    module.eval()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def loss(parameters, x, buffers):
        torch.manual_seed(1)
        output = torch.func.functional_call(module, (parameters, buffers), (x,))
        return sum(t.sin().square().sum() for t in tensors(output) if t.is_floating_point())

    found = torch.func.grad(loss, (0, 1))(parameters, x, copy.deepcopy(buffers))
    leaves = [*parameters.values(), x.requires_grad_()]
    wanted = torch.autograd.grad(loss(parameters, x, buffers), leaves, materialize_grads=True)
    assert_same([*found[0].values(), found[1]], list(wanted), rtol=1e-9, atol=1e-12)


class Tagged(torch.Tensor):
    pass


@every_module
def test_inputs_of_a_subclass(name):
    module, x = trained(name)
    found, wanted = run(module.eval(), x.as_subclass(Tagged)), run(module, x)
    plain = [t.as_subclass(torch.Tensor) for t in found]
    assert_same(plain, wanted)
    found, wanted = gradients(module, x.as_subclass(Tagged)), gradients(module, x)
    assert_same([g.as_subclass(torch.Tensor) for g in found[1] if g is not None],
                [g for g in wanted[1] if g is not None])  # fmt: skip
