"""A model of time: the operations of a training step (benchmarks/counting.py) over the rates that a chip is sold with.

The model is an upper bound of speed, not a measurement. Every unit works at its full rate all the time, units overlap
perfectly within a part, elementwise chains cost no memory traffic, and starting a kernel is free.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from benchmarks.counting import Operations, Parts


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, operations or bytes a second."""

    flops: float  # of the matrix unit in bfloat16
    side: int  # of its array, to which depths and widths are padded
    vector: float
    transcendental: float  # exp, log, division and the like
    hbm: float  # to memory
    ici: float  # to other chips, all links together
    memory: int  # bytes that the compiler lets a program have


# flops, hbm, ici: cloud.google.com/tpu/docs/{v6e,v5e,v5p}. vector: 8 x 128 lanes x 4 units x clock x cores, and
# transcendental: one such unit; clocks (1.75, 1.5, 1.75 GHz) and cores (1, 1, 2) as in jax-ml.github.io/scaling-book,
# not in Google's tables. memory: where libtpu 0.0.42 refuses to compile.
CHIPS = {
    "v6e": Chip(918e12, 256, 7.17e12, 1.79e12, 1600e9, 400e9, int(31.24 * 2**30)),
    "v5e": Chip(197e12, 128, 6.14e12, 1.54e12, 819e9, 200e9, int(15.75 * 2**30)),
    "v5p": Chip(459e12, 128, 14.3e12, 3.58e12, 2765e9, 600e9, int(95.73 * 2**30)),
}
_UNITS = {"vector unit": "vector", "transcendental unit": "transcendental", "memory": "hbm", "links": "ici"}
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (?P<result>\S.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
# {{0,1},{2,3}}, [4,2]<=[8] and mesh['a'=4,'b'=2] {'b'} are all groups of two.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|\S*mesh\S*\[([^\]]*)\] *\{([^}]*)\})")


class Collective(NamedTuple):
    """Exchanges of one kind in a compiled program: their number, bytes of results, bytes that a chip sends for them."""

    kind: str
    number: int
    bytes: int
    sent: int | float


def collectives(text: str, chips: int) -> list[Collective]:
    """Find the exchanges in a compiled program's text (`compiled.as_text()`), for one run, by kind."""
    found: dict[str, list[tuple[int, float]]] = {}
    for match in _COLLECTIVE.finditer(text):
        kind, line = match["kind"], text[match.start() : text.index("\n", match.end())]
        size, group = _result_bytes(match["result"], kind, bool(match["start"])), _group_size(line, chips)
        # Each chip of a ring sends `share` (all-reduce: a reduce-scatter, then an all-gather).
        share = (group - 1) / group * size
        others = {"all-reduce": 2 * share, "reduce-scatter": (group - 1) * size, "collective-permute": size}
        found.setdefault(kind, []).append((size, others.get(kind, share)))
    return [Collective(kind, len(of), *map(sum, zip(*of, strict=True))) for kind, of in found.items()]


def _result_bytes(result: str, kind: str, started: bool) -> int:
    """Return the bytes of `f32[8,128]{1,0:T(8,128)}` or of a tuple; tuples of -start begin with the inputs."""
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) * max(1, int(re.sub(r"\D", "", dtype) or 8) // 8)
        for dtype, shape in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", result))
    ]
    if started and kind == "collective-permute":
        return sizes[1]
    return sum(sizes) - (sum(sizes[: len(sizes) // 2]) if started and kind == "all-gather" else 0)


def _group_size(line: str, chips: int) -> int:
    found = _GROUPS.search(line)
    if not found:
        return chips
    listed, size, axes, among = found.groups()
    if axes is not None:
        sizes = dict(axis.split("=") for axis in axes.split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in among.split(","))
    return len(listed.split(",")) if listed else int(size)


class PartTime(NamedTuple):
    """Time of a part, and the unit of the chip that takes longest."""

    seconds: float
    bound: str


def step_time(parts: Parts, exchanged: list[Collective], chip: Chip, *, data: int, model: int) -> dict[str, PartTime]:
    """Compute the time of each part of a step on a mesh of `data` x `model` chips; the step is their sum."""
    # Work on the batch is divided by all chips: for `model`, a perfect split. The update is the same along `data`.
    times = {}
    for name, work in (parts | {"exchange": Operations(ici=sum(of.sent for of in exchanged))}).items():
        seconds = {unit: getattr(work, of) / getattr(chip, of) for unit, of in _UNITS.items()}
        seconds["matrix unit"] = work.flops(chip.side) / chip.flops
        chips = {"update": model, "exchange": 1}.get(name, data * model)
        times[name] = max(PartTime(time / chips, unit) for unit, time in seconds.items())
    return times
