"""The motif model and runs of the Sparling study."""

import json
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from one_thread import one_thread
from processes import Forked, run_command
from quick_pictures import quick_pictures

from sparsekern import SpatialSparsity
from sparsekern.cli.command import main
from sparsekern.data import motif_domain
from sparsekern.models import (
    MotifModel,
    PatchMotifs,
    PenalizedBottleneck,
    ResidualMotifs,
    SequenceReadout,
    SlotReadout,
    Widening,
    motif_loss,
)
from sparsekern.models.sparling import MotifOutput, pad_after_end
from sparsekern.studies.sparling.config import SparlingConfig
from sparsekern.studies.sparling.cost import cost_of
from sparsekern.studies.sparling.run import domain_of

__all__ = ["one_thread", "quick_pictures"]  # fixtures

# -- the domain ------------------------------------------------------------------------------------


def test_sound_is_tested_with_other_speakers():
    config = SparlingConfig(domain="audio")
    trained, tested = domain_of(config), domain_of(config, test=True)
    assert not set(trained.speakers.tolist()) & set(tested.speakers.tolist())
    tiny = SparlingConfig()
    assert domain_of(tiny) == domain_of(tiny, test=True)


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims, space", [(2, (17, 20)), (1, (35,)), (2, (16, 16))])
def test_the_sparse_widening_equals_the_dense_one(dims, space):
    """Also where positions beyond the last whole block are active."""
    torch.manual_seed(0)
    widening = Widening(3, 6, 4, dims=dims)
    activations = torch.rand(5, 3, *space) * (torch.rand(5, 3, *space) < 0.004)
    activations[0, 0].flatten()[-1] = 1.0
    activations[1] = 0
    results = []
    for share in (0.0, 1.0):
        widening.SPARSE_SHARE = share
        widening.zero_grad()
        x = activations.clone().requires_grad_()
        out = widening(x)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape))
        active = activations != 0  # the sparse one gives no gradient elsewhere
        results.append((out.detach(), x.grad[active], *(p.grad for p in widening.parameters())))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_a_block_full_of_activations_does_not_have_the_bias():
    widening = Widening(1, 1, 2)
    with torch.no_grad():
        widening.conv.weight.fill_(-1.0)
        widening.conv.bias.fill_(0.0)
    activations = torch.zeros(1, 1, 2, 64)
    activations[..., :2] = 1.0
    widening.SPARSE_SHARE = 1.0
    assert widening(activations)[0, 0, 0, :2].tolist() == [-1.0, 0.0]


