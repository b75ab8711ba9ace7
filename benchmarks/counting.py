"""Count the operations of a function on a chip, by walking its jaxpr with the integers that steer its loops.

XLA's own cost analysis counts the body of a loop once and sees nothing inside a kernel. Here integers are computed as
far as they follow from arguments that are given as values (lengths of sequences). Every loop over Sinkhorn steps, over
groups of a kernel and over their tiles runs as often as on the chip, and every condition on integers takes its branch.
Values that depend on data are unknown. An unknown condition counts as true: the ordinary case (scalings within their
range) wherever the attention has one.
"""

import collections
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
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
# Exchanges between devices inside `shard_map`. Others, which the partitioner makes, are in the compiled text alone.
_EXCHANGES = re.compile("ppermute|psum.*|pmax|pmin|all_gather.*|all_to_all|reduce_scatter")
_REDUCTIONS = ("reduce_", "argmax", "argmin", "cumsum", "sort", "gather", "scatter")
_FIRST_OF_ALL = ("program_id", "axis_index")  # all heads and devices are alike: the first stands for them
_LARGEST_KNOWN = 1 << 16  # elements; inside kernels only scalars steer
_MOST_STEPS = 10_000  # of one loop
# Integers, with NumPy: JAX would compile each operation for every shape, which takes longer than the whole count.
_ON_INTEGERS: dict[str, Callable] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "neg", "eq", "ne", "lt", "le", "gt", "ge")},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert, "max": np.maximum, "min": np.minimum},
    **dict.fromkeys(("convert_element_type", "reshape", "squeeze"), np.asarray),
    **{"div": lambda x, y: np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)), "rem": np.fmod, "sign": np.sign},
    "select_n": lambda which, *cases: np.choose(which, cases),
}
# Floats by which integers are divided (`ot_attention.support.divided_product`).
_ON_FLOATS: dict[str, Callable] = {
    **dict.fromkeys(("convert_element_type", "reshape", "squeeze"), np.asarray),
    **{"mul": np.multiply, "div": np.divide, "floor": np.floor},
}


