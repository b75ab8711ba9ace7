"""Axes of a mesh inside `shard_map`: the arrays that vary over them, and the axis whose devices share sequences."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Shaped


def varying_like(x: jax.Array, tree: PyTree[jax.Array]) -> PyTree[jax.Array]:
    """Mark arrays as varying over the mesh axes that x varies over, under `shard_map`.

    A loop's first carry must have the type that its steps return, and gradients the type of a `custom_vjp`'s inputs.
    """

    def mark(y):
        missing = tuple(jax.typeof(x).manual_axis_type.varying - jax.typeof(y).manual_axis_type.varying)
        return jax.lax.pcast(y, missing, to="varying") if missing else y

    return jax.tree.map(mark, tree)


@dataclasses.dataclass(frozen=True)
class SequenceAxis:
    """Mesh axis along which devices share the length of sequences, in equal shares and in the axis' order.

    Without a name one device has the whole length: every method is then the plain operation. Vectors over "all" rows or
    columns end with the dustbin's entry, of which every device has a copy.
    """

    name: str | None = None

    @property
    def is_shared(self) -> bool:
        return self.name is not None

    @property
    def size(self) -> int:
        return jax.lax.axis_size(self.name) if self.is_shared else 1

    def start(self, share) -> Int[Array, ""] | int:
        """Return the position of this device's first residue in the whole sequence."""
        return jax.lax.axis_index(self.name) * share if self.is_shared else 0

    def local(self, lengths: Int[Array, "*batch"], share) -> Int[Array, "*batch"]:
        """Return how many residues of sequences of these lengths are in this device's share."""
        return jnp.clip(lengths - self.start(share), 0, share) if self.is_shared else lengths

    def sum(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return varying_like(x, jax.lax.psum(x, self.name)) if self.is_shared else x

    def max(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return varying_like(x, jax.lax.pmax(x, self.name)) if self.is_shared else x

    def alike(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Return what all devices have alike, so that JAX knows it too."""
        return jax.lax.pmax(x, self.name) if self.is_shared else x

    def agreed(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Tell whether the flag holds on all devices of the mesh, so that all of them go the same way.

        Also those beyond this axis: a device that waits for its neighbours in a loop must find them in it, and some
        runtimes gather the pairs of all groups of devices for one exchange.
        """
        if not self.is_shared:
            return flag
        held = jax.lax.pmin(flag.astype(jnp.int32), tuple(jax.sharding.get_abstract_mesh().manual_axes))
        return varying_like(flag, held > 0)

    def total(self, x: Shaped[Array, "N all"]) -> Shaped[Array, "N 1"]:
        """Add up a vector over all rows or columns, the dustbin's entry once."""
        if not self.is_shared:
            return x.sum(-1, keepdims=True)
        return self.sum(x[:, :-1].sum(-1, keepdims=True)) + x[:, -1:]

    def once(self, x: Shaped[Array, "N all"]) -> Shaped[Array, "N all"]:
        """Return a vector whose dustbin's entry only one device keeps, so that `sum` counts it once."""
        if not self.is_shared:
            return x
        is_copy = (jnp.arange(x.shape[1]) == x.shape[1] - 1) & (jax.lax.axis_index(self.name) > 0)
        return jnp.where(is_copy, 0, x)

    def with_neighbours(self, x: Shaped[Array, "N share ..."], reach: int) -> Shaped[Array, "N longer ..."]:
        """Put the nearest `reach` entries of both neighbours around this device's, 0 where there is no neighbour."""
        if not reach:
            return x
        return jnp.concatenate([self._sent(x[:, -reach:], 1), x, self._sent(x[:, :reach], -1)], 1)

    def to_neighbours(
        self, x: Shaped[Array, "N longer ..."], reach: int, combine: Callable[[Array, Array], Array], none: float
    ) -> Shaped[Array, "N share ..."]:
        """Give neighbours what belongs to them of a result like `with_neighbours`, and combine it with what they give.

        none: what combines without effect, for a device at an end.
        """
        if not reach:
            return x
        index, zeros = jax.lax.axis_index(self.name), ((0, 0),) * (x.ndim - 2)
        own = x[:, reach:-reach]
        rest = own.shape[1] - reach
        from_left = jnp.where(index > 0, self._sent(x[:, -reach:], 1), none)
        from_right = jnp.where(index < self.size - 1, self._sent(x[:, :reach], -1), none)
        own = combine(own, jnp.pad(from_left, ((0, 0), (0, rest), *zeros), constant_values=none))
        return combine(own, jnp.pad(from_right, ((0, 0), (rest, 0), *zeros), constant_values=none))

    def _sent(self, x: Shaped[Array, "..."], by: int) -> Shaped[Array, "..."]:
        """Send an array to the next device (by = 1) or to the one before (-1); the one at the end receives 0."""
        pairs = [(i, i + by) for i in range(self.size) if 0 <= i + by < self.size]
        return jax.lax.ppermute(x, self.name, pairs) if pairs else jnp.zeros_like(x)


ALONE = SequenceAxis()  # of one device, which has whole sequences
