"""The folder of a reproduction: who writes in it, what it was asked for, and settings in words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..._system import lock_file, open_plain
from ...training import RunError

REQUEST = "reproduction.json"
LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep others from writing a report in it.

    Raises:
        RunError: another process does, or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise RunError(f"--out must be a folder, got the file {folder}") from error
    except OSError as error:
        raise RunError(f"--out cannot be written: {folder} ({error.strerror})") from error
    try:
        unlock = lock_file(folder / LOCK)
    except OSError as error:
        raise RunError(f"--out cannot be written: {folder} ({error.strerror})") from error
    if unlock is None:
        raise RunError(f"another process is writing the report in {folder}")
    try:
        yield
    finally:
        unlock()


def merged_request(
    new: dict[str, Any], folder: Path, *, fixed: Sequence[str], lists: Sequence[str]
) -> dict[str, Any]:
    """Join a request to earlier ones in the folder, in JSON types; see :func:`calls_of`.

    Args:
        new: the request, with seeds, a number.
        folder: of the reproduction.
        fixed: what must be as it was.
        lists: what may be added to.

    Raises:
        RunError: the folder holds something else.
    """
    path = folder / REQUEST
    if not path.exists():
        strangers = [path.name for path in folder.iterdir() if path.name not in (LOCK, ".new")]
        if strangers:
            raise RunError(f"folder is not empty: {folder} holds {sorted(strangers)[0]}")
        return new
    try:
        with open_plain(path) as file:
            old = json.loads(file.read())
        for name in fixed:
            if old[name] != new[name]:
                raise RunError(
                    f"{folder} holds a reproduction with {name} {old[name]!r}, not {new[name]!r}: "
                    "name another folder"
                )
        parts = (*lists, "seeds")
        calls = [{part: call[part] for part in parts} for call in (*calls_of(old), new)]
        for name in lists:
            new[name] = list(dict.fromkeys([*old[name], *new[name]]))
        new["seeds"] = max(old["seeds"], new["seeds"])
        last = {tuple(map(str, call.values())): call for call in calls}.values()
        calls = [call for call in last if not any(_covers(other, call, lists) for other in last)]
        if len(calls) > 1:
            new["calls"] = calls
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return new


def calls_of(asked: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the calls that asked for something: a grid each, whose cells together are all.

    Calls that a later one covers are left out.
    """
    return asked.get("calls") or [asked]


def _covers(one: Mapping[str, Any], other: Mapping[str, Any], lists: Sequence[str]) -> bool:
    """Tell whether one call asks for everything that another one does."""
    wider = all(set(one[name]) >= set(other[name]) for name in lists)
    return one is not other and wider and one["seeds"] >= other["seeds"]


def parsed_settings(
    settings: Sequence[str], kinds: Mapping[str, Any], taken: Collection[str]
) -> dict[str, Any]:
    """Parse NAME=VALUE pairs as fields of a config.

    Args:
        settings: in the words of the command line.
        kinds: type of each field.
        taken: fields that the grid sets.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or a field that the grid sets.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in kinds or name in taken:
            known = ", ".join(sorted(set(kinds) - set(taken)))
            raise ValueError(f"--set must be NAME=VALUE with NAME one of {known}, got {setting!r}")
        if name in parsed:
            raise ValueError(f"--set must name each setting once, got {name} twice")
        try:
            parsed[name] = _parse_value(kinds[name], text)
        except ValueError:
            raise ValueError(f"--set {name} must be {kinds[name].__name__}, got {text!r}") from None
    return parsed


def _parse_value(kind: Any, text: str) -> Any:
    """Parse a value of a field's type."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


def table_bytes(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Write CSV in UTF-8 with a head of all columns, in the order in which rows name them first."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def checked_names(option: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Check names and drop repetitions.

    Raises:
        ValueError: one is unknown.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be among {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))
