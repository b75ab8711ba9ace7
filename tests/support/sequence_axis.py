"""Attention of sequences that simulated devices share, beside one device's; a program of its own for its devices.

python -m tests.support.sequence_axis NAME ...     # of CASES; a JSON line of errors for each
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ot_attention import SinkhornInfo, SinkhornSpec, sinkhorn_attention
from ot_attention.backends import gpu_kernels

LENGTH = 96
SEGMENTS = np.zeros((2, LENGTH), np.int32)
SEGMENTS[0, 20:], SEGMENTS[0, 24:], SEGMENTS[0, 48:], SEGMENTS[0, 80:] = 1, 2, 3, 2  # borders of shares, and others
SEGMENTS[1, :40], SEGMENTS[1, 95:] = 7, 9


@dataclasses.dataclass(frozen=True)
class Case:
    """Problem of two examples and two heads that `devices` share; `groups` of devices have an example or two each."""

    devices: int
    spec: SinkhornSpec
    lengths: tuple[int, int] = (LENGTH, 53)
    sd: tuple[float, float] = (1.0, 1.0)  # of the scores of each example
    weighted: bool = False
    segmented: bool = False
    implementation: str = "xla"
    groups: int = 1
    dtype: str = "float64"
    check_vma: bool = True


CASES = {
    "balanced": Case(4, SinkhornSpec(band=16)),
    "full dustbin, most shares empty": Case(8, SinkhornSpec(band=12, dustbin="full"), (20, 0)),
    "unit dustbin, relaxed, weights, tolerance": Case(
        2, SinkhornSpec(band=7, dustbin="unit", tau_a=0.9, tau_b=0.6, tolerance=1e-3), weighted=True
    ),
    "five tail steps": Case(4, SinkhornSpec(band=24, tail_steps=5, tau_a=0.3)),
    "sharp beside smooth": Case(2, SinkhornSpec(band=8, base_steps=5), sd=(1.0, 60.0), groups=2),
    "one settles early": Case(
        2, SinkhornSpec(band=9, tau_a=0.9, tau_b=0.6, tolerance=1e-2, base_steps=50), sd=(0.1, 4.0), groups=2
    ),
    "newton and implicit, full dustbin": Case(
        4, SinkhornSpec(band=16, dustbin="full", base_steps=5, solver="newton", gradient="implicit")
    ),
    "segments": Case(4, SinkhornSpec(band=16, tau_a=0.9, tau_b=0.9), segmented=True),
    # JAX's interpreter of kernels does not know the types of `shard_map`.
    "kernels of a GPU, segments": Case(
        *(4, SinkhornSpec(band=16, base_steps=3, tau_b=0.5)),
        implementation="pallas_gpu",
        segmented=True,
        check_vma=False,
    ),
    # Behind this line, cases of the slow suite.
    "balanced newton and implicit": Case(
        8, SinkhornSpec(band=12, base_steps=5, solver="newton", gradient="implicit"), (LENGTH, 31)
    ),
    "relaxed implicit, segments": Case(
        4, SinkhornSpec(band=16, tau_a=0.9, tau_b=0.8, gradient="implicit"), segmented=True
    ),
    "balanced segments": Case(8, SinkhornSpec(band=12), segmented=True),
    "balanced weights": Case(4, SinkhornSpec(band=16), weighted=True),
    "softmax": Case(4, SinkhornSpec(band=16, tau_b=0.0)),
    "no band beyond the residue": Case(4, SinkhornSpec(band=0, dustbin="full")),
    "no base steps, sharp": Case(4, SinkhornSpec(band=16, base_steps=0, tail_steps=1, dustbin="full"), sd=(30.0, 30.0)),
    "types are not checked": Case(4, SinkhornSpec(band=16, dustbin="full"), check_vma=False),
    "kernels of a GPU, full dustbin": Case(
        4, SinkhornSpec(band=16, base_steps=3, dustbin="full"), implementation="pallas_gpu", check_vma=False
    ),
    "kernels of a GPU": Case(2, SinkhornSpec(band=16, base_steps=3), implementation="pallas_gpu", check_vma=False),
    "float32": Case(4, SinkhornSpec(band=16, dustbin="full"), dtype="float32"),
    "bfloat16": Case(4, SinkhornSpec(band=16, dustbin="full"), dtype="bfloat16"),
    **{
        f"{dustbin} on {devices}": Case(devices, SinkhornSpec(band=12, dustbin=dustbin), (LENGTH, 61))
        for dustbin in ("none", "unit", "full")
        for devices in (2, 4, 8)
    },
}


def errors(case: Case) -> dict[str, float]:
    """Largest deviations of shared from whole sequences, relative to the largest value; infinite where not finite."""
    given, run = _inputs(case), functools.partial(_attend_and_pull_back, case)
    whole, shared = (jax.device_get(run(*given, devices)) for devices in (1, case.devices))
    names = (
        "out",
        "f",
        "g",
        "f and g of the dustbin",
        "residual",
        "steps",
        "dq",
        "dk",
        "dv",
        "dscore",
        "dweights of rows",
        "dweights of columns",
    )
    found = {}
    for name, expected, actual in zip(names, whole, shared, strict=True):
        if expected is not None:
            expected, actual = (np.asarray(x, np.float64) for x in (expected, actual))
            scale = max(1.0, np.abs(expected).max(initial=0))
            found[name] = float(np.abs(actual - expected).max(initial=0) / scale)
            found[name] = found[name] if np.isfinite(actual).all() and np.isfinite(expected).all() else float("inf")
    return found


def _inputs(case: Case) -> tuple:
    rng, shape = np.random.default_rng(0), (2, LENGTH, 2, 8)
    q, k, v, cotangent = (rng.normal(size=shape) for _ in range(4))
    q *= np.array(case.sd)[:, None, None, None]
    for example, n in enumerate(case.lengths):  # padding may hold anything, in values and in cotangents
        q[example, n:], k[example, n:], v[example, n:], cotangent[example, n:] = np.nan, np.inf, np.nan, np.nan
    arrays = [jnp.asarray(x, case.dtype) for x in (q, k, v)]
    score = None if case.spec.dustbin == "none" else jnp.array([0.5, -1.0])
    weights = [jnp.asarray(rng.uniform(0.5, 2, shape[:2])) if case.weighted else None for _ in range(2)]
    return arrays, score, weights, jnp.array(case.lengths), cotangent


def _attend_and_pull_back(case: Case, arrays, score, weights, lengths, cotangent, devices: int):
    """Return output, potentials of residues and of the dustbin, residual, steps, and gradients through all of them."""
    axis = None if devices == 1 else "sequence"
    ids = jnp.asarray(SEGMENTS) if case.segmented else None
    dustbin = case.spec.dustbin != "none"

    def attend(q, k, v, score, weights, lengths, ids):
        out, info = sinkhorn_attention(
            *(q, k, v, case.spec, lengths, None if axis else lengths, score, case.implementation, *weights),
            sequence_axis=axis,
            segment_ids=ids,
        )
        bins = None
        if dustbin:  # every device has a copy
            bins = jnp.concatenate([info.f[..., -1:], info.g[..., -1:]], -1)
            bins = jax.lax.pmean(bins, axis) if axis else bins
            info = info._replace(f=info.f[..., :-1], g=info.g[..., :-1])
        return out, info, bins

    if axis:
        mesh = jax.make_mesh((case.groups, devices), ("data", axis), axis_types=(AxisType.Auto,) * 2)
        by_place, by_head = P("data", axis), P("data", None, axis)
        attend = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(by_place, by_place, by_place, P(), by_place, P("data"), by_place),
            out_specs=(by_place, SinkhornInfo(by_head, by_head, P("data"), P("data")), P("data")),
            check_vma=case.check_vma,
        )

    @jax.jit
    def run(arrays, score, weights):
        def of(*given):
            out, info, bins = attend(*given, lengths, ids)
            return (out, info.f, info.g, bins), (info.residual, info.steps)

        (out, f, g, bins), pull_back, others = jax.vjp(of, *arrays, score, weights, has_aux=True)
        of_f = jnp.cos(jnp.arange(f.size)).reshape(f.shape).astype(f.dtype)
        of_bins = None if bins is None else jnp.full_like(bins, 3.0)
        cotangents = jnp.asarray(cotangent, out.dtype), of_f, jnp.full_like(g, 0.1), of_bins
        *gradients, of_weights = pull_back(cotangents)
        return out, f, g, bins, *others, *gradients, *of_weights

    return run(arrays, score, weights)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    gpu_kernels.INTERPRET = True
    for name in sys.argv[1:]:
        print(json.dumps({"case": name, "errors": errors(CASES[name])}), flush=True)
