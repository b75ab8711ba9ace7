"""Compare Sinkhorn attention with softmax attention, the dense reference and ott-jax: error, time, memory.

  python scripts/bench_attention.py                            # all cases; a table, and a JSON row for each method
  python scripts/bench_attention.py --cases scaling --rounds 15 --figure docs/bench_scaling.png
  python scripts/bench_attention.py --cases sparse     # Sparse Sinkhorn Attention and dense softmax, 1k to 16k residues

In every round each method of a case is called once to warm up and once against the clock, in turn. Times are medians.
Ratios are to the fastest softmax program of the case, which each row names: blocks of 64 or 128 rows, all heads at once
or head by head. The first error is the largest deviation from the same computation
in float64, relative to its largest value. Gradients are also compared with the gradient at Sinkhorn's fixed point.
Rows are appended to OUTPUT.part, which becomes OUTPUT at the end.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import command_line
from benchmarks import attention, harness
from data import files

_COLUMNS = "case method error_out error_gradient error_out_to_converged error_gradient_to_converged "
_COLUMNS += "forward_ms forward_to_softmax forward_fastest_softmax "
_COLUMNS += "forward_backward_ms forward_backward_to_softmax forward_backward_fastest_softmax temporary_MB"
_TITLES = {"scaling": "W = 256", "sparse": "blocks of 64"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = harness.parser(__doc__, "runs/bench/rows.jsonl", rounds=9)
    names = [*attention.CASES, *attention.SERIES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {names}")
    parser.add_argument("--implementation", default="xla", help="of ours: xla, pallas_tpu, pallas_gpu; default: xla")
    figure = Path("runs/bench/scaling.png")
    parser.add_argument(
        "--figure", type=command_line.path, default=figure, help="default: %(default)s; _sparse beside it"
    )
    args = parser.parse_args(arguments)
    return command_line.run("bench_attention.py", lambda: compare(args), debug=args.debug)


def compare(args: argparse.Namespace) -> None:
    """Measure the chosen cases; write rows and figures, and print the table."""
    files.check_writable(args.figure)
    cases = {name: case for name, case in attention.CASES.items() if name in args.cases}
    for name, series in attention.SERIES.items():
        cases |= series if name in args.cases else {}
    if not attention.HAS_OTT:
        print("ott-jax is not installed and left out (pip install ott-jax)", file=sys.stderr)
    rows: list[harness.Row] = []
    with harness.row_writer(args.output) as write:
        for name, case in cases.items():
            for row in attention.measure(name, case, args.implementation, args.rounds):
                write(row)
                rows.append(row)
    print(table(rows))
    for name, series in attention.SERIES.items():
        if of_series := [row for row in rows if row["case"] in series]:
            figure = args.figure if name == "scaling" else args.figure.with_stem(f"{args.figure.stem}_{name}")
            print("\n" + exponents(of_series))
            draw(of_series, figure, _TITLES[name])
            print(f"figure: {figure}")
    print(f"rows: {args.output}")


def table(rows: list[harness.Row]) -> str:
    """Return errors, times and memory of all methods as a Markdown table."""
    flat = [row | {f"error_{of}": value for of, value in row["error"].items()} for row in rows]
    sized = [row | {"temporary_MB": row["forward_backward_temporary_bytes"] / 1e6} for row in flat]
    return harness.table(sized, _COLUMNS)


def exponents(rows: list[harness.Row]) -> str:
    """Return the slopes of time and memory against length, in logarithms, for a series of cases."""
    lines = []
    for method, (lengths, *series) in _against_length(rows).items():
        time, memory = (np.polyfit(np.log(lengths), np.log(y), 1)[0] for y in series)
        lines.append(f"{method}: time ~ length^{time:.3f}, memory ~ length^{memory:.3f}")
    return "\n".join(lines)


def _against_length(rows: list[harness.Row]) -> dict[str, tuple[list, ...]]:
    keys = ("length", "forward_backward_ms", "forward_backward_temporary_bytes")
    methods = dict.fromkeys(row["method"] for row in rows)
    return {m: tuple([row[key] for row in rows if row["method"] == m] for key in keys) for m in methods}


def draw(rows: list[harness.Row], path: Path, title: str) -> None:
    """Draw time and temporary memory of forward + backward against length, on logarithmic axes."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    labels = (1, 1, "time (ms)"), (2, 1e6, "memory (MB)")
    for axes, (index, unit, label) in zip(figure.subplots(1, 2), labels, strict=True):
        for method, series in _against_length(rows).items():
            axes.loglog(series[0], np.array(series[index]) / unit, marker="o", markersize=3, label=method)
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes.set(xlabel="length (residues)", ylabel=label)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(f"one head, {title}, forward + backward, temporary memory of the compiled program")
    with files.finished(path, "wb") as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:] or None)


if __name__ == "__main__":
    sys.exit(main())
