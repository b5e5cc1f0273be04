"""Writing activation files: to the bit, all or nothing; from models, files and mixtures."""

import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsekern.cli.command import main
from sparsekern.data import (
    ActivationStore,
    DataError,
    capture,
    convert,
    synthetic,
    write_activations,
)


def random_rows(rows=70, features=5, dtype=torch.float32):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(dtype)


def content(path, dtype=None):
    """All rows of a file in its order and dtype."""
    with ActivationStore(path) as store:
        assert dtype is None or store.dtype == dtype
        return torch.cat(list(store.batches(16, seed=0, shuffle=False, dtype=store.dtype)))


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 1, 8, 70, 100])
@pytest.mark.parametrize("sizes", [(70,), (1, 0, 30, 39), (7,) * 10, (8, 8, 54)])
def test_what_is_written_is_read_to_the_bit(dtype, chunk_rows, sizes, tmp_path):
    rows, path = random_rows(dtype=dtype), tmp_path / "a.h5"
    written = write_activations(path, rows.split(sizes), dtype=dtype, chunk_rows=chunk_rows)
    assert written == 70
    assert torch.equal(content(path, dtype), rows)
    with h5py.File(path) as file:
        assert file["activations"].chunks == (min(chunk_rows or 70, 70), 5)
    assert os.listdir(tmp_path) == ["a.h5"]


def test_a_batch_may_be_filled_anew_by_the_caller(tmp_path):
    buffer = torch.empty(3, 2)
    write_activations(
        tmp_path / "a.h5", (buffer.fill_(i) for i in range(9)), dtype=torch.float32, chunk_rows=8
    )
    expected = torch.arange(9.0).repeat_interleave(3)[:, None].expand(-1, 2)
    assert torch.equal(content(tmp_path / "a.h5"), expected)


def test_numpy_batches_gradients_and_directions(tmp_path):
    rows = random_rows(4)
    given = [rows.numpy(), rows.clone().requires_grad_()]
    write_activations(tmp_path / "a.hdf5", given, directions=torch.eye(5, dtype=torch.float64))
    assert torch.equal(content(tmp_path / "a.hdf5", torch.float16), rows.half().repeat(2, 1))
    with ActivationStore(tmp_path / "a.hdf5") as store:
        assert torch.equal(store.directions, torch.eye(5))


def test_values_that_are_not_finite_are_kept_but_none_are_made(tmp_path):
    rows = torch.tensor([[1.0, float("inf")], [float("nan"), 65504.0]])
    write_activations(tmp_path / "a.h5", [rows])
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["activations"][:], rows.numpy(), equal_nan=True)
    rows[1, 1] = 7e4
    with pytest.raises(DataError, match=r"batch 1 holds 70000, .* too large for torch.float16"):
        write_activations(tmp_path / "b.h5", [rows[:1], rows])
    assert os.listdir(tmp_path) == ["a.h5"]


