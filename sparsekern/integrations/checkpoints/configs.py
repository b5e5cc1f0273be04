"""Configs of checkpoints in JSON, and the checks that all formats share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..._system import open_plain
from .contents import WriteFile

T = TypeVar("T")


def refuse(path: Path, key: str, value: Any, rule: str) -> NoReturn:
    """Raise the error for a key in a file."""
    raise ValueError(f"{path}: {key} {rule}, got {shortened(repr(value))}")


def shortened(text: Any) -> str:
    """Return the first line of a text, or 200 characters of it."""
    line = str(text).partition("\n")[0]
    return line if len(line) <= 200 else line[:200] + "..."


def entry(metadata: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """Look up an entry of metadata, which may be anything; the default if it is no ``kind``."""
    value = metadata.get(key)
    return value if isinstance(value, kind) else default


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    with open_plain(path) as file:
        text = file.read()
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the file must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the file must hold a JSON object, got {type(config).__name__}")
    return config


def json_file(config: Mapping[str, Any]) -> WriteFile:
    """Make what writes a JSON file."""
    text = (json.dumps(config, indent=2) + "\n").encode()
    return lambda file: file.write(text)


def check_config(
    path: Path, config: Mapping[str, Any], needed: Iterable[str], known: Collection[str]
) -> None:
    """Check that a config has all that is needed and nothing that is not known."""
    for key in needed:
        if key not in config:
            raise ValueError(f"{path}: {key} is missing")
    for key, value in config.items():
        if key not in known:
            refuse(path, key, value, "is not known")


def check_options(path: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that options, where they are there, have the only values that are supported."""
    for key, value in expected.items():
        if key in config and config[key] != value:
            refuse(path, key, config[key], f"must be {value!r}, nothing else is supported")


def flag(path: Path, config: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """Look up true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        refuse(path, key, value, "must be true or false")
    return value


def choice(path: Path, config: Mapping[str, Any], key: str, known: Iterable[str]) -> str:
    """Look up one of several names."""
    value, names = config.get(key), list(known)
    if not isinstance(value, str) or value not in names:
        refuse(path, key, value, f"must be one of {', '.join(names)}")
    return value


def count(path: Path, config: Mapping[str, Any], key: str) -> int:
    """Look up an integer of at least 1."""
    value = config[key]
    if type(value) is not int or value < 1:
        refuse(path, key, value, "must be an integer of at least 1")
    return int(value)
