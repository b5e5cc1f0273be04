"""Compilers that can do less, and names of folders that the shell and ninja read as something
else."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

import pytest
from builds import CXX, build, report_of, write_program
from setup_file import setup_file

# what a refusal looks like in the stand-in: $1 to $n are the compiler's arguments
REFUSES = 'case " $* " in *" {option} "*) echo "error: no option {option}" >&2; exit 1 ;; esac'
BROKEN = '[ "$1" = --version ] || { echo "error: cannot find crt1.o" >&2; exit 1; }'
# names as they occur, with what the shell, ninja and dependency files treat in a way of their own
NAMES = (
    "my projects",
    "a$x: $y",
    "a(b)&c;d|e",
    'it\'s "so"',
    "#50% früh*?",
    "a\\b `c` <d> ~!^[e]{f}",
)


def test_a_compiler_that_cannot_compile_is_as_good_as_none(tmp_path):
    old = REFUSES.format(option="-std=c++17")
    for refusal, what in ((BROKEN, "cannot find crt1.o"), (old, "no option -std=c++17")):
        cxx = write_program(tmp_path / "bin" / "cxx", CXX.format(refusal=refusal))
        for names in ("auto", "cpu"):
            run = build(tmp_path, CXX=str(cxx), SPARSEKERN_BUILD=names)
            assert run.returncode == 0, run.stderr
            reason = report_of(tmp_path)["_native"]
            assert reason.startswith(f"{cxx} could not compile C++17 (error: {what}"), reason
            assert "install g++ 9 or later" in reason and "\n" not in reason


def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path):
    refusal = REFUSES.format(option="-fopenmp")
    cxx = write_program(tmp_path / "bin" / "cxx", CXX.format(refusal=refusal))
    run = build(tmp_path, CXX=str(cxx), PATH=os.environ["PATH"], SPARSEKERN_BUILD="cpu")
    assert run.returncode == 0, run.stderr
    assert report_of(tmp_path)["_native"].endswith(", no OpenMP")


def test_clang_is_found_where_g_plus_plus_is_not(tmp_path):
    clang = write_program(tmp_path / "bin" / "clang++", CXX.format(refusal=""))
    for tool in ("ninja", "sh"):
        (tmp_path / "bin" / tool).symlink_to(setup_file().ninja() if tool == "ninja" else "/bin/sh")
    run = build(tmp_path, PATH=str(tmp_path / "bin"), SPARSEKERN_BUILD="cpu")
    assert run.returncode == 0, run.stderr
    assert report_of(tmp_path)["_native"].startswith(f"built with {clang}, ")


@pytest.mark.parametrize("name", NAMES)
def test_folders_may_have_any_name(tmp_path, name):
    """The folder of the sources, of pybind11 (in a build of its own: below TMPDIR), of the C++
    compiler and of nvcc."""
    folder = tmp_path / name
    cxx = write_program(folder / "tools" / "cxx", CXX.format(refusal=""))
    lists = '[ "$1" = --list-gpu-arch ] && { echo compute_90; exit; }'
    write_program(folder / "cuda" / "bin" / "nvcc", CXX.format(refusal=lists))
    headers = folder / "site" / "pybind11" / "include"
    headers.mkdir(parents=True)
    (headers.parent / "__init__.py").write_text(
        f"__version__ = '0'\ndef get_include():\n    return {str(headers)!r}\n"
    )
    run = build(
        folder,
        CXX=f"env {shlex.quote(str(cxx))} --sysroot={shlex.quote(name)}",
        CUDA_HOME=str(folder / "cuda"),
        PYTHONPATH=str(folder / "site"),
        PATH=os.environ["PATH"],
        SPARSEKERN_BUILD="cpu,cuda",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(line.startswith("built with ") for line in report_of(folder).values())
    package = folder / "lib" / "sparsekern"
    assert {path.name.split(".")[0] for path in package.glob("*.so")} == {"_native", "_cuda"}


def test_commands_receive_their_arguments_as_given(tmp_path):
    arguments = [*NAMES, "", "$in", "$$", "${out}", "-DTEXT=\"a 'b' \\n\"", "a\tb", "$(x)", "!"]
    setup = setup_file()
    file = setup.NinjaFile(tmp_path / "a b$c")
    tool = write_program(file.folder / "tool", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    source = tmp_path / "$source: of(one)"
    source.touch()
    file.rule("list", f"{setup.words([tool, *arguments])} $flags $in > $out && : > $out.d")
    file.compile("list", source, "list", ["-D", "x y$z"])
    file.link("cat $in > $out", "listed")
    file.run(shown=False)
    received = (file.folder / "listed").read_text().splitlines()
    assert received[:-1] == [*arguments, "-D", "x y$z"]
    assert (file.folder / received[-1]).samefile(source)


def test_line_breaks_in_a_path_are_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"a path held a line break, .*a\\nb.* \(rename it"):
        setup_file().words(["a\nb"])


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_header_is_noticed_in_any_folder(tmp_path, name):
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ on PATH; install it to test what it writes about dependencies")
    setup = setup_file()
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.cpp").write_text('#include "a.h"\nint main() { return STATUS; }\n')
    cxx = setup.words([compiler])
    for status in (3, 4):
        (tmp_path / name / "a.h").write_text(f"#define STATUS {status}\n")
        os.utime(tmp_path / name / "a.h", (2e9 + status,) * 2)  # in the future: newer than objects
        file = setup.NinjaFile(tmp_path / name / "build")
        file.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out")
        file.compile("cxx", tmp_path / name / "a.cpp", "once", [])
        file.link(f"{cxx} $in -o $out", "program")
        file.run(shown=False)
        assert subprocess.run([file.folder / "program"]).returncode == status
