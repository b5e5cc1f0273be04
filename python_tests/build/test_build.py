"""The build: what it needs, what happens without it, and that csrc stays free of torch."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import sys

import pytest
from builds import (
    ROOT,
    build,
    copy_sources,
    last_line,
    report_of,
    run_setup,
    stand_ins,
    write_program,
)
from setup_file import setup_file
from setuptools import Distribution

from sparsekern.cli import main
from sparsekern.dispatch import backends, modules


def test_without_a_compiler_the_install_goes_on(tmp_path):
    run = build(tmp_path)
    assert run.returncode == 0, run.stderr
    report = report_of(tmp_path)
    assert report["_native"].startswith("no C++ compiler was found")
    assert report["_cuda"].startswith("nvcc was not found")
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_without_a_compiler_the_install_goes_on_where_cuda_is_left_out(tmp_path):
    """`cpu` is `auto` without CUDA: it saves the minutes that nvcc takes, and asks for no more."""
    run = build(tmp_path, SPARSEKERN_BUILD="cpu")
    assert run.returncode == 0, run.stderr
    report = report_of(tmp_path)
    assert report["_native"].startswith("no C++ compiler was found")
    assert report["_cuda"].startswith("left out by SPARSEKERN_BUILD=cpu")


@pytest.mark.parametrize("names", ["cuda", "cpu,cuda"])
def test_asking_for_cuda_where_it_cannot_be_built_is_an_error_of_one_line(tmp_path, names):
    run = build(tmp_path, SPARSEKERN_BUILD=names)
    assert run.returncode != 0
    what = "no C++ compiler was found" if "cpu" in names else "nvcc was not found"
    assert last_line(run).startswith(f"error: SPARSEKERN_BUILD={names}: {what} when ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("SPARSEKERN_BUILD", "gpu", "must be auto, cpu, cuda, cpu,cuda or none, got 'gpu'"),
        ("SPARSEKERN_BUILD", "cpu,gpu", "must be auto, cpu, cuda, cpu,cuda or none, got 'cpu,gpu'"),
        ("SPARSEKERN_BUILD", "none,cpu", "must be .* none, got 'none,cpu'"),
        ("SPARSEKERN_CUDA_ARCHS", "8.0+PTX", r"must list numbers such as 80;90, got '8\.0\+PTX'"),
        ("SPARSEKERN_CUDA_ARCHS", "90;sm_80", "must list numbers such as 80;90, got 'sm_80'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, name, value, rule):
    run = build(tmp_path, **{**stand_ins(tmp_path, 90), name: value})
    assert run.returncode != 0
    assert re.fullmatch(f"error: {name} {rule}", last_line(run)), run.stderr


@pytest.mark.parametrize("command", ["nowhere g++", "/nowhere/g++", 'g++ "'])
def test_a_cxx_that_cannot_be_used_is_named(tmp_path, command):
    run = build(tmp_path, CXX=command)
    assert run.returncode == 0, run.stderr
    report = report_of(tmp_path)
    assert report["_native"].startswith(f"CXX={command!r} did not run")


@pytest.mark.parametrize(
    "arch, reason",
    [(60, "knew none of sm_80, sm_90, sm_100"), (90, "nvcc failed .*: nvcc fatal : broken on pu")],
)
def test_without_a_cuda_module_the_cpu_module_is_installed(tmp_path, arch, reason):
    environment = stand_ins(tmp_path, arch)
    run = build(tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    package = tmp_path / "lib" / "sparsekern"
    report = report_of(tmp_path)
    assert report["_native"].startswith("built")
    assert re.search(reason, report["_cuda"])
    assert [path.name.split(".")[0] for path in package.glob("*.so")] == ["_native"]
    assert "sparsekern._cuda: " in run.stdout
    asked = build(tmp_path, **environment, SPARSEKERN_BUILD="cpu,cuda")
    assert asked.returncode != 0
    assert re.search(f"SPARSEKERN_BUILD=cpu,cuda: .*{reason}", asked.stderr)
    assert arch == 60 or "nvcc fatal   : broken on purpose" in asked.stdout


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Where the files of a GPU driver are looked for: a folder without any. Nor is nvidia-smi
    found."""
    setup = setup_file()
    patterns = tuple(str(tmp_path / pattern.lstrip("/")) for pattern in setup.GPU_FILES)
    monkeypatch.setattr(setup, "GPU_FILES", patterns)
    monkeypatch.setattr(setup, "WSL_NVIDIA_SMI", str(tmp_path / "wsl" / "nvidia-smi"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    "name, visible",
    [
        ("dev/nvidia0", True),
        ("dev/nvidia11", True),
        ("proc/driver/nvidia/gpus/0000:01:00.0", True),
        ("dev/nvidiactl", False),  # the driver without a GPU
        ("dev/nvidia-uvm", False),
        ("proc/driver/nvidia/version", False),
        ("dev/dxg", False),  # under WSL it may be another maker's
    ],
)
def test_a_gpu_is_visible_through_the_files_of_its_driver(driver, name, visible):
    assert not setup_file().gpu_is_visible()
    (driver / name).parent.mkdir(parents=True)
    (driver / name).touch()
    assert setup_file().gpu_is_visible() == visible


@pytest.mark.parametrize("place", ["bin", "wsl"])
@pytest.mark.parametrize(
    "answer, visible",
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", True),
        ("echo 'a warning'; echo 'GPU 12: NVIDIA H100 (UUID: GPU-1)'", True),
        ("echo 'No devices found.'", False),
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; exit 15", False),
        ("echo 'Failed to initialize NVML: GPU 0 is lost'; exit 9", False),
        ("while :; do :; done", False),
    ],
)
def test_a_gpu_is_visible_through_nvidia_smi(driver, monkeypatch, place, answer, visible):
    monkeypatch.setattr(setup_file(), "NVIDIA_SMI_SECONDS", 60 if "echo" in answer else 0.1)
    write_program(driver / place / "nvidia-smi", f'#!/bin/sh\n[ "$*" = -L ] || exit 2\n{answer}\n')
    assert setup_file().gpu_is_visible() == visible


