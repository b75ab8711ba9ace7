"""Run a program from the command line: options that all have, one line for a user's mistake, exit status.

def main(arguments=None) -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--output", type=command_line.path)
    args = parser.parse_args(arguments)
    return command_line.run(parser.prog, lambda: work(args), debug=args.debug)
"""

import argparse
import contextlib
import itertools
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data import files

if TYPE_CHECKING:
    from ml_collections import ConfigDict

UNUSABLE = 1  # input, data, a setting, memory or a file cannot be used; one line on stderr says why
WRONG_COMMAND_LINE = 2  # argparse's own
FAULT = 70  # of the program itself; EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # by Ctrl-C, as shells say it
EXIT_STATUS = f"""exit status: 0; {UNUSABLE} if input or settings cannot be used (one line says why; --debug shows
where); {WRONG_COMMAND_LINE} for a wrong command line; {FAULT} for a fault of the program; {INTERRUPTED} after Ctrl-C"""
MISTAKES = (ValueError, OSError, ImportError, MemoryError)  # errors that a user can mend
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # of XLA
_ACCELERATOR = {"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_WORKER_HOSTNAMES": "localhost"}  # for libtpu without a TPU
_MARKS = _OUT_OF_MEMORY, "Unable to initialize backend"  # the second is JAX's, for a platform that is not there


class Parser(argparse.ArgumentParser):
    """Parser of a program: its docstring is the help, with the exit status below; --version, --debug and --threads."""

    def __init__(self, description: str | None, *, threads: bool = False, **options):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, epilog=EXIT_STATUS, **options)
        self.add_argument("--version", action=_Version, help="show the version and exit")
        self.add_argument("--debug", action="store_true", help="show where an error arose")
        if threads:
            self.add_argument("--threads", type=at_least(1), metavar="N", help="CPU cores to use; default: all")


@contextlib.contextmanager
def warnings_in_lines(program: str, *, quiet: bool = False) -> Iterator[None]:
    """Show each warning as one line on stderr, or none if `quiet`."""

    def show(message, *_, **__) -> None:
        if not quiet:
            print(f"{program}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


class _Version(argparse.Action):
    """Print the version, whose import takes a second, only when it is asked for."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, *_):
        print(f"{parser.prog} {version()}")
        parser.exit()


def version() -> str:
    """Return the version of this repository."""
    import ot_attention

    return ot_attention.__version__


def path(text: str) -> Path:
    """Return a path given on the command line, with `~` as the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path was given")  # of a variable without value; "." is not meant
    try:
        return Path(files.expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_name(text: str) -> str:
    """Return a path as text; "-", a standard stream, stays."""
    return str(path(text))


def parse_with_config(parser: Parser, arguments: Sequence[str] | None) -> "tuple[argparse.Namespace, ConfigDict]":
    """Return a program's own options, and the configuration that --config and all --config.KEY=VALUE describe."""
    from absl import flags
    from ml_collections import config_flags

    args, rest = parser.parse_known_args(arguments)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    line, given = [parser.prog, *config_with_home(rest)[0]], sys.argv
    try:
        sys.argv = line  # where ml_collections looks for the keys that are set
        unknown = values(line)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    finally:
        sys.argv = given
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if values.config is None:
        parser.error("--config is missing, for example --config=configs/r2_balanced.py")
    return args, values.config


def config_with_home(argv: list[str]) -> tuple[list[str], str | None]:
    """Return the command line with `~` of --config as the home folder, and the value of --config."""
    argv, given = list(argv), None
    for n, argument in enumerate(argv):
        if found := re.fullmatch(r"(--?config=)(.*)", argument):
            given = os.path.expanduser(found[2])  # noqa: PTH111  # may have a colon and an argument behind the path
            argv[n] = found[1] + given
        elif n and argv[n - 1] in ("--config", "-config"):
            argv[n] = given = os.path.expanduser(argument)  # noqa: PTH111
    return argv, given


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number of this size or more."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} was given, allowed is {least} or more")
        return int(text)

    return whole_number


def positive(text: str) -> float:
    """Return an option that is a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} was given, it must be above 0")
    return number


def run(
    program: str,
    work: Callable[[], int | None],
    *,
    debug: bool = False,
    threads: int | None = None,
    also: tuple[type[BaseException], ...] = (),
) -> int:
    """Do the work of a program, and return its exit status.

    One line on stderr tells a mistake: an error of `MISTAKES` or `also`, XLA's for too little memory, or JAX's for a
    platform that is not there. With `debug`, the traceback comes before it. Any other error is a fault of the program,
    whose traceback is always shown. `threads` is the number of CPU cores to use, None for all.
    """
    _silence_libtpu()
    try:
        _use_threads(threads)
        return work() or 0
    except BrokenPipeError:  # the reader has seen enough; what is left in the buffer must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return failed(program, "interrupted", INTERRUPTED)
    except Exception as error:
        is_mistake = isinstance(error, (*MISTAKES, *also)) or any(mark in str(error) for mark in _MARKS)
        if debug or not is_mistake:
            traceback.print_exc()
        if is_mistake:
            return failed(program, message(error), UNUSABLE)
        return failed(program, f"a fault of the program, please report it: {message(error)}", FAULT)


def _use_threads(count: int | None) -> None:
    """Restrict this process, and processes that it starts, to this many CPU cores. JAX must not have run before.

    Libraries count the cores that a process may use, and start as many threads.
    """
    if count is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"--threads={count}: this system cannot restrict a process to some cores; leave it out")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _silence_libtpu() -> None:
    """Name an accelerator to libtpu where there is none.

    JAX loads libtpu, where it is installed, when it first computes. Without a TPU, libtpu looks for the name of one,
    and complains in five lines on stderr; with a name it finds in silence that there is no device. JAX then takes
    another one as before. What the user has set stays.
    """
    if not any(itertools.chain(Path("/dev").glob("accel[0-9]*"), Path("/dev/vfio").glob("[0-9]*"))):
        for name, value in _ACCELERATOR.items():
            os.environ.setdefault(name, value)


def failed(program: str, text: str, status: int) -> int:
    """Tell in one line on stderr why a program ends, and return its exit status."""
    with contextlib.suppress(OSError):  # a pipe that nobody reads, a terminal that was closed
        print(f"{program}: {text}", file=sys.stderr)
    return status


def message(error: BaseException) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY in text:
        return f"not enough memory ({text or 'no more could be had'}): give smaller input, batches or bands"
    return text or type(error).__name__
