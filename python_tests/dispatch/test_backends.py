"""Choosing implementations, and importing without compiled code or triton."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pydoc
import re
import sys

import pytest
import torch
from torch_alone import run_after_torch

import sparsekern
from sparsekern._renamed import RENAMED
from sparsekern.dispatch import backends, modules, operations

PACKAGE = pathlib.Path(sparsekern.__file__).parent


# -- choice of a backend ---------------------------------------------------------------------------


def test_forced_backends_nest_and_end():
    operation = operations.operations["topk"]
    assert operation.choose("cpu", torch.float32)[0] in ("native", "reference")
    with sparsekern.backend("reference"):
        assert operation.choose("cpu", torch.float32) == ("reference", "forced")
        with sparsekern.backend("auto"):
            assert operation.choose("cpu", torch.float32)[0] in ("native", "reference")
        assert operation.choose("cpu", torch.float32)[0] == "reference"
    with pytest.raises(RuntimeError), sparsekern.backend("reference"):
        raise RuntimeError
    assert operation.choose("cpu", torch.float32)[1] != "forced"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend: name must be one of auto, .*got 'cuda'"):
        with sparsekern.backend("cuda"):
            pass
    wrong = run_after_torch(
        "import torch, sparsekern; sparsekern.topk(torch.ones(3), 1)", SPARSEKERN_BACKEND="fast"
    )
    assert "SPARSEKERN_BACKEND: name must be one of" in wrong.stderr


def test_environment_forces_a_backend():
    code = "import torch, sparsekern; print(sparsekern.describe()['implementations'][0]['backend'])"
    assert run_after_torch(code, SPARSEKERN_BACKEND="reference").stdout.strip() == "reference"


def test_forced_triton_on_a_cpu_says_what_is_missing():
    code = (
        "import torch, sparsekern\n"
        "with sparsekern.backend('triton'):\n"
        "    sparsekern.topk(torch.ones(3), 1)\n"
    )
    run = run_after_torch(code, TRITON_INTERPRET="0")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "topk: backend 'triton' was asked for but cannot run on cpu: triton" in last


def test_description_is_complete():
    facts = sparsekern.describe()
    assert {"versions", "threads", "gpu", "modules", "implementations"} <= set(facts)
    operations = {row["operation"] for row in facts["implementations"]}
    assert {"topk", "topk_mask", "sparse_matmul", "count_active"} <= operations
    for row in facts["implementations"]:
        assert row["reason"] and row["backend"] in backends.BACKENDS


# -- importing -------------------------------------------------------------------------------------


def test_import_is_silent_and_light():
    run = run_after_torch(
        "import sys, torch; before = set(sys.modules); import sparsekern\n"
        "added = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = added & {'triton', 'h5py', 'matplotlib', 'safetensors', 'scipy', 'tqdm'}\n"
        "assert not heavy, heavy"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_moved_modules_are_found_by_their_old_names():
    for old, new in RENAMED.items():
        with pytest.warns(DeprecationWarning, match=f"sparsekern.{old} is now sparsekern.{new}"):
            sys.modules.pop(f"sparsekern.{old}", None)
            module = importlib.import_module(f"sparsekern.{old}")
        assert module is importlib.import_module(f"sparsekern.{new}")
        assert module.__spec__.name == module.__name__ == f"sparsekern.{new}"
    with pytest.raises(ModuleNotFoundError, match=r"sparsekern\.models\.nothing"):
        importlib.import_module("sparsekern.models.nothing")


def test_the_changelog_lists_the_renamed_modules():
    text = (pathlib.Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    table = text.split("Modules, inside `sparsekern`:")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \|$", table, re.MULTILINE)
    assert len(rows) == len(RENAMED) and dict(rows) == RENAMED


def test_parts_of_the_package_are_imported_when_first_used():
    run = run_after_torch(
        "import sys, sparsekern\n"
        "parts = set(sparsekern._SUBMODULES)\n"
        "assert parts <= set(dir(sparsekern)) and 'optim' in parts\n"
        "assert not any(f'sparsekern.{part}' in sys.modules for part in parts)\n"
        "assert sparsekern.optim.Adam and sparsekern.models.SparseAutoencoder\n"
        "assert sparsekern.data.ActivationStore and sparsekern.training and sparsekern.nn.TopK\n"
        "assert not hasattr(sparsekern, 'optimizers')"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    public = {name for name in found if not name.startswith("_")}
    # what `import sparsekern` brings, or needs
    at_once = {"dispatch", "nn", "ops"}
    assert set(sparsekern._SUBMODULES) == public - at_once


def test_signatures_show_no_addresses():
    for name in (name for name in dir(sparsekern) if not name.startswith("_")):
        public = getattr(sparsekern, name)
        members = vars(public).values() if inspect.isclass(public) else ()
        for shown in (public, *members):
            if callable(shown):
                try:
                    assert " at 0x" not in str(inspect.signature(shown)), shown
                except ValueError:  # a class of torch's without one
                    continue
        assert "object at 0x" not in pydoc.render_doc(public)


HIDE = "import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"  # None means: not there


@pytest.mark.parametrize(
    "hidden",
    [("sparsekern._native", "sparsekern._cuda"), ("triton",), ("sparsekern._cuda", "triton")],
)
def test_works_without_native_modules_or_triton(hidden):
    run = run_after_torch(
        HIDE.format(hidden=hidden)
        + "import torch, sparsekern\n"
        + "x = torch.randn(3, 9, requires_grad=True)\n"
        + "v, i = sparsekern.topk(x, 2)\n"
        + "out = sparsekern.sparse_matmul(v, i, torch.randn(9, 4))\n"
        + "out.sum().backward(); assert x.grad.abs().sum() > 0\n"
        + "sparsekern.TopK(2, counter=sparsekern.DeadNeuronCounter(9))(x)\n"
        + "print(sparsekern.describe()['modules'])",
        TRITON_INTERPRET="0",
    )
    assert run.returncode == 0, run.stderr
    assert ("missing" in run.stdout) == (
        "sparsekern._cuda" in hidden or "_cuda': {'missing" in run.stdout
    )


def test_debug_mode_checks_indices_on_any_device(monkeypatch):
    from sparsekern.ops.checks import check_range

    monkeypatch.setenv("SPARSEKERN_DEBUG", "1")
    with pytest.raises(IndexError, match="got 9 at flat position 1"):
        check_range("sparse_matmul", torch.tensor([0, 9]), 5)
    if torch.cuda.is_available():
        with pytest.raises(IndexError, match="got 9 at flat position 1"):
            sparsekern.count_active(torch.tensor([0, 9], device="cuda"), 5)


def test_memory_of_a_call():
    """top-k allocates its outputs; the product's backward pass its gradients and O(B k)
    integers."""
    if modules.native_module("cpu")[0] is None:
        pytest.skip(modules.native_module("cpu")[1])

    def allocated(function) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        return sum(
            event.self_cpu_memory_usage
            for event in profile.key_averages()
            if event.self_cpu_memory_usage > 0
        )

    x = torch.randn(64, 4096)
    outputs = 64 * 32 * (4 + 8)
    assert allocated(lambda: sparsekern.topk(x, 32)) <= outputs + 4096
    values, indices = sparsekern.topk(x, 32)
    weight = torch.randn(4096, 100)
    grad = torch.randn(64, 100)
    backward = torch.ops.sparsekern.sparse_matmul_backward
    gradients = 4096 * 100 * 4 + 64 * 32 * 4
    integers = 64 * 32 * 4 + 4097 * 8
    used = allocated(lambda: backward(grad, values, indices, weight, True, True))
    assert used <= gradients + integers + 4096
