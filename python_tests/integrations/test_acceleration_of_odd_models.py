"""accelerate on models that are wrapped, shared, scripted, empty, or that guard themselves."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from accelerated import D, K, N, batch, randomize
from torch import nn

import sparsekern
from sparsekern.integrations.acceleration import report


class Selection(nn.Module):
    def __init__(self, k=K):
        super().__init__()
        self.k = k

    def forward(self, x):
        values, indices = x.topk(self.k)
        return torch.zeros_like(x).scatter_(-1, indices, values.relu())


class Model(nn.Module):
    def __init__(self, selection=None):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, N), nn.Linear(N, D)
        self.selection = Selection() if selection is None else selection

    def forward(self, x):
        return self.decoder(self.selection(self.encoder(x)))


def make(kind=Model):
    model = kind()
    randomize(model)
    return model


def check(model, *names):
    """Check what is replaced, and that results stay."""
    with torch.no_grad():
        expected = model(batch())
        assert sparsekern.accelerate(model) is model
        assert set(report(model).replaced) == set(names)
        torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    return model


def test_data_parallel():
    check(nn.DataParallel(make()), "module", "module.selection")


def test_shared_layer():
    layer = Selection()
    model = nn.Sequential(nn.Linear(D, N), layer, nn.Linear(N, N), layer, nn.Linear(N, D))
    randomize(model)
    check(model, "", "1")
    assert model[1] is model[3] is layer


def test_module_dict():
    model = nn.ModuleDict({"one": make(), "layer": Selection(), "other": nn.ReLU()})
    sparsekern.accelerate(model)
    assert set(report(model).replaced) == {"one", "one.selection", "layer"}


def test_meta_device():
    """Neither a model without numbers nor a default device without them prevents the trial."""
    with torch.device("meta"):
        model = sparsekern.accelerate(Model())
        assert set(report(model).replaced) == {"", "selection"}
    model.to_empty(device="cpu")
    randomize(model)
    expected = sparsekern.restore(copy.deepcopy(model))(batch())
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_without_gradients(context):
    with context():
        check(make(), "", "selection")


def test_frozen():
    check(make().requires_grad_(False), "", "selection")


def test_scripted():
    """Scripted code runs as it was; what is scripted afterwards is the module as it was."""
    model = make()
    model.encoder = torch.jit.script(model.encoder)
    check(model, "selection")
    whole = torch.jit.script(make())
    with pytest.warns(UserWarning, match="has nothing to replace"):
        sparsekern.accelerate(whole)
    accelerated = sparsekern.accelerate(make())
    scripted = torch.jit.script(accelerated)
    assert scripted.original_name == "Model" and type(accelerated) is not Model
    torch.testing.assert_close(scripted(batch()), accelerated(batch()), rtol=1e-5, atol=1e-5)


def test_traced():
    model = make()
    check(torch.fx.symbolic_trace(model), "")  # generated code selects as any other
    accelerated = sparsekern.accelerate(model)
    for traced in (
        torch.jit.trace(accelerated, batch()),
        torch.export.export(accelerated, (batch(),)).module(),
    ):
        torch.testing.assert_close(traced(batch()), accelerated(batch()), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"torch\.fx must trace a module as it was, got .* Model;"):
        torch.fx.symbolic_trace(accelerated)


class Slots(Model):
    __slots__ = ("extra",)


class NoneForMissing(Model):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


class Meta(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.is_made = True
        return made


class WithMetaclass(Model, metaclass=Meta):
    pass


@pytest.mark.parametrize("kind", [Slots, NoneForMissing, WithMetaclass], ids=lambda k: k.__name__)
def test_odd_classes(kind):
    model = check(make(kind), "", "selection")
    assert type(copy.deepcopy(model)) is type(model)
    assert type(sparsekern.restore(model)) is kind


def test_class_that_has_no_subclasses():
    class Final(Selection):
        def __init_subclass__(cls):
            raise TypeError("Final has no subclasses")

    model = Final()
    with pytest.warns(UserWarning, match="TypeError: Final has no subclasses"):
        sparsekern.accelerate(model)
    assert type(model) is Final


def test_parametrized():
    model = make()
    nn.utils.parametrizations.weight_norm(model.decoder)
    check(model, "", "selection")


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(N), Selection(), nn.LazyLinear(D))
    sparsekern.accelerate(model)
    assert set(report(model).replaced) == {"1"}
    model(batch())
    check(model, "", "1")  # once sizes are known, the whole is, too


@contextlib.contextmanager
def one_process(folder):
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    with one_process(tmp_path):
        wrapped = check(nn.parallel.DistributedDataParallel(make()), "module", "module.selection")
        wrapped(batch()).sum().backward()
        assert wrapped.module.encoder.weight.grad is not None


def test_fully_sharded(tmp_path):
    """Accelerated before and after; restore refuses what would undo the sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_process(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        check(fully_shard(make(), mesh=mesh), "selection")
        model = make()
        expected = model(batch())
        sharded = fully_shard(sparsekern.accelerate(model), mesh=mesh)
        torch.testing.assert_close(sharded(batch()), expected, rtol=1e-5, atol=1e-5)
        sharded(batch()).sum().backward()
        kind = type(sharded)
        assert type(sparsekern.accelerate(sharded)) is kind
        for refused in (
            lambda: sparsekern.restore(sharded),
            lambda: sparsekern.accelerate(sharded, match_upstream=True),
        ):
            with pytest.raises(ValueError, match="got FSDPAcceleratedModel, which was made since"):
                refused()
        assert type(sharded) is kind
