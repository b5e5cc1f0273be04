"""The CUDA kernels in the host emulation under sanitizers; and that the sanitizers would notice."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import emulation_build
import pytest

pytestmark = [pytest.mark.compiles, pytest.mark.sanitizer]
# A container may forbid the tracing that the leak check needs; leaks are not what we look for.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
SECONDS = 600


@pytest.fixture(scope="module")
def driver(request: pytest.FixtureRequest) -> pathlib.Path:
    try:
        return emulation_build.build_driver(request.param)
    except RuntimeError as missing:
        pytest.skip(str(missing))


def run(program: pathlib.Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(program), *arguments],
        env=os.environ | OPTIONS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stdout


def check_clean(driver: pathlib.Path, *arguments: str) -> None:
    status, output = run(driver, *arguments)
    print(output)
    assert status == 0, output
    counts = dict(re.findall(r"^(\w+): (\d+) cases, 0 failures", output, re.MULTILINE))
    programs = emulation_build.EMULATION.glob("driver_*.cpp")
    assert set(counts) == {path.stem.removeprefix("driver_") for path in programs}
    assert {"emulation", "topk", "products"} <= set(counts)
    assert all(int(count) > 0 for count in counts.values())


@pytest.mark.parametrize("driver", ["address"], indirect=True)
def test_clean_under_address_and_undefined_behaviour_sanitizers(driver: pathlib.Path) -> None:
    check_clean(driver)


@pytest.mark.parametrize("driver", ["thread"], indirect=True)
def test_clean_under_thread_sanitizer(driver: pathlib.Path) -> None:
    check_clean(driver, "--quick")


@pytest.mark.parametrize("driver", ["address"], indirect=True)
@pytest.mark.parametrize("mistake", ["overrun", "overrun-global"])
def test_planted_overrun_is_reported(driver: pathlib.Path, mistake: str) -> None:
    status, output = run(driver, "--plant", mistake)
    assert status != 0
    assert "heap-buffer-overflow" in output
    assert f"{mistake.replace('-', '_')}_kernel" in output


@pytest.mark.parametrize("driver", ["thread"], indirect=True)
@pytest.mark.parametrize(
    ("mistake", "kernel"), [("race", "race"), ("race-shuffle", "shuffle_race")]
)
def test_planted_race_is_reported(driver: pathlib.Path, mistake: str, kernel: str) -> None:
    status, output = run(driver, "--plant", mistake)
    assert status != 0
    assert "ThreadSanitizer: data race" in output
    assert f"{kernel}_kernel" in output


@pytest.mark.parametrize("driver", ["address"], indirect=True)
def test_unknown_mistake_is_refused(driver: pathlib.Path) -> None:
    status, output = run(driver, "--plant", "nothing")
    assert status == 2
    assert output.startswith("usage:")
