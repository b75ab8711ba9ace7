"""Refusals of derivatives: UnsupportedError in place of an error inside JAX, or of a number that would be wrong."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from ot_attention.spec import Implementation, UnsupportedError

Tree = TypeVar("Tree", bound=PyTree[Array])


def only_reverse(tree: Tree, implementation: Implementation) -> Tree:
    """Return the arrays, of which reverse mode takes derivatives, but forward mode does not."""
    message = (
        f"implementation {implementation!r} cannot do this: forward mode (jax.jvp, jax.jacfwd) of the attention "
        "itself; use reverse mode (jax.grad, jax.jacrev), which forward mode may go over, or implementation='reference'"
    )
    return _of_floats(lambda x: _with_tangent(x, x, message, True), tree)


def only_first(tree: Tree, implementation: Implementation) -> Tree:
    """Return the arrays, within a first derivative. A second one raises UnsupportedError."""
    message = (
        f"implementation {implementation!r} cannot do this: its kernels have first derivatives only; "
        "use implementation='xla' or 'reference'"
    )
    return _of_floats(lambda x: _once(x, message), tree)


def none(function: Callable[[PyTree[Array]], Tree], inputs: PyTree[Array], what: str) -> Tree:
    """Return `function(inputs)`, and refuse its derivatives where they are used: not where it is auxiliary output."""
    message = f"{what} have no derivatives: use jax.lax.stop_gradient on the arguments, or do without"
    floats = [x for x in jax.tree.leaves(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    found = function(jax.lax.stop_gradient(inputs))

    def guarded(x):
        return _with_tangent(x, sum(y.sum().astype(x.dtype) for y in floats), message, False)

    return jax.tree.map(guarded, found)


def _of_floats(function: Callable[[Array], Array], tree: Tree) -> Tree:
    return jax.tree.map(lambda x: function(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _once(x: Array, message: str) -> Array:
    return x


@_once.defjvp
def _once_jvp(message, primals, tangents):
    raise UnsupportedError(message)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _with_tangent(x: Array, source: Array, message: str, is_transposable: bool) -> Array:
    """Return x, with a refused tangent that hangs on the source's."""
    return x


@_with_tangent.defjvp
def _with_tangent_jvp(message, is_transposable, primals, tangents):
    tangent = _refused.bind(tangents[1], primals[1], message=message, is_transposable=is_transposable)
    # The bare x: a derivative of this derivative is another matter.
    return primals[0], jnp.broadcast_to(tangent, primals[0].shape)


def _refuse(*_, message: str, **__):
    raise UnsupportedError(message)


def _transposed(cotangent, *_, message: str, is_transposable: bool):
    return [cotangent, None] if is_transposable else _refuse(message=message)


def _mapped(arguments, axes, **parameters):
    tangent_axis, at_axis = axes
    if tangent_axis != at_axis:  # tangents alone are mapped, as jax.jacfwd does
        _refuse(**parameters)
    return _refused.bind(*arguments, **parameters), tangent_axis


# Identity of the tangent of its second operand. Reverse mode transposes it, and never runs it.
_refused = Primitive("refused_tangent")
_refused.def_impl(_refuse)
_refused.def_abstract_eval(lambda tangent, at, **_: tangent)
ad.primitive_jvps[_refused] = _refuse
ad.primitive_transposes[_refused] = _transposed
batching.primitive_batchers[_refused] = _mapped
mlir.register_lowering(_refused, _refuse)