LEFT_OUT = (
    "left out: no GPU was visible when sparsekern was installed (set SPARSEKERN_BUILD=cpu,cuda "
)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "names, nvcc, gpu, native, cuda",
    [
        (None, True, True, "built", "built"),
        (None, True, False, "built", LEFT_OUT),
        (None, False, True, "built", "nvcc was not found"),
        (None, False, False, "built", "nvcc was not found"),
        ("", True, False, "built", LEFT_OUT),
        ("auto", True, True, "built", "built"),
        ("auto", True, False, "built", LEFT_OUT),
        ("cpu,cuda", True, False, "built", "built"),
        ("cuda", True, False, "left out by SPARSEKERN_BUILD=cuda", "built"),
        ("cuda", False, True, None, None),
        ("cpu,cuda", False, False, None, None),
        ("cpu", True, True, "built", "left out by SPARSEKERN_BUILD=cpu"),
        ("none", True, True, *["left out by SPARSEKERN_BUILD=none"] * 2),
    ],
)
def test_cuda_is_built_where_a_gpu_is_visible_or_on_request(
    driver, monkeypatch, inplace, names, nvcc, gpu, native, cuda
):
    """None for both modules is an error: CUDA is asked for and cannot be built. The builders are
    stand-ins; the one of CUDA needs nvcc."""
    setup = setup_file()

    def builder(kind):
        def build(folder, target):
            if kind == "cuda":
                setup.nvcc()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / target).touch()
            return "built by a stand-in"

        return build

    builders = {name: (kind, builder(kind)) for name, (kind, _) in setup.BUILDERS.items()}
    monkeypatch.setattr(setup, "BUILDERS", builders)
    monkeypatch.setattr(setup, "scratch", lambda: driver / "build")
    monkeypatch.setattr(setup, "ROOT", driver / "root")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("SPARSEKERN_BUILD", raising=False)
    if names is not None:
        monkeypatch.setenv("SPARSEKERN_BUILD", names)
    if nvcc:
        write_program(driver / "bin" / "nvcc", "#!/bin/sh\n")
    if gpu:
        (driver / "dev").mkdir()
        (driver / "dev" / "nvidia0").touch()
    command = setup.NinjaBuild(Distribution())
    command.inplace, command.build_lib = inplace, str(driver / "lib")
    package = command.package_folder()
    package.mkdir(parents=True)
    for name in builders:  # of an earlier build
        (package / setup.module_file(name)).touch()
    if native is None:
        with pytest.raises(setup.SetupError, match=f"SPARSEKERN_BUILD={names}: nvcc was not fou"):
            command.run()
        return
    command.run()
    report = json.loads((package / "_build_report.json").read_text())
    assert report["_native"].startswith(native) and report["_cuda"].startswith(cuda)
    there = {name for name in builders if (package / setup.module_file(name)).exists()}
    assert there == {name for name, line in report.items() if line.startswith("built")}


