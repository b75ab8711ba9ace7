"""A model of time: operations of a training step, counted in its jaxpr, over the rates that a chip is sold with.

It is an upper bound of speed, not a measurement: every unit is taken to work at its full rate all the time, units
of one part overlap perfectly, elementwise chains cost no memory traffic, and starting a kernel is free.

XLA's own cost analysis counts a loop's body once and sees nothing of a kernel's inside. Here bodies of loops, grids and
shards are counted as often as they run: a `while` loop, which only Sinkhorn's steps are, as often as the number that it
counts up to, once if it only waits for a flag (scalings that left their range), and of a condition the branch of True,
which is the ordinary case wherever the kernels have one.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

# A float32 product is made of bfloat16 ones on the matrix unit: three parts of each factor, six products that matter.
_PASSES = {"HIGHEST": 6, "HIGH": 3}
_TRANSCENDENTAL = re.compile(r"exp2?|expm1|log|log1p|tanh|logistic|erf(_inv)?|rsqrt|sqrt|cbrt|sin|cos|tan|pow|div|rem")
# Layout, addressing and what the compiler folds away.
_FREE = re.compile(
    "broadcast_in_dim|reshape|transpose|squeeze|expand_dims|slice|dynamic_slice|dynamic_update_slice|concatenate|pad|iota|"
    "convert_element_type|bitcast_convert_type|copy|copy_p|stop_gradient|split|stack|tile|rev|get|swap|program_id|"
    "multiple_of|optimization_barrier|sharding_constraint|device_put|pvary|pcast|reshard|axis_index|random_.*|dma_.*"
)
_REDUCTIONS = ("reduce_", "argmax", "argmin", "cumsum", "sort", "gather")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, operations or bytes a second, and its memory in bytes.

    Attributes:
      flops: Of the matrix unit in bfloat16; `side` is that of its array, to which depths and widths are padded.
      vector: Operations of the vector unit; `transcendental` those of exp, log, division and the like.
      hbm, ici: Bandwidth to memory, and of all links to other chips together.
      memory: What the compiler lets a program have.
    """

    flops: float
    side: int
    vector: float
    transcendental: float
    hbm: float
    ici: float
    memory: int


# flops, hbm, ici: cloud.google.com/tpu/docs/{v6e,v5e,v5p}. vector: 8 x 128 lanes x 4 units x clock x cores, and
# transcendental: one such unit; clocks (1.75, 1.5, 1.75 GHz) and cores (1, 1, 2) as in jax-ml.github.io/scaling-book,
# not in Google's tables. memory: where libtpu 0.0.42 refuses to compile.
CHIPS = {
    "v6e": Chip(918e12, 256, 7.17e12, 1.79e12, 1600e9, 400e9, int(31.24 * 2**30)),
    "v5e": Chip(197e12, 128, 6.14e12, 1.54e12, 819e9, 200e9, int(15.75 * 2**30)),
    "v5p": Chip(459e12, 128, 14.3e12, 3.58e12, 2765e9, 600e9, int(95.73 * 2**30)),
}


