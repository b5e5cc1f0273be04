"""Writing image sets: kills at any moment, signals, and what is refused."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib

import pytest
from processes import Forked, run_command, spawn

from sparsekern._system import lock_file
from sparsekern.cli.command import main
from sparsekern.data import CountError, DataError, WritingInterrupted
from sparsekern.data.images import dsprites, shapes3d
from sparsekern.data.images import writing as image_writing

FILES = [(dsprites, "d.npz"), (dsprites, "d.h5"), (shapes3d, "s.hdf5")]
NAMES = [name for _, name in FILES]


def parts(path):
    return path.with_name(f".{path.name}.parts")


SCRIPT = """
import sys
from sparsekern.data import dsprites
dsprites.write(sys.argv[1], int(sys.argv[2]), seed=5, chunk_rows=3)
"""


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(tmp_path):
    count, wait = 600, random.Random(int(time.time()))
    expected, path = tmp_path / "undisturbed.npz", tmp_path / "d.npz"
    dsprites.write(expected, count, seed=5, chunk_rows=3)
    kills = 0
    while kills < 3:
        before = len(list(parts(path).glob("*.z"))) if parts(path).exists() else 0
        process = spawn("-c", SCRIPT, str(path), str(count))
        while process.poll() is None:
            if len(list(parts(path).glob("*.z"))) > before:
                time.sleep(wait.uniform(0, 0.05))
                process.kill()
                break
            time.sleep(0.001)
        _, err = process.communicate()
        if path.exists():
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
        assert len(list(parts(path).glob("*.z"))) > before, "what was complete is kept"
    drawn = {chunk: chunk.stat().st_mtime_ns for chunk in parts(path).glob("*.z")}
    pack, kept = image_writing._Writer._pack, []

    def packed(writer):
        kept.extend(chunk for chunk in drawn if chunk.stat().st_mtime_ns == drawn[chunk])
        pack(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_writing._Writer, "_pack", packed)
        if not path.exists():
            dsprites.write(path, count, seed=5, chunk_rows=3)
            assert len(kept) == len(drawn) > 0, "nothing is drawn twice"
    assert path.read_bytes() == expected.read_bytes()
    assert not parts(path).exists()


class Killed(BaseException):
    """Stands for a kill: nothing that the writer does afterwards counts."""


def test_a_kill_between_any_two_steps_on_the_disk(tmp_path, monkeypatch):
    """Stops before the n-th change to a folder, for every n, and looks at what is there."""
    path, expected = tmp_path / "d.npz", tmp_path / "undisturbed.npz"
    steps, limit = [], 0
    dsprites.write(expected, 8, seed=5, chunk_rows=3)
    real = {name: getattr(image_writing.os, name) for name in ("replace", "fsync")}
    unlink, rmtree = type(path).unlink, image_writing.shutil.rmtree

    def counted(function):
        def step(*given, **more):
            steps.append(function)
            if len(steps) == limit:
                raise Killed
            # A process that was killed takes no further step, such as cleaning up.
            return None if len(steps) > limit else function(*given, **more)

        return step

    while True:
        steps.clear()
        limit += 1
        with monkeypatch.context() as patch:
            for step, function in real.items():
                patch.setattr(image_writing.os, step, counted(function))
            patch.setattr(type(path), "unlink", counted(unlink))
            patch.setattr(image_writing.shutil, "rmtree", counted(rmtree))
            try:
                dsprites.write(path, 8, seed=5, chunk_rows=3)
            except Killed:
                pass
            else:
                break
        if path.exists():
            assert path.read_bytes() == expected.read_bytes(), "never a part under the final name"
        assert dsprites.write(path, 8, seed=5, chunk_rows=3) == 8
        assert path.read_bytes() == expected.read_bytes()
        assert not parts(path).exists()
        path.unlink()
    assert limit > 20, "that many steps were tried"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_how_to_go_on(number, tmp_path):
    path = tmp_path / "d.h5"
    command = ["data", "dsprites", "--out", str(path)]
    process = Forked(run_command, command)
    while not parts(path).exists() or not list(parts(path).glob("*.z")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and err == ""
    assert out.startswith("interrupted; ") and "the same command goes on from there" in out
    assert str(parts(path)) in out and not path.exists()


@pytest.mark.parametrize("phase", ["render", "pack"])
def test_an_interrupted_call_goes_on(phase, tmp_path, monkeypatch):
    path, calls = tmp_path / "d.npz", []
    with monkeypatch.context() as patch:
        if phase == "render":
            kind, original = dsprites.DSprites, dsprites.DSprites.render

            def render(classes):
                calls.append(len(classes))
                if len(calls) == 2:
                    signal.raise_signal(signal.SIGINT)
                return original(classes)

            patch.setattr(kind, "render", render)
        else:
            patch.setattr(
                image_writing.zlib, "decompress",
                lambda data: signal.raise_signal(signal.SIGTERM) or zlib.decompressobj().decompress(
                    data
                ),
            )  # fmt: skip
        with pytest.raises(WritingInterrupted) as stop:
            dsprites.write(path, 20, seed=5, chunk_rows=4)
    assert stop.value.signal == (signal.SIGINT if phase == "render" else signal.SIGTERM)
    held = sorted(found.name for found in parts(path).iterdir() if found.name != "lock")
    chunks = ["0.z", "4.z"] if phase == "render" else ["0.z", "12.z", "16.z", "4.z", "8.z"]
    assert held == [*chunks, "settings.json"]
    assert dsprites.write(path, 20, seed=5, chunk_rows=4) == 20
    assert (dsprites.load(path).images == dsprites.rendered(20, seed=5).images).all()


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A path whose writing was cut short before the five chunks were packed."""
    path = tmp_path / "d.npz"

    def stop(writer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_writing._Writer, "_pack", stop)
        dsprites.write(path, 20, seed=5, chunk_rows=4)
    assert not path.exists()
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 6}, "with seed 5, it cannot be completed with 6"),
        ({"count": 21}, "with images 20, it cannot be completed with 21"),
        ({"chunk_rows": 5}, "with chunk_rows 4, it cannot be completed with 5"),
    ],
)
def test_a_part_of_another_command_is_named(change, message, part):
    before = {path: path.read_bytes() for path in parts(part).iterdir()}
    with pytest.raises(DataError, match=f"^dsprites.write: a part of {part} was written {message}"):
        dsprites.write(part, **{"count": 20, "seed": 5, "chunk_rows": 4, **change})
    assert {path: path.read_bytes() for path in parts(part).iterdir()} == before