class Matmul(NamedTuple):
    """Products [m, k] x [k, n]: `batch` of them, each made of `passes` bfloat16 products."""

    batch: int
    m: int
    k: int
    n: int
    passes: int

    def flops(self, side: int = 1) -> float:
        """Count operations with the depth and the better of m and n padded to the array's side (1: no padding)."""
        m, k, n = (-(-size // side) * side for size in (self.m, self.k, self.n))
        return 2.0 * self.batch * self.passes * k * min(self.m * n, m * self.n)


@dataclasses.dataclass
class Operations:
    """Work of a part of a step: products with how often each is done, other operations, bytes moved.

    ici: Bytes sent to neighbours. exchanges: Number of all exchanges, of each device; sums and the like are short.
    """

    matmuls: collections.Counter[Matmul] = dataclasses.field(default_factory=collections.Counter)
    vector: int | float = 0
    transcendental: int | float = 0
    hbm: int | float = 0
    ici: int | float = 0
    exchanges: int | float = 0

    def add(self, other: "Operations", times: int | float) -> None:
        for matmul, number in other.matmuls.items():
            self.matmuls[matmul] += number * times  # type: ignore[assignment]
        for name in ("vector", "transcendental", "hbm", "ici", "exchanges"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))

    def passes(self) -> list[int]:
        return sorted({matmul.passes for matmul in self.matmuls})

    def flops(self, side: int = 1) -> int | float:
        return sum(matmul.flops(side) * times for matmul, times in self.matmuls.items())


Parts = dict[str, Operations]


def count(function: Callable, *arguments: Any) -> Parts:
    """Count the operations of a function over all chips, by part.

    Parts are "forward", "backward" (what `jax.grad` added), "update" (the rest, with the arguments and results of the
    whole function as its memory traffic), and one for each Pallas kernel by name. Elementwise operations are taken to
    be fused: only matrix products, reductions, gathers and kernels move bytes. Arguments are shapes, or values that may
    steer loops. Raises ValueError if a loop does not end, as far as is known here.
    """
    closed, counter = jax.make_jaxpr(function)(*arguments), _Counter()
    known = [x if isinstance(x, (np.ndarray, np.generic)) else None for x in jax.tree.leaves(arguments)]
    counter.run(closed, known, "update", 1, kernel=False)
    counter.parts["update"].hbm += sum(map(_bytes, (*closed.jaxpr.invars, *closed.jaxpr.outvars)))
    return dict(counter.parts)


class _Counter:
    """Runs a jaxpr on known values, None for unknown ones, and adds up its operations."""

    def __init__(self):
        self.parts: Parts = collections.defaultdict(Operations)
        self._costs: dict[int, Operations] = {}

    def run(self, body: core.ClosedJaxpr | core.Jaxpr, values: Sequence, part: str, times: int, kernel: bool) -> list:
        """Run a body once in place of `times` runs; return the values of its results."""
        jaxpr, consts = _open(body), getattr(body, "consts", ())
        environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

        def read(variable):
            return variable.val if isinstance(variable, core.Literal) else environment.get(variable)

        for equation in jaxpr.eqns:
            inner = part if kernel else _part(equation, part)
            results = self._equation(equation, [read(x) for x in equation.invars], inner, times, kernel)
            for variable, value in zip(equation.outvars, results, strict=True):
                if value is None and _shape(variable) == () and _dtype(variable) == np.dtype(bool):
                    value = np.True_
                environment[variable] = value
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, values: list, part: str, times: int, kernel: bool) -> list:
        name, parameters = equation.primitive.name, equation.params
        unknown = [None] * len(equation.outvars)
        if name == "pallas_call":
            self._kernel(equation, values, times)
        elif name == "while":
            return self._while(parameters, values, part, times, kernel)
        elif name == "scan":
            carry = self._scan(equation, values, part, times, kernel)
            return carry + unknown[len(carry) :]
        elif name == "cond":
            branch = -1 if values[0] is None else int(values[0])
            return self.run(parameters["branches"][branch], values[1:], part, times, kernel)
        elif name == "shard_map":
            body, devices = parameters["jaxpr"], math.prod(parameters["mesh"].shape.values())
            results = self.run(body, [*map(_resized, values, body.invars)], part, times * devices, kernel)
            return [*map(_resized, results, equation.outvars)]
        elif not name.startswith("scatter") and (bodies := _bodies(equation)):
            for body in bodies:
                inputs = len(_open(body).invars)
                given = values if inputs == len(values) else [None] * inputs
                results = self.run(body, given, part, times, kernel)
            return results if len(results) == len(unknown) else unknown
        else:
            if id(equation) not in self._costs:
                self._costs[id(equation)] = _cost(equation, kernel)
            self.parts[part].add(self._costs[id(equation)], times)
            return _value(equation, values, kernel) or unknown
        return unknown

    def _kernel(self, equation: core.JaxprEqn, values: list, times: int) -> None:
        parameters, grid = equation.params, equation.params["grid_mapping"]
        name = str(getattr(parameters.get("name_and_src_info"), "name", parameters.get("name")))
        self.parts[name].hbm += times * sum(map(_bytes, (*equation.invars, *equation.outvars)))
        known = values[: grid.num_index_operands]
        known += [None] * (len(parameters["jaxpr"].invars) - len(known))
        self.run(parameters["jaxpr"], known, name, times * math.prod(grid.grid), kernel=True)

    def _while(self, parameters: dict, values: list, part: str, times: int, kernel: bool) -> list:
        of_condition, of_body = parameters["cond_nconsts"], parameters["body_nconsts"]
        condition, body = values[:of_condition], values[of_condition : of_condition + of_body]
        carry = values[of_condition + of_body :]
        for _ in range(_MOST_STEPS):
            if not self.run(parameters["cond_jaxpr"], [*condition, *carry], part, times, kernel)[0]:
                return carry
            carry = self.run(parameters["body_jaxpr"], [*body, *carry], part, times, kernel)
        told = f"a loop does not end within {_MOST_STEPS} steps as far as is known here: its bound must follow from"
        raise ValueError(f"{told} arguments that are values, {parameters['cond_jaxpr']}")

    def _scan(self, equation: core.JaxprEqn, values: list, part: str, times: int, kernel: bool) -> list:
        """Return the last carries. Scanned inputs and stacked outputs have one axis more outside than inside."""
        body, length = equation.params["jaxpr"], equation.params["length"]
        pairs = (equation.invars, _open(body).invars), (equation.outvars, _open(body).outvars)
        scanned, stacked = (sum(_shape(x) != _shape(y) for x, y in zip(*of, strict=True)) for of in pairs)
        end = len(values) - scanned
        constants = end - (len(equation.outvars) - stacked)
        carry = values[constants:end]
        first = [x if x is None else x[0] for x in values[end:]]
        steps, each = (length, times) if any(x is not None for x in carry) else (1, times * length)
        for _ in range(steps):
            carry = self.run(body, [*values[:constants], *carry, *first], part, each, kernel)[: len(carry)]
        return carry


