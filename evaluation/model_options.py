"""Options that name a trained model, the same in every program that takes one."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import logging

import command_line

if TYPE_CHECKING:
    from evaluation.runs import Run


def add_model_options(parser: argparse.ArgumentParser, *, default: str = "", asap: bool = True) -> None:
    """Add --workdir, --weights and --step, and --asap if the program takes maps.

    `default` tells in the help what is taken if no model is named; one must be named if it is empty.
    """
    model = parser.add_mutually_exclusive_group(required=not default)
    model.add_argument(
        "--workdir", type=command_line.path, metavar="RUN", help="a run: its folder, as given to train.py"
    )
    told = "instead of a run: weights alone" + (f"; default: {default}" if default else "")
    model.add_argument("--weights", type=command_line.path, metavar="FILE.safetensors", help=told)
    at_least = command_line.at_least(0)
    parser.add_argument("--step", type=at_least, metavar="N", help="which checkpoint of the run; default: the newest")
    if asap:
        told = "maps of scripts/compile_asap.py in place of the model's Sinkhorn steps"
        parser.add_argument("--asap", type=command_line.path, metavar="FILE", help=told)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line with model options."""
    args = parser.parse_args(arguments)
    if args.step is not None and not args.workdir:
        parser.error("--step chooses a checkpoint of --workdir; --weights holds a single step")
    return args


def load(args: argparse.Namespace) -> "Run":
    """Load the model that the options name. Raises ValueError or OSError."""
    from evaluation import runs  # takes seconds: errors of the command line appear at once

    logging.set_verbosity(logging.ERROR)  # Orbax warns that what it reads is read-only
    run = runs.load_run(args.workdir, args.step) if args.workdir else runs.load_weights(args.weights)
    maps = getattr(args, "asap", None)
    return runs.with_asap(run, maps) if maps else run