def test_a_part_that_is_none_or_damaged(part):
    chunk = parts(part) / "4.z"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"4\.z is damaged \(remove it, and start again\)"):
        dsprites.write(part, 20, seed=5, chunk_rows=4)
    chunk.unlink()
    assert dsprites.write(part, 20, seed=5, chunk_rows=4) == 20
    part.unlink()
    parts(part).mkdir()
    for content in ("hello", "[]", json.dumps({"set": "dSprites"})):
        (parts(part) / "settings.json").write_text(content)
        with pytest.raises(DataError, match="holds no part of an image set"):
            dsprites.write(part, 20)


def test_one_writer_at_a_time(part):
    parts(part).mkdir(exist_ok=True)
    unlock = lock_file(parts(part) / "lock")
    with pytest.raises(DataError, match=f"^dsprites.write: another process is writing {part}$"):
        dsprites.write(part, 20, seed=5, chunk_rows=4)
    unlock()


def test_an_existing_file_is_left_alone(part, tmp_path):
    for path in (tmp_path / "mine.npz", part):
        path.write_text("mine")
        with pytest.raises(DataError, match=f"^dsprites.write: {path} exists already"):
            dsprites.write(path, 20, seed=5, chunk_rows=4)
        assert path.read_text() == "mine"
    assert not parts(tmp_path / "mine.npz").exists()
    assert (parts(part) / "4.z").exists()


