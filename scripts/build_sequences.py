"""Build the shards that `data.dir` of configs/pretrain.py points to from FASTA files, or check shards for damage.

Examples:
  python scripts/build_sequences.py --input swissprot50.fasta.gz --out runs/sequences
  python scripts/build_sequences.py --input part-*.fasta --clusters clusters.tsv --skip-bad --out runs/sequences
  python scripts/build_sequences.py --verify runs/sequences

The input holds proteins that are not aligned, best one representative of each cluster; --clusters names the cluster of
each sequence otherwise. The same sequence is kept once. Longer sequences than the last bucket are cut into pieces.
"""

import argparse
import dataclasses
import sys

import command_line
from data.builds import verify
from data.sequence_recipe import BUCKETS, MIN_LENGTH, Recipe, Report
from data.sequences import build

PROGRAM = "build_sequences"
PACKED = "plain or packed by gzip, bzip2 or xz"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = parse(argv)
    return command_line.run(PROGRAM, lambda: work(args), debug=args.debug)


def work(args: argparse.Namespace) -> None:
    """Build the data set and tell what it holds, or check one."""
    if args.verify:
        print(verify(args.verify))
        return
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    with command_line.warnings_in_lines(PROGRAM):
        report = build(recipe, args.out, overwrite=args.overwrite)
    show(report, args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser, path = command_line.Parser(__doc__), command_line.file_name
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", default=[], type=path, metavar="FILE", help=f"FASTA files, {PACKED}")
    told = "check the checksums of the data set in DIR; build nothing"
    source.add_argument("--verify", type=path, metavar="DIR", help=told)
    add = parser.add_argument
    told = f"lines of representative, tab, member (MMseqs2's createtsv), {PACKED}; default: a sequence is a cluster"
    add("--clusters", type=path, metavar="FILE", help=told)
    add("--out", type=path, metavar="DIR", help="folder to make, for data.dir")
    add("--overwrite", action="store_true", help="replace the data set in DIR")
    add("--skip-bad", action="store_true", help="list malformed sequences instead of stopping at the first")
    told = f"lengths; a record holds sequences of one; default: {' '.join(map(str, BUCKETS))}"
    add("--buckets", nargs="+", type=int, default=BUCKETS, metavar="N", help=told)
    told = f"leave shorter sequences out; default: {MIN_LENGTH}"
    add("--min-length", type=int, default=MIN_LENGTH, metavar="N", help=told)
    add("--num-shards", type=int, metavar="N", help="shards a split; default: by size")
    args = parser.parse_args(argv)
    args.inputs, args.clusters, args.buckets = tuple(args.input), args.clusters or "", tuple(args.buckets)
    if not (args.out or args.verify):
        parser.error("--out is missing: give the folder to make, for example --out runs/sequences")
    return args


def show(report: Report, out: str) -> None:
    """Tell what was left out, read and written."""
    for line in report.skipped:
        print(f"malformed, skipped: {line}", file=sys.stderr)
    print(report.summary())
    for split, found in report.splits.items():
        told = f"{found['sequences']:,} sequences, {found['residues']:,} residues, {report.records[split]:,} records"
        print(f"{out}: {split} {told}")


if __name__ == "__main__":
    sys.exit(main())