BAD_BATCHES = {
    "there are no rows": [],
    "there are no rows to write": [torch.ones(0, 3)],
    r"batch 1 must be \[rows, 3\], got \[2, 4\]": [torch.ones(2, 3), torch.ones(2, 4)],
    r"batch 0 must be \[rows, D\], got \[3\]": [torch.ones(3)],
    r"batch 0 must be \[rows, D\], got \[3, 0\]": [torch.ones(3, 0)],
    "batch 0 must be floating, got torch.int64": [torch.ones(2, 3, dtype=torch.int64)],
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_bad_batches_leave_no_file(message, tmp_path):
    with pytest.raises(DataError, match=f"^write_activations: {message}"):
        write_activations(tmp_path / "a.h5", BAD_BATCHES[message])
    assert os.listdir(tmp_path) == []


def test_bad_targets(tmp_path):
    rows, taken = [torch.ones(2, 3)], tmp_path / "taken.h5"
    taken.write_text("precious")
    for path, message in (
        (taken, "taken.h5 exists already"),
        (tmp_path / "no" / "a.h5", "folder not found: .*no$"),
    ):
        with pytest.raises(DataError, match=message):
            write_activations(path, rows)
    for options, message in (
        ({"path": tmp_path / "a.npy"}, "path must end in .h5 or .hdf5"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, .* got torch.float64"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            write_activations(**{"path": tmp_path / "a.h5", "batches": rows, **options})
    with pytest.raises(DataError, match=r"directions must be \[n, 3\], got \[2, 2\]"):
        write_activations(tmp_path / "a.h5", rows, directions=torch.eye(2))
    assert os.listdir(tmp_path) == ["taken.h5"] and taken.read_text() == "precious"


WRITER = """
import sys, torch
from sparsekern.data import write_activations
def batches():
    for number in range(1000):
        yield torch.full((100, 4), float(number))
        if number == 20:
            print(flush=True)
            input()
write_activations(sys.argv[1], batches(), chunk_rows=50)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_writer_leaves_no_file_of_that_name(how, tmp_path):
    path = tmp_path / "a.h5"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], **pipes) as writer:
        writer.stdout.readline()
        with pytest.raises(DataError, match=r"another process is writing .*a.h5"):
            write_activations(path, [torch.ones(2, 3)])
        writer.send_signal(how)
        writer.communicate()
    assert not path.exists()
    assert (tmp_path / ".a.h5.new").exists() == (how == signal.SIGKILL)
    assert write_activations(path, [torch.ones(2, 3)]) == 2
    assert os.listdir(tmp_path) == ["a.h5"]


# -- other files -----------------------------------------------------------------------------------


def test_convert_joins_files_to_the_bit(tmp_path):
    rows = random_rows(dtype=torch.bfloat16)
    save_file(
        {"activations": rows[:33].clone(), "directions": torch.eye(5)}, tmp_path / "a.safetensors"
    )
    write_activations(tmp_path / "b.h5", [rows[33:]], dtype=torch.bfloat16)
    assert convert([tmp_path / "a.safetensors", tmp_path / "b.h5"], tmp_path / "c.h5") == 70
    assert torch.equal(content(tmp_path / "c.h5", torch.bfloat16), rows)
    with ActivationStore(tmp_path / "c.h5") as store:
        assert torch.equal(store.directions, torch.eye(5))


def test_convert_to_another_dtype_and_without_bad_rows(tmp_path):
    rows = random_rows()
    rows[[4, 50]] = float("nan")
    np.save(tmp_path / "a.npy", rows.numpy())
    with pytest.raises(DataError, match=r"row 4 of .*a.npy, row 50"):
        convert(tmp_path / "a.npy", tmp_path / "a.h5")
    assert os.listdir(tmp_path) == ["a.npy"]
    convert(tmp_path / "a.npy", tmp_path / "a.h5", nonfinite="skip", dtype=torch.float16)
    kept = rows[~rows.isnan().any(1)]
    assert torch.equal(content(tmp_path / "a.h5", torch.float16), kept.half())


# -- models ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Calls its parts by name and returns a tuple, as transformer blocks do."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(6, 4), nn.Linear(1, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.drop(self.linear(x)) * scale, "cache"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), Block())


@pytest.mark.parametrize("hook", ["0", "1", "1.linear", ""])
def test_capture_equals_a_direct_forward(hook, tmp_path):
    module, inputs = model(), [random_rows(2 * 5, 3).view(2, 5, 3), random_rows(7, 3)]
    module[0].eval()
    count = capture(module, hook, inputs, tmp_path / "a.h5", dtype=torch.float32)
    assert [m.training for m in module] == [False, True] and module.training, "modes restored"
    assert not any(m._forward_hooks for m in module.modules()), "hook removed"
    assert all(p.grad is None for p in module.parameters())
    module.eval()
    flat = [x.reshape(-1, 3) for x in inputs]
    hidden = [module[0](x) for x in flat]
    expected = torch.cat(hidden if hook == "0" else [module[1].linear(h) for h in hidden])
    assert count == 17
    torch.testing.assert_close(content(tmp_path / "a.h5"), expected.detach())


def test_capture_passes_positional_and_named_arguments(tmp_path):
    block, x = Block().eval(), random_rows(3, 6)
    given = [(x, 2.0), {"x": x, "scale": 3.0}, x.numpy()]
    capture(block, "", given, tmp_path / "a.h5", dtype=torch.float32)
    once = block.linear(x).detach()
    expected = torch.cat([2 * once, 3 * once, once])
    torch.testing.assert_close(content(tmp_path / "a.h5"), expected)


def test_bad_hooks(tmp_path):
    module, path = model(), tmp_path / "a.h5"
    with pytest.raises(ValueError, match=r"hook_point must name .*, got '1.linea'; .*'1.linear'"):
        capture(module, "1.linea", [random_rows(2, 3)], path)
    with pytest.raises(DataError, match=r"capture: '1.unused' was not called"):
        capture(module, "1.unused", [random_rows(2, 3)], path)
    strange = nn.Sequential(nn.LSTM(3, 2), nn.Identity())
    strange[0].forward = lambda x: {"x": x}
    with pytest.raises(DataError, match=r"'0' must return a tensor \[..., D\], got dict"):
        capture(strange, "0", [random_rows(2, 3)], path)
    assert os.listdir(tmp_path) == []
    assert not any(m._forward_hooks for m in [*module.modules(), *strange.modules()])


# -- mixtures --------------------------------------------------------------------------------------


def test_synthetic_rows_are_mixtures_of_their_directions(tmp_path):
    # More features than latents: the coefficients follow from the row.
    options = {"features": 40, "latents": 12, "active": 3, "tokens": 500, "dtype": torch.float32}
    assert synthetic(tmp_path / "a.h5", **options, seed=1, noise=0) == 500
    rows = content(tmp_path / "a.h5")
    with ActivationStore(tmp_path / "a.h5") as store:
        directions = store.directions
    assert directions.shape == (12, 40)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(12))
    coefficients = rows.double() @ torch.linalg.pinv(directions.double())
    torch.testing.assert_close(coefficients @ directions.double(), rows.double(), atol=1e-5, rtol=0)
    used = coefficients.abs() > 1e-4  # float32 rounding of the row, amplified by the inverse
    assert (used.sum(1) == 3).all()
    assert coefficients[used].min() > 0.499 and coefficients[used].max() < 1.501
    counts = used.sum(0)
    assert counts[:3].min() > counts[-3:].max() / 2 and counts.min() > 500 * 3 / 12 / 3


def test_synthetic_files_follow_from_the_seed_and_hold_the_noise_asked_for(tmp_path):
    options = {"features": 16, "latents": 32, "active": 2, "tokens": 3000, "dtype": torch.float32}
    for name, seed, noise in (("a", 1, 0), ("b", 1, 0), ("c", 2, 0)):
        synthetic(tmp_path / f"{name}.h5", **options, seed=seed, noise=noise)
    rows = {name: content(tmp_path / f"{name}.h5") for name in "abc"}
    assert torch.equal(rows["a"], rows["b"]) and not torch.equal(rows["a"], rows["c"])
    synthetic(tmp_path / "d.h5", **options, seed=1, noise=0.1)
    noise = content(tmp_path / "d.h5") - rows["a"]
    # Its standard deviation is known to 1 / sqrt(2 * 48000) = 0.3 %; 2 % is six times that.
    assert abs(noise.std().item() / 0.1 - 1) < 0.02


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"latents": 0}, "latents must be at least 1, got 0"),
        ({"tokens": -1}, "tokens must be at least 1, got -1"),
        ({"active": 513}, r"active must lie in 1\.\.512 \(the number of latents\), got 513"),
        ({"active": 0}, r"active must lie in 1\.\.512"),
        ({"noise": -0.1}, "noise must be at least 0 and finite, got -0.1"),
    ],
)
def test_bad_mixtures(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^synthetic: {message}"):
        synthetic(tmp_path / "a.h5", **options)
    assert os.listdir(tmp_path) == []


# -- the command -----------------------------------------------------------------------------------

FACTORY = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(10, 6), torch.nn.Linear(6, 4))
def number():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "some_model.py").write_text(FACTORY)
    np.save(tmp_path / "inputs.npy", np.arange(300).reshape(30, 10) % 10)
    yield tmp_path
    sys.modules.pop("some_model", None)


def data(*flags):
    return main(["data", "activations", *map(str, flags)])


def test_the_command_makes_files(here, capsys):
    assert data("synthetic", "--out", "s.h5", "--tokens", 200, "--active", 3, "--seed", 5) == 0
    expected = "s.h5: 200 tokens of 128 features, float16, 512 known directions, "
    assert capsys.readouterr().out.startswith(expected)
    assert data("convert", "s.h5", "s.h5", "--out", "c.h5", "--dtype", "float32") == 0
    assert "400 tokens of 128 features, float32" in capsys.readouterr().out
    flags = ["--module", "some_model:make", "--hook", "1", "--inputs", "inputs.npy"]
    assert data("capture", *flags, "--out", "m.h5", "--dtype", "float32", "--batch-size", 7) == 0
    assert "m.h5: 300 tokens of 4 features" in capsys.readouterr().out
    from some_model import make

    expected = make()(torch.from_numpy(np.load("inputs.npy"))).view(-1, 4).detach()
    torch.testing.assert_close(content("m.h5"), expected)


CAPTURE = ["capture", "--out", "x.h5", "--hook", "1", "--inputs"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["synthetic", "--out", "inputs.npy"], "--out must end in .h5"),
        (["synthetic", "--out", "taken.h5"], "taken.h5 exists already"),
        (["synthetic", "--out", "x.h5", "--active", "0"], "synthetic: --active must lie in 1..512"),
        (["convert", "wide.npy", "--out", "x.h5", "--dtype", "float16"], "use --dtype float32 or"),
        (["convert", "nan.npy", "--out", "x.h5"], "(--nonfinite skip leaves such rows out)"),
        (["synthetic"], "arguments are required: --out"),
        (["convert", "no.npy", "--out", "x.h5"], "activation file not found: no.npy"),
        (["convert", "inputs.npy", "--out", "x.h5"], "must be float32"),
        (["convert", "inputs.npy", "--out", "taken.h5"], "taken.h5 exists already"),
        (["convert", "inputs.npy", "--out", "x.h5", "--fast"], "unknown arguments: --fast"),
        ([*CAPTURE, "no.npy", "--module", "some_model:make"], "input file not found: no.npy"),
        ([*CAPTURE, "taken.h5", "--module", "some_model:make"], "not .npy: taken.h5"),
        ([*CAPTURE, "inputs.npy", "--module", "some_model"], "PACKAGE.MODULE:FACTORY"),
        ([*CAPTURE, "inputs.npy", "--module", "no_model:make"], "No module named 'no_model'"),
        ([*CAPTURE, "inputs.npy", "--module", "some_model:no"], "has no function 'no'"),
        ([*CAPTURE, "inputs.npy", "--module", "some_model:number"], "must return a torch.nn.Mod"),
        (
            [*CAPTURE, "inputs.npy", "--module", "some_model:make", "--batch-size", "0"],
            "--batch-size must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_one_line(flags, message, here, capsys):
    (here / "taken.h5").write_text("precious")
    np.save("wide.npy", np.full((3, 4), 1e6, np.float32))
    np.save("nan.npy", np.full((3, 4), np.nan, np.float32))
    try:
        assert data(*flags) == 2
    except SystemExit as stop:
        assert stop.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"sparsekern: error: data activations {flags[0]}: ")
    assert message in printed.err
    assert not (here / "x.h5").exists() and (here / "taken.h5").read_text() == "precious"