def _cost(equation: core.JaxprEqn, kernel: bool) -> Operations:
    """Count one equation without a body. Outside kernels, all but elementwise operations go through memory."""
    name, size = equation.primitive.name, max((_size(x) for x in equation.outvars), default=0)
    if _FREE.fullmatch(name):
        return Operations()
    if _TRANSCENDENTAL.fullmatch(name):
        return Operations(transcendental=size)
    if _EXCHANGES.fullmatch(name):
        return Operations(exchanges=1, ici=sum(map(_bytes, equation.outvars)) if name == "ppermute" else 0)
    traffic = 0 if kernel else sum(map(_bytes, (*equation.invars, *equation.outvars)))
    if name in ("dot_general", "conv_general_dilated"):
        return Operations(collections.Counter([_matmul(equation)]), hbm=traffic)
    if name.startswith(_REDUCTIONS):
        return Operations(vector=max(_size(x) for x in (*equation.invars, *equation.outvars)), hbm=traffic)
    return Operations(vector=size)


def _matmul(equation: core.JaxprEqn) -> Matmul:
    """Return a product, of a convolution that of patches with the kernel; products with padding count too."""
    x, y = map(_shape, equation.invars)
    precision = str(equation.params["precision"]) if _dtype(equation.invars[0]).itemsize >= 4 else ""
    passes = next((passes for name, passes in _PASSES.items() if name in precision), 1)
    if equation.primitive.name == "conv_general_dilated":
        outputs = y[equation.params["dimension_numbers"].rhs_spec[0]]
        return Matmul(1, _size(equation.outvars[0]) // outputs, math.prod(y) // outputs, outputs, passes)
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    k, batches = (math.prod(x[i] for i in axes) for axes in (contract, batch))
    m, n = (math.prod(shape) // (k * batches) for shape in (x, y))
    return Matmul(batches, m, k, n, passes)


def _value(equation: core.JaxprEqn, values: list, kernel: bool) -> list | None:
    """Compute the results of one equation if they are known and small enough to steer anything."""
    name, parameters = equation.primitive.name, equation.params
    if name in _FIRST_OF_ALL:
        return [np.int32(0)]
    if _EXCHANGES.fullmatch(name):
        return None
    if any(x is None for x in values) or sum(map(_size, equation.outvars)) > (1 if kernel else _LARGEST_KNOWN):
        return None
    if name in ("multiple_of", "pvary", "pcast"):
        return values
    if name == "get":
        (index,) = jax.tree.unflatten(parameters["tree"], values[1:])
        return [np.asarray(values[0])[tuple(int(i) for i in index.indices)]]
    kinds = {getattr(_dtype(x), "kind", "V") for x in equation.outvars}
    of_floats = "f" in kinds or any(np.asarray(x).dtype.kind == "f" for x in values)
    known = {*"iub", *("f" if name in _ON_FLOATS or name == "broadcast_in_dim" else "")}
    if equation.effects or not kinds <= known:
        return None
    shape, dtype = _shape(equation.outvars[0]), _dtype(equation.outvars[0])
    if of_floats and name in _ON_FLOATS:
        return [np.asarray(_ON_FLOATS[name](*values)).astype(dtype).reshape(shape)]
    if name in _ON_INTEGERS and all(np.asarray(x).dtype.kind in "iub" for x in values):
        with np.errstate(over="ignore"):  # wraps around, as on the chip
            return [np.asarray(_ON_INTEGERS[name](*values), dtype).reshape(shape)]
    if name == "broadcast_in_dim":
        new_axes = set(range(len(shape))) - set(parameters["broadcast_dimensions"])
        return [np.broadcast_to(np.expand_dims(values[0], tuple(new_axes)), shape)]
    return [*map(np.asarray, jax.tree.leaves(equation.primitive.bind(*values, **parameters)))]


def _resized(value, variable):
    """Return the first device's part of a value, or what its parts on all devices are together; all are alike."""
    for axis, size in enumerate(() if value is None else _shape(variable)):
        value = np.take(value, np.arange(size), axis, mode="wrap")
    return value


def _part(equation: core.JaxprEqn, outer: str) -> str:
    """Name the part of an equation by the transformations that made it; a body's names are relative to its holder."""
    stack = str(equation.source_info.name_stack)
    backward = outer == "backward" or "transpose(" in stack
    return "backward" if backward else "forward" if "jvp(" in stack else outer


def _bodies(equation: core.JaxprEqn) -> list[core.ClosedJaxpr | core.Jaxpr]:
    parameters = jax.tree.leaves([*equation.params.values()])
    return [x for x in parameters if isinstance(x, (core.ClosedJaxpr, core.Jaxpr))]


def _open(body: core.ClosedJaxpr | core.Jaxpr) -> core.Jaxpr:
    return body.jaxpr if isinstance(body, core.ClosedJaxpr) else body


def _bytes(variable) -> int:
    return _size(variable) * getattr(_dtype(variable), "itemsize", 0)


def _size(variable) -> int:
    return math.prod(_shape(variable))


def _dtype(variable) -> Any:
    return getattr(variable.aval, "dtype", None)  # semaphores and the like have none


def _shape(variable) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())
