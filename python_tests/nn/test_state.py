"""What a state_dict holds, and the ways in which torch makes, moves and fills a model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict as dcp

from sparsekern import BatchTopK, DeadNeuronCounter, JumpReLU, SpatialSparsity, TopK
from sparsekern.models import VAESAE, SparseAutoencoder, SparseBottleneck, Widening
from sparsekern.training import checkpoints

MODELS = {
    "topk": lambda k: SparseAutoencoder(6, 40, k=k),
    "groups": lambda k: SparseAutoencoder(6, 40, activation=TopK(k, groups=2)),
    "batchtopk": lambda k: SparseAutoencoder(6, 40, activation=BatchTopK(k)),
    "bottleneck": lambda k: SparseBottleneck(6, 40, 6, k),
    "tied": lambda k: SparseAutoencoder(6, 40, k=k, tied=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_annealed_k_is_saved(name, tmp_path):
    model = MODELS[name](20)
    model.k = 6
    other = MODELS[name](20)
    other.load_state_dict(model.state_dict())
    assert other.k == 6
    assert MODELS[name](20).load_state_dict(other.state_dict()) is not None
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), dcp.get_model_state_dict(model)):
        for assign in (False, True):
            other = MODELS[name](20)
            other.load_state_dict(state, assign=assign)
            assert other.k == 6
    other = MODELS[name](20)
    dcp.set_model_state_dict(other, dcp.get_model_state_dict(model))
    assert other.k == 6
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.k == 6
        twin.k = 8
        assert model.k == 6
    other = MODELS[name](20)
    checkpoints.load_model(
        tmp_path, other, {f"model.{n}": t for n, t in model.state_dict().items()}
    )
    assert other.k == 6


def test_a_k_that_was_never_set_is_not_in_a_layers_state():
    for layer in (TopK(4), BatchTopK(4)):
        assert "current_k" not in layer.state_dict()
        layer.k = 4
        assert layer.state_dict()["current_k"] == 4
    layer.k = 2.5
    other = BatchTopK(4)
    other.load_state_dict(layer.state_dict())
    assert other.k == 2.5 and isinstance(other.k, float)


@pytest.mark.parametrize("name", MODELS)
def test_states_without_k_load(name, tmp_path):
    state = MODELS[name](6).state_dict()
    state = {key: t for key, t in state.items() if not key.endswith("current_k")}
    model = MODELS[name](20)
    model.load_state_dict(state)
    assert model.k == 20
    checkpoints.load_model(tmp_path, model, {f"model.{n}": t for n, t in state.items()})
    assert model.k == 20


def test_a_k_that_does_not_fit_is_refused():
    state = TopK(4).state_dict() | {"current_k": torch.tensor(5)}
    with pytest.raises(ValueError, match="k must be a multiple of groups = 2, got 5"):
        TopK(4, groups=2).load_state_dict(state)


@pytest.mark.parametrize("name", MODELS)
def test_functional_call_takes_a_state_dict(name):
    model, x = MODELS[name](4).eval(), torch.randn(8, 6)
    if name == "batchtopk":
        model.train()(x)
        model.eval()
    other = MODELS[name](8).eval()
    expected = model(x)
    actual = torch.func.functional_call(other, model.state_dict(), (x,))
    for one, same in zip(expected, actual, strict=True):
        assert one is None or torch.equal(one, same)
    assert other.k == 8


def _trained(**options):
    torch.manual_seed(0)
    model = SparseAutoencoder(6, 40, k=4, **options)
    model.loss(torch.randn(9, 6))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["to_empty", "assign", "to", "deepcopy", "pickle", "double"])
def test_a_tied_matrix_stays_tied(tied, way):
    model, x = _trained(tied=tied), torch.randn(5, 6)
    expected = model(x).reconstruction
    if way in ("to_empty", "assign"):
        with torch.device("meta"):
            other = SparseAutoencoder(6, 40, k=9, tied=tied)
        if way == "to_empty":
            other.to_empty(device="cpu")
        other.load_state_dict(model.state_dict(), assign=way == "assign")
        assert not any(tensor.is_meta for tensor in other.state_dict().values())
    else:
        other = {
            "to": lambda: copy.deepcopy(model).to("cpu"),
            "deepcopy": lambda: copy.deepcopy(model),
            "pickle": lambda: pickle.loads(pickle.dumps(model)),
            "double": lambda: copy.deepcopy(model).double().float(),
        }[way]()
    assert other.tied == tied and (other.encoder is other.dictionary) == tied
    assert torch.equal(other(x).reconstruction, expected)
    assert len(list(other.parameters())) == 4 - tied
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    other.loss(x)[1].total.backward()
    optimizer.step()
    assert torch.equal(other.encoder, other.dictionary) == tied


def test_overwriting_conversions_keep_it_tied():
    model = _trained(tied=True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.tied and model.encoder.dtype == torch.float64
    with pytest.raises(KeyError, match="encoder"):
        model.encoder = nn.Parameter(torch.zeros(40, 6))


def test_states_of_tied_and_untied_models():
    tied, untied = _trained(tied=True), _trained()
    before = {name: t.clone() for name, t in tied.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="encoder that differs from its dictionary, but"):
            tied.load_state_dict(untied.state_dict(), strict=strict)
    assert torch.equal(tied.dictionary, before["dictionary"])
    with pytest.raises(RuntimeError, match="no encoder, that of a tied model, but this one is not"):
        untied.load_state_dict(tied.state_dict())
    old = {**before, "encoder": before["dictionary"].clone()}  # with both names
    tied.load_state_dict(old)
    checkpoints.load_model(None, tied, {f"model.{name}": t for name, t in old.items()})
    wrapped = nn.Sequential(_trained(tied=True))
    with pytest.raises(RuntimeError, match=r"0\.encoder that differs from its 0\.dictionary"):
        wrapped.load_state_dict({f"0.{name}": t for name, t in untied.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_stay_float32(dtype):
    for make in (
        lambda: SpatialSparsity(4, 0.1),
        lambda: SpatialSparsity(4, 0.01, per_channel=False, accumulate=5, affine=False),
        lambda: BatchTopK(3),
    ):
        layer = make().to(dtype)
        buffers = [b for b in layer.buffers() if b.is_floating_point()]
        assert buffers and all(b.dtype == torch.float32 for b in buffers)
        x = torch.randn(8, 4, 5, 5).to(dtype)
        exact, rough = make(), layer
        for _ in range(3):
            y, expected = rough(x), exact(x.float())
            assert y.dtype == dtype
        torch.testing.assert_close(rough.threshold, exact.threshold, rtol=0.02, atol=0.01)
        y.float().sum().backward() if y.requires_grad else None
        assert layer.eval()(x).dtype == dtype and expected.dtype == torch.float32
    layer = SpatialSparsity(4, 0.1).double()
    assert layer.threshold.dtype == torch.float64
    assert copy.deepcopy(layer).float().threshold.dtype == torch.float32
    torch.set_default_dtype(dtype)
    try:
        assert SpatialSparsity(4, 0.1).threshold.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer(torch.randn(8, 4, 5, 5).double()).dtype == torch.float64


def test_a_small_step_of_a_threshold_is_not_lost():
    layer = SpatialSparsity(4, 0.1, momentum=1e-3).bfloat16()
    torch.manual_seed(0)
    for _ in range(40):
        layer(torch.randn(4, 4, 9).bfloat16())
    before = layer.threshold.clone()
    layer(torch.randn(4, 4, 9).bfloat16())
    assert (layer.threshold != before).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpatialSparsity(4, 0.1),
        lambda: SpatialSparsity(4, 0.01, accumulate=5),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 8), TopK(3)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 8), JumpReLU(8)),
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(100, 8), BatchTopK(3, counter=DeadNeuronCounter(8))
        ),
        lambda: VAESAE(units=20, k=4, side=16),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_layers_made_on_meta(make, assign):
    torch.manual_seed(0)
    layer = make()
    x = torch.rand(2, 1, 16, 16) if isinstance(layer, VAESAE) else torch.randn(6, 4, 5, 5)
    layer(x)
    with torch.device("meta"):
        other = make()
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    for mode in (True, False):
        results = []
        for one in (layer.train(mode), other.train(mode)):
            torch.manual_seed(1)
            y = one(x)
            results.append(y if isinstance(y, torch.Tensor) else y.logits)
        assert torch.equal(*results)
    if isinstance(other, SpatialSparsity):
        assert other.measured_density() == layer.measured_density()


SHAPES = {
    "topk": lambda: {"k": 4, "multi_k": 8},
    "norms": lambda: {"k": 4, "scale_scores": True},
    "batchtopk": lambda: {"activation": BatchTopK(4)},
    "jumprelu": lambda: {"activation": JumpReLU(64)},
    "relu": lambda: {"activation": nn.ReLU()},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_without_numbers(name):
    """On meta, and for fake tensors."""
    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            model = SparseAutoencoder(16, 64, auxk=8, prefixes=(20,), **SHAPES[name]())
            output, loss = model.loss(torch.randn(8, 16))
            loss.total.backward()
            assert output.reconstruction.shape == (8, 16) and loss.total.shape == ()
            assert model.dictionary.grad.shape == (64, 16)
            if name != "batchtopk" or isinstance(context, torch.device):
                assert model.eval()(torch.randn(2, 3, 16)).reconstruction.shape == (2, 3, 16)
    layer = Widening(4, 8, 2).to("meta")
    assert layer(torch.zeros(1, 4, 6, 6, device="meta")).shape == (1, 8, 3, 3)
