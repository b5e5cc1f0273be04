"""Writers of activation files meet full disks, other writers, and errors of what they write."""

import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from test_activation_sources import content

from sparsekern.data import ActivationStore, DataError, convert, synthetic, write_activations
from sparsekern.data import hdf5_writing as writing

ROWS = torch.arange(4000.0)[:, None].expand(-1, 64)


def full_after(size: int, monkeypatch) -> None:
    """The system has no space beyond so many bytes of a file."""
    real = os.posix_fallocate

    def limited(descriptor, start, more):
        if start + more > size:
            raise OSError(28, "No space left on device")
        real(descriptor, start, more)

    monkeypatch.setattr(os, "posix_fallocate", limited)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "other").write_text("precious")
    full_after(writing.SPARE_BYTES + 100_000, monkeypatch)
    with pytest.raises(DataError, match=r"cannot write .*a\.h5: No space left on device$"):
        write_activations(tmp_path / "a.h5", ROWS.split(100), dtype=torch.float32)
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("limit", [3 << 20, (3 << 20) + 5000, 1 << 22])
def test_the_rows_before_a_full_disk_are_kept_where_asked(limit, tmp_path, monkeypatch):
    full_after(writing.SPARE_BYTES + limit, monkeypatch)
    rows = ROWS.repeat(4, 1)
    with pytest.raises(DataError, match=r"device; the \d+ rows before are kept in .*a.partial.h5"):
        write_activations(
            tmp_path / "a.h5", rows.split(700), dtype=torch.float32, keep_partial=True
        )
    assert os.listdir(tmp_path) == ["a.partial.h5"]
    kept = content(tmp_path / "a.partial.h5")
    assert len(kept) >= 4000 and torch.equal(kept, rows[: len(kept)])


LIMITED = """
import resource, sys, torch
from sparsekern.data import DataError, write_activations
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
rows = torch.arange(20000.0)[:, None].expand(-1, 256)
try:
    write_activations(sys.argv[1], rows.split(500), dtype=torch.float32, keep_partial=True)
except DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 9 << 20, 13_000_000])
def test_a_limit_of_the_system_neither_crashes_nor_garbles(limit, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "a.h5", str(limit)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and not run.stderr, run
    assert run.stdout.startswith(f"write_activations: cannot write {tmp_path / 'a.h5'}: File too l")
    for name in os.listdir(tmp_path):
        assert name == "a.partial.h5" and "are kept in" in run.stdout
        with ActivationStore(tmp_path / name) as store:
            assert store.statistics(store.tokens).rows == store.tokens


def test_what_will_not_fit_is_not_begun(tmp_path, monkeypatch):
    write_activations(tmp_path / "a.h5", [ROWS])
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"^convert: cannot write .* are needed, 0 MB are free"):
        convert(tmp_path / "a.h5", tmp_path / "b.h5")
    with pytest.raises(DataError, match=r"^synthetic: cannot write .*256 MB are needed"):
        synthetic(tmp_path / "b.h5")
    assert os.listdir(tmp_path) == ["a.h5"]


def test_no_space_is_left_reserved(tmp_path):
    write_activations(tmp_path / "a.h5", [ROWS], dtype=torch.float32)
    assert os.path.getsize(tmp_path / "a.h5") < ROWS.numel() * 4 + 20_000
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["activations"][:], ROWS)


WRITER = """
import sys, torch
from sparsekern.data import write_activations
def batches():
    for number in range(40):
        yield torch.full((1000, 256), number + 1.0)
        if number == 20:
            print(flush=True)
            input()
write_activations(sys.argv[1], batches())
"""


def test_a_second_writer_takes_nothing_from_the_first(tmp_path):
    path = tmp_path / "a.h5"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WRITER, path], **pipes) as first:
        first.stdout.readline()
        with pytest.raises(DataError, match="another process is writing"):
            write_activations(path, [ROWS])
        first.communicate(b"\n")
    expected = torch.arange(1.0, 41).repeat_interleave(1000)
    assert torch.equal(content(path)[:, 0].float(), expected)


def failing(error, after=3):
    for number in range(after):
        yield torch.full((50, 4), float(number))
    raise error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(5, "tape"), KeyError(1)])
def test_errors_of_the_callers_batches_stay_what_they_are(error, tmp_path):
    for keep in (False, True):
        with pytest.raises(type(error)) as caught:
            write_activations(tmp_path / "a.h5", failing(error), keep_partial=keep)
        assert caught.value is error
    assert os.listdir(tmp_path) == ["a.partial.h5"]
    assert len(content(tmp_path / "a.partial.h5")) == 150
    assert "the 150 rows before are kept in" in error.__notes__[0]


def test_partial_files_never_replace_one_another(tmp_path):
    for _ in range(3):
        with pytest.raises(DataError, match="kept in"):
            write_activations(tmp_path / "a.h5", failing(DataError("no")), keep_partial=True)
    names = ["a.partial-2.h5", "a.partial-3.h5", "a.partial.h5"]
    assert sorted(os.listdir(tmp_path)) == names


def test_an_overflow_keeps_the_rows_before_and_says_what_to_store(tmp_path):
    rows = torch.ones(30, 4)
    batches = [rows, rows, rows * 1e5]
    with pytest.raises(DataError, match=r"holds 100000, .* \(use dtype=torch.float32 or dtype=tor"):
        write_activations(tmp_path / "a.h5", batches, dtype=torch.float16, keep_partial=True)
    assert torch.equal(content(tmp_path / "a.partial.h5"), rows.repeat(2, 1).half())


def test_bfloat16_batches_are_stored_as_they_are(tmp_path):
    rows = (torch.ones(3, 4) * 1e30).bfloat16()
    write_activations(tmp_path / "a.h5", [rows])
    assert torch.equal(content(tmp_path / "a.h5", torch.bfloat16), rows)
    with pytest.raises(DataError, match=r"batch 1 is torch.float32, those before torch.bfloat16"):
        write_activations(tmp_path / "b.h5", [rows, rows.float()])


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*: File name too long"):
        write_activations(tmp_path / ("a" * 252 + ".h5"), [ROWS])


def test_a_broken_link_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "a.h5").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="exists already"):
        write_activations(tmp_path / "a.h5", [ROWS])
    assert os.listdir(tmp_path) == ["a.h5"]