def receptive_field(network, size, dims):
    x = torch.randn(1, 1, *[size] * dims, requires_grad=True)
    network.eval()(x)[(0, 0, *[size // 2] * dims)].backward()
    seen = x.grad[0, 0].nonzero()
    return (seen.amax(0) - seen.amin(0) + 1).tolist()


def test_receptive_fields():
    torch.manual_seed(0)
    assert receptive_field(ResidualMotifs(1, 2, depth=8, width=8), 41, 2) == [17, 17]
    assert receptive_field(ResidualMotifs(1, 2, depth=16, width=8, dims=1), 61, 1) == [33]
    assert receptive_field(PatchMotifs(1, 2), 21, 2) == [7, 5]


def test_labels_and_the_loss():
    assert pad_after_end(torch.tensor([[1, 4, 2], [0, 1, 2]]), 4).tolist() == [
        [1, -1, -1],
        [0, 1, 2],
    ]
    logits = torch.zeros(2, 3, 3)
    logits[0, 0, 1] = logits[0, 1, 2] = 50.0  # symbol 1, then the end; nothing is asked after it
    logits[0, 2, 0] = 50.0
    logits[1, :, 0] = 50.0
    labels = torch.tensor([[1, -1, -1], [0, 0, 0]])
    output = MotifOutput(logits, torch.zeros(2, 1, 1), torch.tensor(0.25))
    assert float(motif_loss(output, labels)) == pytest.approx(0.25)
    worse = output._replace(logits=torch.zeros(2, 3, 3))
    assert float(motif_loss(worse, labels)) == pytest.approx(float(torch.tensor(3.0).log()) + 0.25)


@pytest.mark.parametrize("space", [(24, 24), (40,)])
def test_the_published_readout_learns_a_sequence(space):
    """Two symbols whose order is that of their places."""
    torch.manual_seed(0)
    readout = SequenceReadout(
        2, space, 2, 3, width=32, layers=1, heads=2, feedforward=64, dropout=0.0
    )
    activations = torch.zeros(2, 2, *space)
    activations[0, 0].flatten()[0] = activations[0, 1].flatten()[-1] = 1.0
    activations[1, 1].flatten()[0] = activations[1, 0].flatten()[-1] = 1.0
    labels = torch.tensor([[0, 1, -1], [1, 0, -1]])
    optimizer = torch.optim.Adam(readout.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        logits = readout(activations, labels)
        motif_loss(MotifOutput(logits, activations, torch.zeros(())), labels).backward()
        optimizer.step()
    assert torch.equal(readout.eval().decode(activations), labels)


def test_what_is_predicted_does_not_depend_on_later_symbols():
    torch.manual_seed(0)
    readout = SequenceReadout(2, (24, 24), 4, 4, width=32, layers=1, heads=2).eval()
    activations = torch.rand(1, 2, 24, 24)
    one = readout(activations, torch.tensor([[0, 1, 2, 3]]))
    other = readout(activations, torch.tensor([[0, 1, 3, 0]]))
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert (one[:, 3] - other[:, 3]).abs().max() > 1e-3


def test_penalties():
    x = torch.randn(4, 3, 5, 5)
    z = F.batch_norm(x, None, None, training=True)
    y, penalty = PenalizedBottleneck(3, "l1", weight=2.0)(x)
    torch.testing.assert_close(y, z.relu())
    torch.testing.assert_close(penalty, 2 * z.relu().mean())
    y, penalty = PenalizedBottleneck(3, "kl", weight=3.0, density=0.1)(x)
    q = z.sigmoid().mean()
    divergence = 0.1 * (0.1 / q).log() + 0.9 * (0.9 / (1 - q)).log()
    torch.testing.assert_close(y, (z.sigmoid() - 0.5).relu())
    torch.testing.assert_close(penalty, 3 * divergence)
    assert PenalizedBottleneck(3, "none")(x)[1].item() == 0
    with pytest.raises(ValueError, match="kind must be l1, kl or none, got 'l2'"):
        PenalizedBottleneck(3, "l2")


def test_a_model_of_parts():
    domain = motif_domain("tiny")
    batch = domain.batch(0, 0, 6)
    for bottleneck in (SpatialSparsity(4, 0.1), PenalizedBottleneck(4, "none"), None):
        readout = SlotReadout(4, domain.space, len(domain.label_symbols), domain.max_length)
        model = MotifModel(PatchMotifs(1, 4), bottleneck, readout)
        output = model(batch.inputs, batch.labels)
        motif_loss(output, batch.labels).backward()
        assert output.activations.shape == (6, 4, 28, 28) and output.logits.shape == (6, 4, 5)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model.eval().predict(batch.inputs).shape == (6, 4)


def test_the_cost_of_a_step_is_that_of_its_products():
    domain = motif_domain("tiny")
    readout = SlotReadout(4, domain.space, len(domain.label_symbols), domain.max_length)
    model = MotifModel(PatchMotifs(1, 4), SpatialSparsity(4, 0.1), readout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = cost_of(model, domain, torch.device("cpu"))
    first = 35 * 16 * 784  # whose input needs no gradient
    rest = (16 * 16 + 16 * 4 + 4 * 16) * 784 + 16 * 49 * 256 + 256 * 256 + 256 * 20
    assert cost.flops == 2 * (2 * first + 3 * rest)
    assert cost.bytes > 12 * (5 * 16 + 2 * 4) * 784
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


# -- runs ------------------------------------------------------------------------------------------

SHORT = (
    "--samples", "512", "--validate-every", "128", "--batch-size", "32", "--validation-samples",
    "50", "--test-samples", "60", "--log-every", "2",
)  # fmt: skip
TINY = (*SHORT, "--target-fall", "1e-2", "--density-start", "0.5")


def train(*flags):
    return main(["train", "sparling", "--no-progress", *map(str, flags)])


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparling") / "complete"
    assert train(*TINY, "--out", folder) == 0
    return folder


def results_of(folder):
    found = json.loads((folder / "results.json").read_text())
    assert all(found.pop(name) > 0 for name in ("samples_per_second", "seconds", "draw_seconds"))
    return found


def test_a_run_anneals_and_measures(complete):
    lines = [json.loads(line) for line in (complete / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["density"] for line in epochs] == pytest.approx([0.5, 0.375, 0.28125, 0.2109375])
    rates = [line["learning_rate"] for line in epochs]
    assert rates[0] == rates[1] == 2e-3 and rates[3] < 2e-3
    results = results_of(complete)
    assert results["test_samples"] == 60 and results["domain"] == "tiny"
    assert results["trained_density"] == pytest.approx(0.2109375)
    for name in ("fpe", "fne", "ce", "e2ee", "exact"):
        share = results[name]
        assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1
    assert results["relative_density"] == pytest.approx(
        results["density"] / motif_domain("tiny").density(4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed_it_ends_with_the_same_bits(complete, tmp_path, number):
    folder = tmp_path / "run"
    words = ["train", "sparling", "--no-progress", *TINY, "--out", str(folder)]
    process = Forked(run_command, words)
    while not (folder / "checkpoint.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=180)
    assert process.returncode in (0, 130, -number), err
    assert "Traceback" not in err
    assert train("--resume", folder) == 0
    assert results_of(folder) == results_of(complete)


@pytest.mark.parametrize("bottleneck", ["l1", "kl", "none"])
def test_other_bottlenecks(bottleneck, tmp_path):
    penalty = () if bottleneck == "none" else ("--penalty", "0.5")
    assert train(*SHORT, "--bottleneck", bottleneck, *penalty, "--out", tmp_path / "run") == 0
    results = results_of(tmp_path / "run")
    assert results["trained_density"] is None and results["annealed_at"] is None


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--samples", "500"], "samples must be a multiple of 5000 (validations), got 500"),
        (["--density-start", "0"], "--density-start must be above 0 and at most 1, got 0.0"),
        (["--penalty", "1"], "penalty needs bottleneck l1 or kl, which is sparsity, got 1.0"),
        (["--data", "x"], "data needs domain audio, which is tiny, got x"),
        (["--momentum", "nan"], "momentum must be above 0 and at most 1, got nan"),
        (["--domain", "audio", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    assert train(*flags, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
