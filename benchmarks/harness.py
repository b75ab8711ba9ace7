"""The harness that all benchmarks share: compile, take turns against the clock, write JSON rows at once."""

import concurrent.futures
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from tabulate import tabulate

import command_line
from ot_attention import UnsupportedError

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

GPU_WARM_UP = 0.2  # seconds until the clock rate of an idle GPU has risen
# Errors of one method or case. They cost its own row only.
FAILURES = (UnsupportedError, RuntimeError, ValueError, TypeError, ImportError)


def compile_program(function: Callable, *arguments: Any) -> tuple[jax.stages.Compiled, Row]:
    """Compile a function (jitted or not) for arrays or shapes: program, compile time (s), temporary memory (bytes)."""
    start = time.perf_counter()
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    program = jitted.lower(*arguments).compile()
    facts: Row = {"compile_s": time.perf_counter() - start}
    if memory := program.memory_analysis():
        facts["temporary_bytes"] = memory.temp_size_in_bytes
    return program, facts


def clock(calls: Mapping[Key, Callable], rounds: int, seconds: float = 0, warm_up: float = 0) -> dict[Key, list[float]]:
    """Measure the seconds of calls, which take turns so that other work on the machine slows all of them alike.

    Each is called `rounds` times, or up to ten times more until all timed calls have taken `seconds`. A call is also
    made untimed whenever another call came before it, and at the beginning, there for at least `warm_up` seconds.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    begin = time.perf_counter()
    for number in range(10 * rounds):
        if number >= rounds and sum(map(sum, times.values())) >= seconds:
            break
        for key, call in calls.items():
            if number == 0 or len(calls) > 1:
                _seconds(call)
            while time.perf_counter() - begin < warm_up:
                _seconds(call)
            times[key].append(_seconds(call))
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_threads(functions: Mapping[Key, Callable[[], Row]]) -> Iterator[tuple[Key, Row]]:
    """Run functions in threads; yield each result, or how it failed, as soon as it is there."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        keys = {pool.submit(function): key for key, function in functions.items()}
        for done in concurrent.futures.as_completed(keys):
            yield keys[done], or_failure(done.result)


def or_failure(function: Callable[[], Row]) -> Row:
    """Return the result of a function, or a row that says how it failed."""
    try:
        return function()
    except FAILURES as error:
        return {"failed": failure(error)}


def failure(error: Exception) -> str:
    """Return an exception as one line of at most 400 characters: messages of XLA quote whole programs."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def machine() -> Row:
    """Return the columns of a row that name the device and the version of JAX."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


@contextlib.contextmanager
def row_writer(path: Path, *, append: bool = False) -> Iterator[Callable[[Row], None]]:
    """Open a file of JSON rows; each row is on disk before the next one is measured.

    Rows are appended to the file, or else to PATH.part, which replaces it at the end: an interrupted run leaves an
    earlier result as it is, and its own rows there. Raises ValueError if there is no row at the end.
    """
    growing, rows = path if append else path.with_name(f"{path.name}.part"), 0
    growing.parent.mkdir(parents=True, exist_ok=True)
    with growing.open("a" if append else "w") as file:

        def write(row: Row) -> None:  # JSON has no NaN
            nonlocal rows
            finite = {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            file.write(json.dumps(finite) + "\n")
            file.flush()
            rows += 1

        yield write
    if not rows:
        raise ValueError("nothing was measured: there is no row to write")
    growing.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Read JSON rows; skip the last line if its process was killed while it wrote."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def table(rows: list[Row], columns: str) -> str:
    """Return columns (names separated by spaces; those without any value are left out) of rows as a Markdown table."""
    shown = [column for column in columns.split() if any(column in row for row in rows)]
    cells = [[_shown(column, row) for column in shown] for row in rows]
    titles = [column.replace("_", " ") for column in shown]
    return tabulate(cells, titles, tablefmt="github", disable_numparse=True) if shown else ""


def _shown(column: str, row: Row) -> str:
    value = row.get(column, "")
    if isinstance(value, float):  # in three digits
        small = column.startswith("error") and "_to_" not in column
        return f"{value:.0e}" if small else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value) if value is not None else "all" if column == "band" else ""


def parser(description: str | None, output: str, rounds: int | None = None) -> command_line.Parser:
    """Make a command line with the options that the benchmarks share."""
    made = command_line.Parser(description)
    told = "rows and tables; default: %(default)s"
    made.add_argument("--output", type=command_line.path, default=Path(output), help=told)
    if rounds:
        told, least = "timed calls a program; default: %(default)s", command_line.at_least(1)
        made.add_argument("--rounds", type=least, default=rounds, metavar="N", help=told)
    return made
