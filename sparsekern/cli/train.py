"""The commands ``sparsekern train`` and ``sparsekern eval``."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import typing
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

from ..studies import sae
from ..studies.configs import SettingError, with_absolute_paths
from ..studies.loggers import TARGETS, logged_to
from ..studies.processes import is_first_process, process_count, was_restarted
from ..studies.registry import STUDIES
from ..studies.runs import out_folder
from ..studies.study import Study
from ..training import RunError


def add_train(commands: Any) -> None:
    """Add ``train`` to the commands of a parser."""
    training = commands.add_parser("train", help="train the model of a study")
    studies = training.add_subparsers(title="studies", metavar="STUDY", required=True)
    for study in STUDIES.values():
        _add_study(studies, study)


def add_eval(commands: Any) -> None:
    """Add ``eval`` to the commands of a parser."""
    parser = commands.add_parser(
        "eval",
        help="measure trained sparse autoencoders",
        description="Measures runs of 'train sae'; those of several are printed as one table.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run of 'train sae'")
    parser.add_argument(
        "--activations",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="instead of the runs' own",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.set_defaults(function=_eval, command="eval")


def _add_study(studies: Any, study: Study) -> None:
    """Add a study to those that can be trained."""
    # An absent flag is absent, so that --resume can tell it from one given with its default.
    parser = studies.add_parser(
        study.name, help=study.help, description=study.description,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    folder_flags = parser.add_mutually_exclusive_group()
    folder_flags.add_argument(
        "--out",
        metavar="RUN",
        help=f"folder of the new run; by default runs/{study.name}-<date>-<time>",
    )
    folder_flags.add_argument(
        "--resume", metavar="RUN", help="folder of an interrupted run to go on with"
    )
    parser.add_argument(
        "--log-to",
        choices=TARGETS,
        help="send every logged number to tensorboard (files in the run folder) or wandb, too",
    )
    if study.several_processes:
        parser.add_argument(
            "--mesh",
            metavar="MESH",
            help="how the processes of torchrun share the work, such as data=1,latents=2: along "
            "the rows of a batch and along the latents (default: all along the latents); a run "
            "can be resumed with another",
        )
    if len(study.presets) > 1:
        parser.add_argument(
            "--preset",
            choices=tuple(study.presets),
            help="settings to start from; flags override them (default: default)",
        )
    kinds = typing.get_type_hints(study.config)
    for item in fields(study.config):
        _add_flag(parser, item, kinds[item.name])
    parser.set_defaults(function=_train, command=f"train {study.name}", study=study.name)


def _add_flag(parser: argparse.ArgumentParser, item: Field[Any], kind: Any) -> None:
    """Make a flag of a config field: its name, type, default and documentation."""
    flag = "--" + item.name.replace("_", "-")
    text = item.metadata["help"]
    several = typing.get_origin(kind) is tuple
    if item.default is not MISSING and item.default is not None and not several:
        text += f" (default: {item.default})"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    parts = [k for k in typing.get_args(kind) if k not in (type(None), Ellipsis)]
    parser.add_argument(
        flag,
        type=parts[0] if parts else kind,
        nargs="+" if several else None,
        # A flag that is repeated adds to itself.
        action="extend" if several else "store",
        choices=item.metadata.get("choices"),
        metavar=item.metadata.get("metavar"),
        help=text,
    )


def _train(options: argparse.Namespace) -> int:
    """Train, or go on with a run; return the exit status."""
    study = STUDIES[options.study]
    flags = {
        item.name: getattr(options, item.name)
        for item in fields(study.config)
        if hasattr(options, item.name)
    }
    resume, given = getattr(options, "resume", None), getattr(options, "out", None)
    if study.several_processes and process_count() > 1 and not (resume or given):
        raise ValueError(
            "--out must name a folder where torchrun starts several processes, which share it"
        )
    preset = getattr(options, "preset", None)
    with contextlib.ExitStack() as stack:
        extras: dict[str, Any] = {}
        if resume is None:
            config = study.config(**{**study.presets[preset or "default"], **flags})
            unused = config.without_effect()
            for name in flags.keys() & unused.keys():
                raise SettingError(name, f"has no effect {unused[name]}")
            out = stack.enter_context(out_folder(given, options.study))
            if was_restarted() and _holds_run_of(out, study, config):
                resume = str(out)
        elif resume == "":
            raise ValueError("--resume must name a folder, got an empty name")
        elif preset is not None:
            raise ValueError("--preset belongs to a new run: a resumed one keeps its settings")
        else:
            saved, out = study.saved_config(resume), Path(resume)
            config = _resumed_config(saved, flags, resume)
            if any(item.metadata.get("extends") for item in fields(study.config)):
                extras = {"extend": bool(flags.keys() & _fields_that_may_grow(saved))}
        if target := getattr(options, "log_to", None):
            extras["on_metrics"] = stack.enter_context(logged_to(target, out, config))
        if study.several_processes:
            extras["mesh"] = getattr(options, "mesh", None)
        report = study.run(config, out, resume=resume is not None, **extras)
    # What a shell gives a process that the signal ended.
    signal = report.outcome.signal
    status = 0 if signal is None else 128 + signal
    if not is_first_process():
        return status
    if report.results is None:
        sys.stdout.write(
            f"interrupted after step {report.outcome.step}; everything is saved. Go on with:\n"
            f"  sparsekern train {options.study} --resume {shlex.quote(str(out))}\n"
        )
        return status
    sys.stdout.write(study.table(report.results, config) + "\n")
    sys.stdout.write(f"run folder {out}: {', '.join(study.files)}\n")
    return status


def _holds_run_of(folder: Path, study: Study, config: Any) -> bool:
    """Tell whether a folder holds a run with these settings: that which torchrun starts again."""
    try:
        saved = study.saved_config(folder)
    except RunError:
        return False
    same: bool = saved.identity() == with_absolute_paths(config).identity()
    return same


def _fields_that_may_grow(saved: Any) -> set[str]:
    """Name the fields that may grow when a run is resumed."""
    return {item.name for item in fields(saved) if item.metadata.get("extends")}


def _resumed_config(saved: Any, flags: dict[str, Any], folder: str) -> Any:
    """Change the free fields of a saved config as given; any other difference is an error."""
    fixed = saved.identity()
    resumed = with_absolute_paths(replace(saved, **flags))
    for name in flags:
        saved_value, value = getattr(saved, name), getattr(resumed, name)
        free = name not in fixed and name != "init_from"
        grown = name in _fields_that_may_grow(saved) and value > saved_value
        if free or grown or value == saved_value:
            continue
        flag = "--" + name.replace("_", "-")
        raise ValueError(
            f"{folder} was started with {flag} {saved_value}, it cannot be resumed with {value}"
        )
    return resumed


def _eval(options: argparse.Namespace) -> int:
    """Measure runs and print the results."""
    measured = {
        run: sae.evaluate_run(run, tuple(options.activations), device=options.device)
        for run in dict.fromkeys(options.runs)
    }
    if len(measured) == 1:
        [(run, measurements)] = measured.items()
        sys.stdout.write(sae.measurements(measurements, f"checkpoint of {run}") + "\n")
    else:
        sys.stdout.write(sae.comparison(measured) + "\n")
    return 0