def test_a_full_disk_keeps_what_is_complete(tmp_path, monkeypatch):
    path, written, fsync = tmp_path / "d.h5", [], image_writing.os.fsync

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(image_writing.os, "fsync", full)
        with pytest.raises(DataError, match=f"cannot write {path}: .*No space left on device"):
            dsprites.write(path, 20, seed=5, chunk_rows=4)
    assert (parts(path) / "0.z").exists() and not path.exists()
    assert dsprites.write(path, 20, seed=5, chunk_rows=4) == 20


LIMITED = """
import resource, sys
from sparsekern.data import DataError, shapes3d
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    shapes3d.write(sys.argv[1], 40)
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_limit_of_the_system_does_not_crash_hdf5(tmp_path):
    path = tmp_path / "s.h5"
    command = [sys.executable, "-c", LIMITED, path, "1000000"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run
    assert run.stdout.startswith(f"shapes3d.write: cannot write {path}: [Errno 27] File too large")
    assert not path.exists() and (parts(path) / "0.z").exists()
    assert shapes3d.write(path, 40) == 40


@pytest.mark.parametrize("name", ["d.npz", "d.h5"])
def test_saving_leaves_an_existing_file_alone_until_it_is_done(name, tmp_path, monkeypatch):
    path, images = tmp_path / name, dsprites.rendered(20)
    images.save(path)
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match=f"save: cannot write {path}: .*No space left"):
            dsprites.rendered(30).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]
    dsprites.rendered(30).save(path)
    assert len(dsprites.load(path)) == 30 and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(number, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.warns(UserWarning, match="has no locks"):
        assert dsprites.write(tmp_path / "d.npz", 20) == 20


def test_a_file_that_will_not_fit_is_not_packed(tmp_path, monkeypatch):
    path, usage = tmp_path / "s.h5", image_writing.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            image_writing.shutil, "disk_usage", lambda path: usage._replace(free=1_050_000)
        )
        message = (
            f"cannot write {path}: .*No space left on device: packing needs 1 MB, 1 MB are free"
        )
        with pytest.raises(DataError, match=message):
            shapes3d.write(path, 3)
    assert not path.exists() and not (parts(path) / "packed").exists()
    assert shapes3d.write(path, 3) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["d.txt"], "dsprites.write: path must end in .npz, .h5 or .hdf5, got "),
        (["no/d.npz"], "dsprites.write: folder not found: "),
        (["d.npz", "--images", "0"], "--images must lie in 1..737280 (the number of images), got"),
        (["d.npz", "--images", "737281"], "--images must lie in 1..737280"),
        (["d.npz", "--seed", "1"], "--seed chooses a subset and needs --images, got --seed 1"),
        (["d.npz", "--images", "5", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["d.npz", "--images", "many"], "argument --images: invalid int value: 'many'"),
    ],
)
def test_bad_flags_write_nothing(flags, message, tmp_path, capsys):
    try:
        assert main(["data", "dsprites", "--out", str(tmp_path / flags[0]), *flags[1:]]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"sparsekern: error: data dsprites: {message}")
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_write_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"shapes3d.write: path must end in .h5 or .hdf5, got"):
        shapes3d.write(tmp_path / "s.npz", 3)
    with pytest.raises(ValueError, match=r"dsprites.write: chunk_rows must be at least 1, got 0"):
        dsprites.write(tmp_path / "d.npz", 3, chunk_rows=0)
    with pytest.raises(CountError, match=r"shapes3d.write: count must lie in 1\.\.480000"):
        shapes3d.write(tmp_path / "s.h5", 480001)
    with pytest.raises(ValueError, match="write: seed must be at least 0, got -1"):
        dsprites.write(tmp_path / "d.npz", 3, seed=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module, name", FILES, ids=NAMES)
def test_the_command(module, name, tmp_path, capsys):
    path, command = tmp_path / name, module.__name__.split(".")[-1]
    flags = ["--out", str(path), "--images", "12", "--seed", "3"]
    assert main(["data", command, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{path}: 12 rendered, calibrated images, ")
    assert printed.out.count("\n") == 1 and printed.err == ""
    assert (module.load(path).images == module.rendered(12, seed=3).images).all()
    assert main(["data", command, *flags]) == 2
    assert f"{path} exists already" in capsys.readouterr().err
