"""Compare ways to balance given scores: ours, automatic differentiation of the same steps, ott-jax.

  python scripts/bench_balance.py                              # all cases; a table, and a JSON row for each method
  python scripts/bench_balance.py --cases "4 x 4" --rounds 15 --output runs/bench/small.jsonl

Methods take turns, each called once to warm up and once against the clock. Times are medians; a speedup is the time of
automatic differentiation through all steps over that of the method. Errors are the largest deviations from the same
computation in float64, relative to its largest value. Rows
are appended to OUTPUT.part, which becomes OUTPUT at the end.
"""

import argparse
import sys

import command_line
from benchmarks import balance, harness

_COLUMNS = "case method error_plan error_gradient forward_ms forward_speedup forward_backward_ms "
_COLUMNS += "forward_backward_speedup temporary_MB failed"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = harness.parser(__doc__, "runs/bench/balance.jsonl", rounds=9)
    names = list(balance.CASES)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {names}")
    args = parser.parse_args(arguments)
    return command_line.run("bench_balance.py", lambda: compare(args), debug=args.debug)


def compare(args: argparse.Namespace) -> None:
    """Measure the chosen cases; write rows, and print the table."""
    rows: list[harness.Row] = []
    with harness.row_writer(args.output) as write:
        if not balance.HAS_OTT:
            print("ott-jax is not installed and left out (pip install ott-jax)", file=sys.stderr)
        for name in args.cases:
            for row in balance.measure(name, balance.CASES[name], args.rounds):
                write(row)
                rows.append(row)
    print(table(rows))
    print(f"rows: {args.output}")


def table(rows: list[harness.Row]) -> str:
    """Return errors, times and memory of all methods as a Markdown table."""
    memory = "forward_backward_temporary_bytes"
    return harness.table(
        [row | {"temporary_MB": row[memory] / 1e6} if memory in row else row for row in rows], _COLUMNS
    )


if __name__ == "__main__":
    sys.exit(main())
