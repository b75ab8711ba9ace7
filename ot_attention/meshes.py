"""Calls on arrays that lie on a mesh of explicit axes: every device takes its own examples and heads.

Axes of other kinds are left alone: the compiler cuts arrays along automatic ones, and manual ones are the caller's.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ot_attention.spec import UnsupportedError

EXAMPLES, HEADS = "batch", "heads"


class Argument(NamedTuple):
    """Arrays of one argument, and the meaning of their first axes: `EXAMPLES`, `HEADS`, or None for any other."""

    name: str
    arrays: PyTree
    axes: tuple[str | None, ...]


def on_each_device(function: Callable[..., PyTree], arguments: tuple[Argument, ...], *options: Hashable) -> PyTree:
    """Call `function(*arrays, *options)`, on every device's part where arrays lie on a mesh of explicit axes.

    Its results have the axes `[batch, heads, ...]`. Raises UnsupportedError for arrays that are cut along other axes.
    """
    given = [argument.arrays for argument in arguments]
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(given))
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return _compiled(function, options, *given)
    cuts = _cuts(arguments)
    *specs, out = (
        PartitionSpec(*(axis and cuts.get(axis) for axis in axes))
        for axes in (*(argument.axes for argument in arguments), (EXAMPLES, HEADS))
    )
    return _in_parts(function, options, mesh, tuple(specs), out, *given)


# Compiled, because a loop or branch outside `jit` would be compiled anew in each call, and because what is masked must
# not alarm `jax_debug_nans`, which looks at all results of calls that are not compiled.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(function, options, *given):
    return function(*given, *options)


# Compiled, because only inside `jit` JAX moves arrays from one device to a mesh.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _in_parts(function, options, mesh: AbstractMesh, specs, out: PartitionSpec, *given):
    def placed(arrays, spec):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), arrays)

    axes = frozenset(mesh.explicit_axes)
    if len(axes) == len(mesh.axis_names):
        axes = frozenset()  # all axes, but for one that `vmap` takes already
    part = jax.shard_map(lambda *x: function(*x, *options), mesh=mesh, in_specs=specs, out_specs=out, axis_names=axes)
    return part(*map(placed, given, specs))


def _cuts(arguments: tuple[Argument, ...]) -> dict[str, Any]:
    """Return the mesh axes along which examples and heads are cut, where they are."""
    cuts: dict[str, Any] = {}
    for name, arrays, axes in arguments:
        for x in jax.tree.leaves(arrays):
            spec = jax.typeof(x).sharding.spec
            for place, cut in enumerate(spec):
                axis = axes[place] if place < len(axes) else None
                if cut is not None and (axis is None or cuts.setdefault(axis, cut) != cut):
                    raise UnsupportedError(
                        f"{name} is sharded as {spec}: only the batch and the heads can be, alike in all arguments; "
                        f"use jax.sharding.reshard({name}, ...)"
                    )
    used = [axis for cut in cuts.values() for axis in ((cut,) if isinstance(cut, str) else cut)]
    if len(used) > len(set(used)):
        raise UnsupportedError(f"batch and heads are sharded along one mesh axis, {cuts}; use jax.sharding.reshard")
    return cuts
