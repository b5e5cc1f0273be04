"""Without an optional package sparsekern is imported, and one sentence says where it is needed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import spawn

import sparsekern.cli
from sparsekern.data import ActivationStore, draw_motifs, motif_domain
from sparsekern.data.images import dsprites, shapes3d
from sparsekern.measures import motif_errors
from sparsekern.studies import figures
from sparsekern.studies.vae_sae.report import statistics

OPTIONAL = ("triton", "h5py", "matplotlib", "safetensors", "scipy", "tqdm")
BUILDING = ("sparsekern._native", "sparsekern._cuda", "ninja", "pybind11", "setuptools")
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({hidden!r}))  # None means: not there
import sparsekern
for module in pkgutil.walk_packages(sparsekern.__path__, "sparsekern."):
    if "triton" not in module.name and not module.name.startswith(
        ("sparsekern.__main__", "sparsekern._")
    ):
        importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_every_module_is_imported_without_compilers_and_optional_packages():
    """Triton's kernels alone are written in triton."""
    out, errors = spawn("-c", IMPORT_ALL.format(hidden=OPTIONAL + BUILDING)).communicate()
    assert (out, errors) == ("", "")


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """The package and its modules are not there. What else is imported meanwhile stays."""
    loaded = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == package}
    sys.modules.update(dict.fromkeys([package, *loaded]))
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(loaded)


def hdf5_activations(folder: Path) -> None:
    (folder / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    ActivationStore(folder / "a.h5")


def hdf5_images(folder: Path) -> None:
    (folder / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    shapes3d.load(folder / "a.h5", 10, seed=0)


def drawn_motifs(folder: Path) -> None:
    domain = motif_domain("digit-circle")
    draw_motifs(domain, domain.batch(0, 0, 1), 0, folder / "a.png")


# what each package is needed for; where several places need it, one of each way to it
NEEDS: list[tuple[str, Callable[[Path], object]]] = [
    ("h5py", hdf5_activations),
    ("h5py", hdf5_images),
    ("h5py", lambda folder: shapes3d.write(folder / "a.h5", 10, seed=0)),
    ("tqdm", lambda folder: dsprites.write(folder / "a.npz", 10, seed=0)),
    ("matplotlib", lambda folder: figures.new_figure(1, 1)),
    ("matplotlib", drawn_motifs),
    ("scipy", lambda folder: motif_errors.assign_symbols(np.ones((2, 2)), one_to_one=True)),
    ("scipy", lambda folder: statistics._quantile(3)),
]


@pytest.mark.parametrize(
    "package, use", NEEDS, ids=[f"{number}-{name}" for number, (name, _) in enumerate(NEEDS)]
)
def test_a_missing_package_is_named_where_it_is_needed(tmp_path, package, use):
    with without(package), pytest.raises(ModuleNotFoundError) as caught:
        use(tmp_path)
    assert re.fullmatch(
        rf"[^\n]+ needs {package}[.\w]*; install it with: pip install 'sparsekern\[data\]'",
        str(caught.value),
    )


@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_a_study_names_missing_packages_before_it_begins(tmp_path, capsys, package):
    command = ["train", "vae-sae", "--out", str(tmp_path / "run")]
    with without(package):
        status = sparsekern.cli.main(command)
    assert status == 2
    line = f"sparsekern: error: train vae-sae: {package} not installed"
    assert capsys.readouterr().err == f"{line} (pip install 'sparsekern[data]')\n"
    assert not (tmp_path / "run").exists()
