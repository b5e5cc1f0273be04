"""The commands ``sparsekern train`` and ``sparsekern eval``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import typing
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

# Study -> what its command says about it.
STUDIES = {
    "vae-sae": (
        "VAE with a top-k sparse layer on dSprites",
        (
            "Trains the VAE-SAE hybrid on dSprites while k falls from 500 to 50. Without arguments "
            "it renders a dSprites-compatible subset and takes a few minutes on two cores."
        ),
    ),
    "sae": (
        "sparse autoencoder on stored activations",
        (
            "Trains a sparse autoencoder on files of activations; 'sparsekern data "
            "activations' makes such files."
        ),
    ),
    "sparling": (
        "motifs found by extreme activation sparsity",
        (
            "Trains a local network, a bottleneck of extreme sparsity and a readout end to end on "
            "inputs labelled with sequences of symbols, while the bottleneck's density falls, and "
            "measures whether its activations are the motifs. Without arguments it takes minutes."
        ),
    ),
}


def add_train(commands: Any) -> None:
    """Adds ``train`` to the commands of a parser."""
    training = commands.add_parser("train", help="train the model of a study")
    studies = training.add_subparsers(title="studies", metavar="STUDY", required=True)
    for name, (help, description) in STUDIES.items():
        _add_study(studies, name, help, description)


def add_eval(commands: Any) -> None:
    """Adds ``eval`` to the commands of a parser."""
    parser = commands.add_parser(
        "eval", help="measure a trained sparse autoencoder", allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run of 'train sae'")
    parser.add_argument(
        "--activations", metavar="FILE", nargs="+", default=[], help="instead of the run's own"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.set_defaults(function=_eval, command="eval")


def _study(name: str) -> Any:
    """The module of a study: its Config, PRESETS, FILES, run, table and saved_config."""
    return importlib.import_module(f"sparsekern.studies.{name.replace('-', '_')}")


def _add_study(studies: Any, name: str, help: str, description: str) -> None:
    study = _study(name)
    # An absent flag is absent, so that --resume can tell it from one given with its default.
    parser = studies.add_parser(
        name, help=help, description=description, argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )  # fmt: skip
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", metavar="RUN", help=f"folder of the new run; by default runs/{name}-<date>-<time>"
    )
    place.add_argument("--resume", metavar="RUN", help="folder of an interrupted run to go on with")
    if len(study.PRESETS) > 1:
        parser.add_argument(
            "--preset",
            choices=tuple(study.PRESETS),
            help="settings to start from; flags override them (default: default)",
        )
    kinds = typing.get_type_hints(study.Config)
    for item in fields(study.Config):
        _add_flag(parser, item, kinds[item.name])
    parser.set_defaults(function=_train, command=f"train {name}", study=name)


def _add_flag(parser: argparse.ArgumentParser, item: Field, kind: Any) -> None:
    """Makes a flag of a config field: its name, type, default and documentation."""
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
        choices=item.metadata.get("choices"),
        metavar=item.metadata.get("metavar"),
        help=text,
    )


def _train(options: argparse.Namespace) -> int:
    study = _study(options.study)
    given = {
        item.name: getattr(options, item.name)
        for item in fields(study.Config)
        if hasattr(options, item.name)
    }
    resume = getattr(options, "resume", None)
    preset = getattr(options, "preset", None)
    if resume is None:
        config = study.Config(**{**study.PRESETS[preset or "default"], **given})
        out = getattr(options, "out", None)
        out = out or time.strftime(f"runs/{options.study}-%Y%m%d-%H%M%S")
    elif preset is not None:
        raise ValueError("--preset belongs to a new run: a resumed one keeps its settings")
    else:
        config, out = _resumed_config(study.saved_config(resume), given, resume), resume
    report = study.run(config, out, resume=resume is not None)
    # What a shell gives a process that the signal ended.
    signal = report.outcome.signal
    status = 0 if signal is None else 128 + signal
    if report.results is None:
        sys.stdout.write(
            f"interrupted after step {report.outcome.step}; everything is saved. Go on with:\n"
            f"  sparsekern train {options.study} --resume {out}\n"
        )
        return status
    sys.stdout.write(study.table(report.results, config) + "\n")
    sys.stdout.write(f"run folder {Path(out)}: {', '.join(study.FILES)}\n")
    return status


def _resumed_config(saved: Any, given: dict[str, Any], folder: str) -> Any:
    """The saved config with the given free fields; any other difference is an error."""
    fixed = saved.identity()
    for name, value in given.items():
        if name in fixed and fixed[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{folder} was started with {flag} {fixed[name]}, it cannot be resumed with {value}"
            )
    return replace(saved, **given)


def _eval(options: argparse.Namespace) -> int:
    study = _study("sae")
    measured = study.evaluate_run(options.run, tuple(options.activations), device=options.device)
    sys.stdout.write(study.measurements(measured, f"checkpoint of {options.run}") + "\n")
    return 0
