"""Build the shards that `data.dir` points to from Stockholm files or a release of Pfam, or check shards for damage.

Examples:
  python scripts/build_pfam.py --input Pfam-A.seed.gz --clans Pfam-A.clans.tsv.gz --out runs/pfam
  python scripts/build_pfam.py --release 37.0 --out runs/pfam37
  python scripts/build_pfam.py --verify runs/pfam37
  python scripts/build_pfam.py --input homstrad.sto.gz --evaluation-only --pairs-per-family 5 --out runs/homstrad
  python scripts/build_pfam.py --input mine.sto --every-family --out runs/my_families
  python scripts/build_pfam.py --input parts/* --clans Pfam-A.clans.tsv.gz --insert-states --max-rows 2000 \\
      --out runs/full --beam --beam-options --runner=DirectRunner --direct_num_workers=8
"""

import argparse
import dataclasses
import logging
import sys

import command_line
from data.builds import verify
from data.families import PAIRS_PER_FAMILY
from data.pfam import Pfam, build
from data.recipe import RELEASES, Recipe, Report
from data.stockholm import MAX_FAMILY_BYTES

PROGRAM = "build_pfam"
PACKED = "plain or packed by gzip, bzip2 or xz"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return command_line.run(PROGRAM, lambda: work(args), debug=args.debug)


def work(args: argparse.Namespace) -> None:
    if args.verify:
        print(verify(args.verify))
        return
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    options = {"overwrite": args.overwrite, "download_dir": args.download_dir, **engine(args)}
    with command_line.warnings_in_lines(PROGRAM):
        report = build(recipe, args.out, **options)
    show(report, recipe, args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser, path = command_line.Parser(__doc__), command_line.file_name
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", default=[], type=path, metavar="FILE", help=f"Stockholm files, {PACKED}")
    source.add_argument("--release", default="", metavar="37.0", help="download Pfam-A.seed and the clans of a release")
    source.add_argument(
        "--verify", type=path, metavar="DIR", help="check the checksums of the data set in DIR; build nothing"
    )
    add = parser.add_argument
    add(
        "--clans",
        type=path,
        metavar="FILE",
        help=f"Pfam-A.clans.tsv, {PACKED}; needed with --input unless an option below says so",
    )
    add("--out", type=path, metavar="DIR", help="folder to make, for data.dir")
    add("--overwrite", action="store_true", help="replace the data set in DIR")
    add("--skip-bad", action="store_true", help="list malformed families instead of stopping at the first")
    add("--max-rows", type=int, metavar="N", help="keep N rows a family, always the same ones")
    add("--max-family-bytes", type=int, default=MAX_FAMILY_BYTES, metavar="N", help="larger families are malformed")
    add("--evaluation-only", action="store_true", help="put all families into test_ood; needs no --clans")
    add(
        "--every-family",
        action="store_true",
        help="put all families into train, and part of the sequences of each into test_iid; needs no --clans",
    )
    add("--train-only", action="store_true", help="write train alone, for alignments that nobody should evaluate on")
    add("--pairs-per-family", type=int, default=PAIRS_PER_FAMILY, metavar="N", help="evaluation pairs, at most")
    add(
        "--insert-states",
        action=argparse.BooleanOptionalAction,
        help="lower case marks insert states of a profile HMM, never aligned (--no-insert-states: as aligned as upper "
        "case); default: yes for files named Pfam-A.full* and for families with #=GC RF, else no",
    )
    add("--num-shards", type=int, metavar="N", help="shards a split; default: by size")
    add("--mirror", default=RELEASES, metavar="URL", help="parent of the Pfam37.0 folders")
    add(
        "--download-dir",
        type=path,
        metavar="DIR",
        help="folder that keeps downloads for later builds; default: OUT.downloads",
    )
    add("--beam", action="store_true", help="run as an Apache Beam pipeline (requirements-beam.txt)")
    add("--beam-options", nargs=argparse.REMAINDER, default=[], help="all that follows goes to Beam")
    args = parser.parse_args(argv)
    args.inputs, args.pairs, args.clans = tuple(args.input), args.pairs_per_family, args.clans or ""
    if not (args.out or args.verify):
        parser.error("--out is missing: give the folder to make, for example --out runs/pfam")
    return args


def engine(args: argparse.Namespace) -> dict:
    """Return the builder class, and options of Beam, as `build` takes them."""
    if not (args.beam or args.beam_options):
        return {"builder": Pfam}
    from data.beam import PfamBeam, PipelineOptions

    if not args.debug:
        logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)  # tracebacks of errors told below
    return {"builder": PfamBeam, "beam_options": PipelineOptions(args.beam_options)}


def show(report: Report, recipe: Recipe, out: str) -> None:
    for title, lines in (("malformed, skipped", report.skipped), ("left out", report.dropped)):
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
        print(f"{len(lines)} families {title}", file=sys.stderr)
    print(report.summary(with_clans=bool(recipe.clans or recipe.release)))
    print(f"{out}: " + ", ".join(f"{split} {count}" for split, count in report.records.items()))


if __name__ == "__main__":
    sys.exit(main())
