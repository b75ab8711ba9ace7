"""Rates on a GPU: picoseconds a cell and half-iteration of `pallas_gpu`, of `xla` and of the best attention there is.

  python scripts/bench_gpu.py                                       # 512 to 8192 residues, W = 64, 256 and all
  python scripts/bench_gpu.py --lengths 1024 --bands 64 full --dtype float32

A cell is one score of the support; T + R steps are 2 (T + R) half-iterations, softmax attention counts as one, over all
cells. Numbers are checked first, on one example and two heads against float64: a row that fails
them is reported and not timed. `softmax, cudnn` is jax.nn.dot_product_attention; `flash-sinkhorn` (PyTorch and Triton,
arXiv 2602.03067) is measured where it is installed, head by head, as it takes one problem at a time.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ot_attention import SinkhornSpec, UnsupportedError, sinkhorn_attention, transport_plan
from scripts.bench_attention import Case, Programs, clock, forward_backward

_STEPS = SinkhornSpec().base_steps + SinkhornSpec().tail_steps
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-6}
_FEW_HEADS = 2  # whose numbers are checked; and which flash-sinkhorn is timed on


class Method(NamedTuple):
    attend: Callable[[Case], Callable]  # as in bench_attention: of q, k, v, lengths and dustbin score
    passes: int  # over all cells, in the forward
    banded: bool = True


def sinkhorn(case: Case, implementation: str) -> Callable:
    spec = SinkhornSpec(band=case.band, dustbin=case.dustbin)
    return lambda q, k, v, lengths, score: sinkhorn_attention(q, k, v, spec, *lengths, score, implementation)[0]


def softmax(case: Case, implementation: str) -> Callable:
    def attend(q, k, v, lengths, score):
        # cuDNN has no float64, which only the check of numbers asks for.
        chosen = "xla" if q.dtype == jnp.float64 else implementation
        return jax.nn.dot_product_attention(q, k, v, implementation=chosen)

    return attend


METHODS = {
    "pallas_gpu": Method(functools.partial(sinkhorn, implementation="pallas_gpu"), 2 * _STEPS),
    "xla": Method(functools.partial(sinkhorn, implementation="xla"), 2 * _STEPS),
    "softmax, cudnn": Method(functools.partial(softmax, implementation="cudnn"), 1, banded=False),
    "softmax, xla": Method(functools.partial(softmax, implementation="xla"), 1, banded=False),
}


def cells(case: Case) -> int:
    """In the support of all heads, sequences being as long as they are padded."""
    band = case.length if case.band is None else case.band
    i = np.arange(case.length)
    each = np.minimum(i + band, case.length - 1) - np.maximum(i - band, 0) + 1
    return case.batch * case.heads * int(each.sum())


def error(case: Case, name: str, dtype: str) -> float:
    """Of output and gradients against float64 from the same inputs, relative to the largest value."""
    few, method = dataclasses.replace(case, batch=1, heads=_FEW_HEADS), METHODS[name]
    given = few.arguments(dtype)
    actual = jax.jit(forward_backward(method.attend(few)))(*given)
    exact_of = METHODS["xla"] if method.banded else method
    with jax.enable_x64(True):
        exact_given = (x if x is None or x.dtype == jnp.int32 else x.astype("float64") for x in (*given[:3], None))
        q, k, v, score = exact_given
        run = jax.jit(forward_backward(exact_of.attend(few)))
        expected = jax.device_get(run(q, k, v, given[3], score, given[5].astype("float64")))
    pairs = zip(jax.device_get(actual), expected, strict=True)
    return max(float(np.abs(x.astype("float64") - y).max() / np.abs(y).max()) for x, y in pairs)


def measure(case: Case, name: str, dtype: str, rounds: int) -> dict[str, Any]:
    """A row: error, then milliseconds and rates of the forward, and of forward and backward."""
    method = METHODS[name]
    row: dict[str, Any] = {"method": name, "error": error(case, name, dtype)}
    if not row["error"] < _TOLERANCE[dtype]:
        return row
    given, attend = case.arguments(dtype), method.attend(case)
    programs: Programs = {
        (name, "forward"): functools.partial(jax.jit(attend).lower(*given[:-1]).compile(), *given[:-1]),
        (name, "forward_backward"): functools.partial(
            jax.jit(forward_backward(attend)).lower(*given).compile(), *given
        ),
    }
    counted = cells(case if method.banded else dataclasses.replace(case, band=None))
    times = clock(programs, rounds)
    row |= {f"{what}_ms": 1e3 * seconds for (_, what), seconds in times.items()}
    return row | rates(times[name, "forward"], counted * method.passes)


def rates(seconds: float, visits: int) -> dict[str, float]:
    """visits: of cells, in all half-iterations."""
    return {"ps_a_cell_and_half_iteration": 1e12 * seconds / visits, "Tcell_a_second": visits / seconds / 1e12}


def measure_flash_sinkhorn(case: Case, rounds: int) -> dict[str, Any]:
    """As many alternating steps at full support, float32 with TF32 products, as it runs by default.

    Its cost is the squared distance: with `eps = 2 sqrt(d)` the norms go into the potentials, and plans are ours.
    """
    import torch
    from flash_sinkhorn.kernels import sinkhorn_flashstyle_alternating

    few = dataclasses.replace(case, batch=1, heads=_FEW_HEADS)
    q, k, *_ = few.arguments()
    x, y = ([torch.tensor(np.asarray(z[0, :, h]), device="cuda") for h in range(_FEW_HEADS)] for z in (q, k))
    weights, eps = torch.full((case.length,), 1 / case.length, device="cuda"), 2 * math.sqrt(case.width)

    def run():
        found = [
            sinkhorn_flashstyle_alternating(*points, weights, weights, eps=eps, n_iters=_STEPS)
            for points in zip(x, y, strict=True)
        ]
        torch.cuda.synchronize()
        return found

    f, g = (z.cpu().double().numpy() for z in run()[0][:2])
    points = [z[0].cpu().double().numpy() for z in (x, y)]
    norms = [(z**2).sum(1) for z in points]
    cost = norms[0][:, None] + norms[1] - 2 * points[0] @ points[1].T
    plan = np.exp((f[:, None] + g - cost) / eps) / case.length
    ours = transport_plan(q[:, :, :1], k[:, :, :1], SinkhornSpec(band=None))[0, 0]
    row: dict[str, Any] = {
        "method": "flash-sinkhorn",
        "error": float(np.abs(plan - np.asarray(ours)).max() / np.asarray(ours).max()),
    }
    if not row["error"] < 2e-2:  # of TF32 products, and of steps in the other order
        return row
    seconds = clock({("flash-sinkhorn", "forward"): run}, rounds)["flash-sinkhorn", "forward"]
    return row | {"forward_ms": 1e3 * seconds} | rates(seconds, cells(few) * 2 * _STEPS)


def rows(args: argparse.Namespace):
    """One of every method in every case."""
    for length, band in tqdm([(length, band) for length in args.lengths for band in args.bands]):
        case = Case(max(1, args.residues // length), args.heads, length, band, (), width=args.width)
        about = {"length": length, "band": band, "batch": case.batch, "heads": args.heads, "width": args.width}
        about |= {"dtype": args.dtype, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        for name in args.methods:
            if METHODS[name].banded or band is None:
                yield measure(case, name, args.dtype, args.rounds) | about
        if band is None and importlib.util.find_spec("flash_sinkhorn"):
            yield measure_flash_sinkhorn(case, args.rounds) | about


def table(rows: list[dict]) -> str:
    lines = ["| L | W | method | error | forward ms | forward + backward ms | ps a cell and half-iteration | Tcell/s |"]
    lines.append("|" + "---|" * 8)
    for row in rows:
        keys = "forward_ms", "forward_backward_ms", "ps_a_cell_and_half_iteration", "Tcell_a_second"
        figures = [f"{row[key]:.3g}" if key in row else "" for key in keys]
        band = "all" if row["band"] is None else str(row["band"])
        lines.append(
            "| " + " | ".join([str(row["length"]), band, row["method"], f"{row['error']:.0e}", *figures]) + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = _parse(arguments)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = []
    try:
        with args.output.open("w") as file:
            for row in rows(args):
                file.write(json.dumps(row) + "\n")
                file.flush()
                found.append(row)
    except UnsupportedError as unsupported:
        sys.exit(f"bench_gpu.py: {unsupported}")
    print(table(found))
    print(f"rows: {args.output}")
    if wrong := [row["method"] for row in found if "forward_ms" not in row]:
        sys.exit(f"bench_gpu.py: not timed, the numbers are wrong: {', '.join(wrong)}")


def _band(text: str) -> int | None:
    return None if text == "full" else int(text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 4096, 8192], help="default: %(default)s")
    parser.add_argument("--bands", nargs="+", type=_band, default=[64, 256, None], help="half-widths; full for all")
    parser.add_argument("--residues", type=int, default=16384, help="of a batch; default: %(default)s")
    parser.add_argument("--heads", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="of a head; default: %(default)s")
    parser.add_argument("--dtype", choices=list(_TOLERANCE), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each program; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu.jsonl"), help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