class Matmul(NamedTuple):
    """`batch` products [m, k] x [k, n], each made of so many bfloat16 passes."""

    batch: int
    m: int
    k: int
    n: int
    passes: int

    def flops(self, side: int = 1) -> float:
        """With the depth and the better of m and n padded to the array's side; with side 1, of the plain product."""
        m, k, n = (-(-size // side) * side for size in (self.m, self.k, self.n))
        return 2.0 * self.batch * self.passes * k * min(self.m * n, m * self.n)


@dataclasses.dataclass
class Operations:
    """What a part of a step asks of the chip; matmuls with how often each is done."""

    matmuls: collections.Counter[Matmul] = dataclasses.field(default_factory=collections.Counter)
    vector: float = 0.0
    transcendental: float = 0.0
    hbm: float = 0.0  # bytes
    ici: float = 0.0  # bytes

    def flops(self, side: int = 1) -> float:
        return sum(matmul.flops(side) * times for matmul, times in self.matmuls.items())

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Of each unit of the chip; the part takes as long as the largest."""
        return {
            "matrix unit": self.flops(chip.side) / chip.flops,
            "vector unit": self.vector / chip.vector,
            "transcendental unit": self.transcendental / chip.transcendental,
            "memory": self.hbm / chip.hbm,
            "links": self.ici / chip.ici,
        }

    def divided(self, by: int) -> "Operations":
        """An equal share of the work."""
        matmuls = collections.Counter({matmul: times / by for matmul, times in self.matmuls.items()})
        rest = {name: getattr(self, name) / by for name in ("vector", "transcendental", "hbm", "ici")}
        return Operations(matmuls, **rest)  # type: ignore[arg-type]


Parts = dict[str, Operations]


def count(function: Callable, *arguments: Any) -> Parts:
    """Operations of a function of arrays or shapes, over all chips, by part.

    Parts are "forward", "backward" (what `jax.grad` added) and "update" (the rest, with the arguments and results of
    the whole function as its memory traffic), and one for each Pallas kernel by name.

    Raises:
      ValueError: a `while` loop that counts up to something not known here.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    parts: Parts = collections.defaultdict(Operations)
    _walk(closed.jaxpr, parts, "update", 1, fused=False)
    parts["update"].hbm += sum(map(_bytes, (*closed.jaxpr.invars, *closed.jaxpr.outvars)))
    return dict(parts)


def _walk(jaxpr: core.Jaxpr, parts: Parts, part: str, times: int, fused: bool) -> None:
    """Adds `times` runs of a jaxpr; `fused`: inside a kernel, where nothing goes to memory."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inner = part if fused else _part(equation, part)
        if name == "pallas_call":
            kernel = _kernel_name(parameters)
            parts[kernel].hbm += times * _traffic(equation)
            grid = math.prod(parameters["grid_mapping"].grid)
            _walk(parameters["jaxpr"], parts, kernel, times * grid, fused=True)
        elif name == "while":
            bound = _bound(parameters["cond_jaxpr"].jaxpr)
            body = parameters["body_jaxpr"].jaxpr
            # A loop around one with the same bound shares its counter: the inner does all the steps.
            shared = bound in (_bound(x.params["cond_jaxpr"].jaxpr) for x in _equations(body, "while"))
            _walk(body, parts, inner, times * (1 if shared else bound), fused)
        elif name == "cond":
            _walk(parameters["branches"][-1].jaxpr, parts, inner, times, fused)
        elif name.startswith("scatter"):
            parts[inner].vector += times * _size(equation.invars[-1])
            parts[inner].hbm += times * (0 if fused else _traffic(equation))
        elif bodies := list(_bodies(equation)):
            repeated = parameters["length"] if name == "scan" else 1
            if name == "shard_map":
                repeated = math.prod(parameters["mesh"].shape.values())
            for body in bodies:
                _walk(body, parts, inner, times * repeated, fused)
        else:
            _add(equation, parts[inner], times, fused)


def _add(equation: core.JaxprEqn, to: Operations, times: int, fused: bool) -> None:
    """One equation without a body; what is not elementwise goes through memory."""
    name, size = equation.primitive.name, max((_size(x) for x in equation.outvars), default=0)
    if _FREE.fullmatch(name):
        return
    if _TRANSCENDENTAL.fullmatch(name):
        to.transcendental += times * size
        return
    if name == "dot_general":
        to.matmuls[_dot(equation)] += times
    elif name == "conv_general_dilated":
        to.matmuls[_convolution(equation)] += times
    elif name.startswith(_REDUCTIONS):
        to.vector += times * max(_size(x) for x in (*equation.invars, *equation.outvars))
    else:
        to.vector += times * size
        return
    if not fused:
        to.hbm += times * _traffic(equation)


def _dot(equation: core.JaxprEqn) -> Matmul:
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    x, y = (v.aval.shape for v in equation.invars)
    k, batches = (math.prod(x[i] for i in axes) for axes in (contract, batch))
    m, n = (math.prod(shape) // (k * batches) for shape in (x, y))
    return Matmul(batches, m, k, n, _passes(equation))


def _convolution(equation: core.JaxprEqn) -> Matmul:
    """As a product of patches with the kernel; products with padding count too."""
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    outputs = kernel[numbers.rhs_spec[0]]
    return Matmul(1, _size(equation.outvars[0]) // outputs, math.prod(kernel) // outputs, outputs, _passes(equation))


def _passes(equation: core.JaxprEqn) -> int:
    if equation.invars[0].aval.dtype.itemsize < 4:
        return 1
    found = re.search(r"HIGHEST|HIGH", str(equation.params["precision"]))
    return _PASSES[found.group()] if found else 1


def _part(equation: core.JaxprEqn, outer: str) -> str:
    """By the transformations that made an equation; those of a body are named relative to what holds it."""
    stack = str(equation.source_info.name_stack)
    if outer == "backward" or "transpose(" in stack:
        return "backward"
    return "forward" if "jvp(" in stack else outer


def _kernel_name(parameters: dict) -> str:
    return str(getattr(parameters.get("name_and_src_info"), "name", parameters.get("name")))


def _bound(condition: core.Jaxpr) -> int:
    """The number that a loop's counter is compared with; 1 if it has none."""
    for equation in condition.eqns:
        if equation.primitive.name == "lt":
            if isinstance(equation.invars[1], core.Literal):
                return int(equation.invars[1].val)  # type: ignore[call-overload]
            raise ValueError(f"a while loop counts up to a variable, so its steps cannot be counted: {condition}")
    return 1


def _equations(jaxpr: core.Jaxpr, name: str) -> Iterator[core.JaxprEqn]:
    """All of one primitive, in bodies too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for body in _bodies(equation):
            yield from _equations(body, name)


def _bodies(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for body in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(body, core.ClosedJaxpr):
                yield body.jaxpr
            elif isinstance(body, core.Jaxpr):
                yield body


def _traffic(equation: core.JaxprEqn) -> int:
    return sum(map(_bytes, (*equation.invars, *equation.outvars)))


def _bytes(variable) -> int:
    return _size(variable) * variable.aval.dtype.itemsize if hasattr(variable.aval, "dtype") else 0


def _size(variable) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


# ---- collectives, which only the compiled program has ----

_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<result>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")


class Collective(NamedTuple):
    """One kind of exchange in a compiled program: how often, bytes of its results, and bytes a chip sends for them."""

    kind: str
    count: int
    bytes: int
    sent: float


def collectives(text: str, chips: int) -> list[Collective]:
    """Those of a compiled program's text (`compiled.as_text()`), for one run, by kind."""
    found: dict[str, list[tuple[int, float]]] = {}
    for match in _COLLECTIVE.finditer(text):
        kind, line = match["kind"], text[match.start() : text.index("\n", match.end())]
        size = _result_bytes(match["result"], kind, bool(match["start"]))
        found.setdefault(kind, []).append((size, _sent(kind, size, _group_size(line, chips))))
    return [Collective(kind, len(of), sum(x for x, _ in of), sum(x for _, x in of)) for kind, of in found.items()]


def _result_bytes(result: str, kind: str, started: bool) -> int:
    """Of `f32[8,128]{1,0:T(8,128)}` or a tuple; a started gather's or permute's tuple begins with what goes in."""
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
    return len(found[1].split(",")) if found[1] else int(found[2])


def _sent(kind: str, size: int, group: int) -> float:
    """Bytes that each chip of a ring sends (all-reduce: a reduce-scatter, then an all-gather)."""
    share = (group - 1) / group
    return {"all-reduce": 2 * share * size, "reduce-scatter": (group - 1) * size, "collective-permute": size}.get(
        kind, share * size
    )


# ---- time ----


class PartTime(NamedTuple):
    seconds: float
    bound: str  # the unit that takes longest


def step_time(parts: Parts, exchanged: list[Collective], chip: Chip, *, data: int, model: int) -> dict[str, PartTime]:
    """Time of each part of a step on a mesh of `data` x `model` chips; the step is their sum.

    Work on the batch is divided by all chips, which for `model` assumes a perfect split; the update is the same on
    every chip of the data axis.
    """
    shares = {name: of.divided(model if name == "update" else data * model) for name, of in parts.items()}
    shares["exchange"] = Operations(ici=sum(of.sent for of in exchanged))
    times = {}
    for name, share in shares.items():
        seconds = share.seconds(chip)
        bound = max(seconds, key=seconds.__getitem__)
        times[name] = PartTime(seconds[bound], bound)
    return times
