"""Configs of studies: documented fields that become flags, and their checks."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

AnyConfig = TypeVar("AnyConfig", bound="StudyConfig")


class SettingError(ValueError):
    """A field of a config has a value that it cannot have.

    Args:
        setting: name of the field.
        rule: what it must be, and what it is; the message is both.
    """

    def __init__(self, setting: str, rule: str) -> None:
        super().__init__(f"{setting} {rule}")
        self.setting, self.rule = setting, rule


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a config field with its documentation, which is also the help of its flag."""
    return field(default=default, metadata={"help": help, **metadata})


def backend_option() -> Any:
    """Declare the field of the implementation to use."""
    return option(
        "auto",
        "implementation of the sparse operations",
        choices=("auto", "reference", "native", "triton"),
    )


def device_option() -> Any:
    """Declare the field of the device to run on."""
    return option("auto", "cpu, cuda, or auto: cuda when there is one", metavar="DEVICE")


def check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(name, f"must be finite, got {value}")


@dataclass(frozen=True)
class StudyConfig:
    """Base of the studies' configs.

    Fields marked free may change when a run is resumed, those marked extends may grow; those marked
    path name files or folders.
    """

    def _check(self, name: str, fits: bool, condition: str) -> None:
        """Raise SettingError where a field does not fit its rule."""
        if not fits:
            raise SettingError(name, f"{condition}, got {getattr(self, name)}")

    def _check_choices(self) -> None:
        """Raise SettingError where a field is none of its choices."""
        for item in fields(self):
            choices = item.metadata.get("choices")
            fits = choices is None or getattr(self, item.name) in choices
            self._check(item.name, fits, f"must be one of {', '.join(map(str, choices or ()))}")

    def without_effect(self) -> dict[str, str]:
        """Name the fields that change nothing beside the values of others, and why.

        Who asks for them has made a mistake.
        """
        return {}

    def identity(self) -> dict[str, Any]:
        """Collect the fields that must be equal when a run is resumed."""
        free = {item.name for item in fields(self) if item.metadata.get("free")}
        return {name: value for name, value in asdict(self).items() if name not in free}


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """Make the config's paths absolute, so that they hold in every folder."""
    changes: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("path") and value:
            several = not isinstance(value, str)
            changes[item.name] = (
                tuple(map(os.path.abspath, value)) if several else os.path.abspath(value)
            )
    return replace(config, **changes)
