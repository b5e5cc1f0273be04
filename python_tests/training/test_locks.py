"""Folders that two processes may want: locks, also where there are none, names, and links."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest

from sparsekern import _system
from sparsekern.studies.reproduction import locked
from sparsekern.training import RunError, RunFolder, runs

HOLDER = """
import sys
from sparsekern._system import lock_file
from pathlib import Path
held = lock_file(Path(sys.argv[1]))
assert held is not None
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_against_other_processes_until_they_end(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        assert _system.lock_file(tmp_path / "lock") is None
        holder.kill()
        holder.wait()
        unlock = _system.lock_file(tmp_path / "lock")
    assert unlock is not None and _system.lock_file(tmp_path / "lock") is None
    unlock()
    _system.lock_file(tmp_path / "lock")()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_used_with_a_warning(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"), RunFolder.create(tmp_path / "run", {}):
        pass
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path / "report"):
        pass


def test_other_errors_of_a_lock_are_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"cannot write to the run folder .*: Input/output error"):
        RunFolder.create(tmp_path / "run", {})
    with pytest.raises(RunError, match=r"--out cannot be written: .*Input/output error"):
        locked(tmp_path / "report").__enter__()


def test_folders_asked_for_at_the_same_moment_differ(tmp_path):
    found, errors = [], []
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        try:
            with runs.unused_folder(tmp_path / "runs" / "sae-1") as folder:
                (folder / "config.json").write_text("{}")
                found.append(folder.name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(found) == ["sae-1", *(f"sae-1-{number}" for number in range(2, 9))]


def test_a_folder_that_was_not_used_is_taken_back(tmp_path):
    with pytest.raises(ValueError), runs.unused_folder(tmp_path / "runs" / "sae-1"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with runs.unused_folder(tmp_path / "runs" / "sae-1"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock"])
def test_links_in_a_run_folder_are_refused_before_anything_is_written(name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    RunFolder.create(tmp_path / "run", {}).close()
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(victim)
    with pytest.raises(RunError, match="is a symbolic link"), RunFolder.open(tmp_path / "run") as r:
        r.rewind_metrics(0)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["a.json", ".new"])
def test_a_file_takes_the_place_of_a_link_and_leaves_what_it_points_to(name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    runs.write_atomically(tmp_path / "a.json", b"new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "lock"])
def test_a_pipe_in_a_run_folder_is_refused_at_once(name, tmp_path):
    RunFolder.create(tmp_path / "run", {}).close()
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(RunError, match="not a plain file"), RunFolder.open(tmp_path / "run") as run:
        run.rewind_metrics(0)


def test_runs_whose_files_are_links_can_be_read(tmp_path):
    """As a store of downloads keeps them."""
    RunFolder.create(tmp_path / "store", {"study": "x"}).close()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").symlink_to(tmp_path / "store" / "config.json")
    assert RunFolder.read_config(tmp_path / "run") == {"study": "x"}
    (tmp_path / "store" / "metrics.jsonl").write_text(json.dumps({"kind": "step"}) + "\n")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "store" / "metrics.jsonl")
    assert runs.read_metrics(tmp_path / "run", "step") == [{"kind": "step"}]
