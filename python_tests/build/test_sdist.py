"""What is packed: an sdist that builds and holds the tests, and no leftovers in a wheel."""

from __future__ import annotations

import os
import pathlib
import shutil
import tarfile

import pytest
from builds import CXX, ROOT, build, copy_sources, last_line, report_of, run_setup, write_program
from setup_file import setup_file

import sparsekern

FOLDERS = ("bench", "csrc", "docs", "examples", "python_tests", "sparsekern", ".ci")
FILES = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}


@pytest.fixture
def unpacked(tmp_path: pathlib.Path) -> pathlib.Path:
    """The unpacked sdist of a copy of everything, as a checkout is after a build beside the
    sources."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_report.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    run = run_setup(checkout, "build_ext", "--inplace", **compilers(tmp_path))
    assert run.returncode == 0, run.stderr
    run = run_setup(checkout, "sdist", "-d", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)
    return tmp_path / archive.name.removesuffix(".tar.gz")


def compilers(folder: pathlib.Path) -> dict[str, str]:
    cxx = write_program(folder / "cxx", CXX.format(refusal=""))
    return {"CXX": str(cxx), "SPARSEKERN_BUILD": "cpu", "PATH": os.environ["PATH"]}


def test_an_sdist_holds_all_that_the_build_and_the_tests_need(unpacked):
    assert unpacked.name == f"sparsekern-{sparsekern.__version__}"
    assert {path.name for path in unpacked.iterdir() if path.is_file()} == {
        *FILES,
        "PKG-INFO",
        "setup.cfg",
    }
    for folder in FOLDERS:
        packed = {path for path in (unpacked / folder).rglob("*") if path.is_file()}
        for path in (ROOT / folder).rglob("*"):
            made = path.suffix in (".pyc", ".so") or path.name == "_build_report.json"
            made |= path.is_relative_to(ROOT / "bench" / "out")
            copy = unpacked / path.relative_to(ROOT)
            assert copy.is_file() == (path.is_file() and not made), path
            packed -= {copy}
        assert not packed


def test_the_kernels_are_built_from_an_unpacked_sdist(tmp_path, unpacked):
    run = run_setup(unpacked, "build", "--build-lib", "lib", **compilers(tmp_path))
    assert run.returncode == 0, run.stderr
    assert report_of(unpacked)["_native"].startswith("built with ")
    package = unpacked / "lib" / "sparsekern"
    assert (package / "py.typed").exists()
    assert (package / setup_file().module_file("_native")).exists()
    assert [path.name for path in (unpacked / "lib").iterdir()] == ["sparsekern"]
    endings = {"".join(path.suffixes[-1:]) for path in package.rglob("*") if path.is_file()}
    assert endings == {".py", ".so", ".json", ".typed"}


@pytest.mark.parametrize("lost", ["csrc", "csrc/cpu", "csrc/bindings_cpu.cpp"])
def test_without_sources_the_install_goes_on(tmp_path, lost):
    copy_sources(tmp_path)
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for names in ("", "cpu"):
        run = run_setup(tmp_path, "build", "--build-lib", "lib", SPARSEKERN_BUILD=names)
        assert run.returncode == 0, run.stderr
        reason = report_of(tmp_path)["_native"]
        assert f"{tmp_path / 'csrc'}/" in reason and "was not there" in reason
        assert reason.endswith("(install from a complete copy of the sources)")


def test_without_the_sources_of_cuda_asking_for_them_is_an_error(tmp_path):
    copy_sources(tmp_path)
    shutil.rmtree(tmp_path / "csrc" / "cuda")
    run = run_setup(tmp_path, "build", "--build-lib", "lib", SPARSEKERN_BUILD="cuda")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    missing = tmp_path / "csrc" / "cuda" / "**" / "*.cu"
    assert last_line(run).startswith(f"error: SPARSEKERN_BUILD=cuda: {missing} was not there ")


def test_nothing_of_an_earlier_build_is_installed(tmp_path):
    """A module of the package that was removed since, and kernels that are left out now."""
    copy_sources(tmp_path)
    removed = tmp_path / "sparsekern" / "removed.py"
    removed.touch()
    native = setup_file().module_file("_native")
    for command in (["build", "--build-lib", "lib"], ["build_ext", "--inplace"]):
        assert run_setup(tmp_path, *command, **compilers(tmp_path)).returncode == 0
    assert (tmp_path / "sparsekern" / native).exists()
    removed.unlink()
    assert build(tmp_path, SPARSEKERN_BUILD="none").returncode == 0
    assert run_setup(tmp_path, "build_ext", "--inplace", SPARSEKERN_BUILD="none").returncode == 0
    assert {path.name for path in (tmp_path / "lib" / "sparsekern").iterdir()} == {
        "__init__.py",
        "_build_report.json",
    }
    assert not (tmp_path / "sparsekern" / native).exists()


def test_sources_that_can_only_be_read_are_built_elsewhere(monkeypatch):
    setup = setup_file()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    folder = setup.scratch.__wrapped__()
    assert folder.is_dir() and ROOT not in folder.parents
