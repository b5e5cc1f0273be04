"""Autoencoders where torch takes a program down and runs it later: traced, exported and saved,
their backward pass compiled."""

import inspect
import io

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.utils import _pytree

import sparsekern
from sparsekern.models import SAELoss, SAEOutput, SparseAutoencoder

ACTIVATIONS = {
    "TopK": lambda: sparsekern.TopK(2),
    "BatchTopK": lambda: sparsekern.BatchTopK(2),
    "JumpReLU": lambda: sparsekern.JumpReLU(400, threshold=0.8),
    "ReLU": torch.nn.ReLU,
}
traced = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace")
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
# Few and many active latents: rows of the second need wider codes.
FEW, MANY = 1.0, 1.6


def model_and_rows(name):
    torch.manual_seed(0)
    model = SparseAutoencoder(16, 400, activation=ACTIVATIONS[name](), prefixes=(100, 200))
    with torch.no_grad():
        model.encoder_bias.fill_(-0.8 if name == "ReLU" else 0.0)
        model.encoder.mul_(2)
        if name == "BatchTopK":
            model.activation.threshold.fill_(0.8)
    rows = torch.nn.functional.normalize(torch.randn(9, 16), dim=1)
    return model, rows


@traced
@every_activation
def test_traced_models_reconstruct_rows_with_more_active_latents(name):
    model, rows = model_and_rows(name)
    model.eval().requires_grad_(False)
    few, many = model(rows[:6] * FEW), model(rows * MANY)
    if name != "TopK":
        assert few.values.shape[-1] < many.values.shape[-1] < 50
    later = torch.jit.trace(model, (rows[:6] * FEW,), check_trace=False)
    torch.testing.assert_close(later(rows * MANY)[0], many.reconstruction)


@traced
@pytest.mark.parametrize("name", ["BatchTopK", "JumpReLU"])
def test_traced_codes_hold_all_active_latents(name):
    layer = model_and_rows(name)[0].activation.eval().requires_grad_(False)
    scores = torch.randn(6, 400)
    later = torch.jit.trace(lambda x: tuple(layer.codes(x)), (scores / 4,), check_trace=False)
    values, indices = later(scores)
    torch.testing.assert_close(torch.zeros(6, 400).scatter(1, indices, values), layer(scores))


@every_activation
def test_exported_models_are_saved_and_loaded(name):
    model, rows = model_and_rows(name)
    model.eval()
    sizes = {"x": {0: torch.export.Dim.DYNAMIC}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (rows[:6],), dynamic_shapes=sizes), file)
    file.seek(0)
    output = torch.export.load(file).module()(rows)
    assert type(output) is type(model(rows))
    torch.testing.assert_close(output.reconstruction, model(rows).reconstruction)


def test_names_in_saved_programs_do_not_move_with_the_modules():
    saved = _pytree.SUPPORTED_SERIALIZED_TYPES
    assert saved[SAEOutput].serialized_type_name == "sparsekern.models.sae.SAEOutput"
    assert saved[SAELoss].serialized_type_name == "sparsekern.models.sae.SAELoss"
    assert saved[sparsekern.Codes].serialized_type_name == "sparsekern.ops.topk.Codes"


@every_activation
def test_a_compiled_backward_pass_has_the_same_gradients(name):
    model, rows = model_and_rows(name)
    model.sparsity_weight = 0.1
    parameters = list(model.parameters())
    model.loss(rows)[1].total.backward()
    wanted = [parameter.grad for parameter in parameters]
    model.zero_grad()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        model.loss(rows)[1].total.backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], wanted)


@every_activation
def test_attributes_are_listed(name):
    model, _ = model_and_rows(name)
    assert hasattr(model, "k") == (name in ("TopK", "BatchTopK"))
    assert dict(inspect.getmembers(model))["activation"] is model.activation
    if not hasattr(model, "k"):
        with pytest.raises(AttributeError, match="has no number of active latents k"):
            _ = model.k