def test_info_says_that_no_gpu_was_visible(driver, monkeypatch, capsys):
    """The line of the report is what `sparsekern info` prints of the module."""
    write_program(driver / "bin" / "nvcc", "#!/bin/sh\n")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    line = setup_file().left_out("cuda", ["auto"])
    (driver / "_build_report.json").write_text(json.dumps({"_cuda": line}))
    monkeypatch.setattr(modules, "PACKAGE", driver)
    monkeypatch.setitem(sys.modules, "sparsekern._cuda", None)  # as where it is left out
    backends.forget_modules()
    try:
        assert main(["info"]) == 0
    finally:
        monkeypatch.undo()
        backends.forget_modules()
    printed = " ".join(capsys.readouterr().out.split())
    assert f"sparsekern._cuda: missing: {line}" in printed


def test_nothing_is_built_on_request(tmp_path):
    run = build(tmp_path, SPARSEKERN_BUILD="none")
    assert run.returncode == 0, run.stderr
    report = report_of(tmp_path)
    assert all("left out by SPARSEKERN_BUILD=none" in reason for reason in report.values())


@pytest.mark.parametrize("prefix", ["", "env "])
def test_a_broken_source_fails_loudly(tmp_path, prefix):
    environment = broken_source(tmp_path, prefix)
    run = run_setup(tmp_path, "build", "--build-lib", "lib", SPARSEKERN_BUILD="cpu", **environment)
    assert run.returncode != 0
    assert "broken on purpose" in run.stdout + run.stderr
    assert re.match("error: SPARSEKERN_BUILD=cpu: .* failed .*broken on purpose", last_line(run))


def test_a_source_that_does_not_compile_is_loud_beside_the_sources_and_reported_elsewhere(tmp_path):
    environment = broken_source(tmp_path)
    run = run_setup(tmp_path, "build_ext", "--inplace", **environment)
    assert run.returncode != 0
    assert re.match("error: .* failed .*broken on purpose", last_line(run))
    run = run_setup(tmp_path, "build", "--build-lib", "lib", **environment)
    assert run.returncode == 0, run.stderr
    assert re.match("the C.. compiler failed .*broken on purpose", report_of(tmp_path)["_native"])


def broken_source(folder: pathlib.Path, prefix: str = "") -> dict[str, str]:
    """Leaves two sources, one of them broken; returns the environment of a real compiler."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ on PATH; install it to test a failing compilation")
    copy_sources(folder)
    for path in (folder / "csrc").glob("*/**/*.c*"):
        path.unlink()
    (folder / "csrc" / "cpu" / "common" / "memory.cpp").touch()
    (folder / "csrc" / "bindings_cpu.cpp").write_text("#error broken on purpose\n")
    return {"CXX": prefix + compiler, "PATH": os.environ["PATH"]}


def test_the_kernels_under_test_are_there_where_a_compiler_is():
    """An install goes on without them; its tests must not."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: install it and sparsekern again to test the compiled kernels")
    module, reason = modules.native_module("cpu")
    assert module is not None, reason


def test_csrc_includes_neither_torch_nor_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        included = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        wrong = [name for name in included if name.startswith(("torch", "ATen", "c10"))]
        if not path.name.startswith("bindings_"):
            wrong += [name for name in included if "pybind" in name or name == "Python.h"]
        assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"
