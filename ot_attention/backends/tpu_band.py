"""Band of `pallas_tpu` whose matrix is never stored: for sequences that devices share, and for segments."""

import functools

import jax

from ot_attention import support
from ot_attention.backends import gpu, tpu_products
from ot_attention.backends.tpu_tiles import vmem_capacity
from ot_attention.spec import Heads, Implementation, SinkhornSpec

_MIB = 2**20


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["windows", "reach", "strips"],
    meta_fields=["cut", "scale", "most", "block"],
)
class Band(gpu.Band):
    """Cells of the support, as in `gpu.Band`, by the TPU's kernels."""

    kernels = tpu_products

    @staticmethod
    def implementation() -> Implementation:
        return "pallas_tpu"


def unsupported_reason(heads: Heads, spec: SinkhornSpec) -> str | None:
    """Return why the kernels cannot do this and what to change, or None."""
    length = heads.k.shape[1] + 2 * (spec.band or 0)
    # At once a product has keys, potentials, and values with the tail's fields, or a matrix to multiply.
    widths = 2 * heads.k.shape[2] + heads.v.shape[2] + 2 * spec.tail_steps + 2 * 8
    needed = tpu_products.vmem_bytes(length, widths, support.potential_dtype(*heads[:3]).itemsize)
    if needed > vmem_capacity():
        return (
            f"one head's keys, values and vectors take {needed / _MIB:.0f} MiB of VMEM, which has "
            f"{vmem_capacity() / _MIB:.0f} for them; use more devices along sequence_axis, narrower heads or "
            "implementation='xla'"
        )
    return None
