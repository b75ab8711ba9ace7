"""Builds the shards that `data.dir` points to, from Stockholm files or from a release of Pfam.

Examples:
  python scripts/build_pfam.py --input Pfam-A.seed.gz --clans Pfam-A.clans.tsv.gz --out runs/pfam
  python scripts/build_pfam.py --release 37.0 --out runs/pfam37
  python scripts/build_pfam.py --input homstrad.sto.gz --evaluation-only --pairs-per-family 5 --out runs/homstrad
  python scripts/build_pfam.py --input part-*.sto.gz --clans Pfam-A.clans.tsv.gz --max-rows 2000 --out runs/full \\
      --beam --beam-options --runner=DirectRunner --direct_num_workers=8
"""

import argparse
import sys

from data.families import PAIRS_PER_FAMILY
from data.pfam import Pfam, build
from data.recipe import RELEASES, Recipe, Report
from data.stockholm import MAX_FAMILY_BYTES


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        report = build(recipe(args), args.out, overwrite=args.overwrite, download_dir=args.download_dir, **engine(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"build_pfam: {error}", file=sys.stderr)
        return 1
    show(report, args.out)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", default=[], metavar="FILE", help="Stockholm files, plain or gzip")
    source.add_argument("--release", default="", metavar="37.0", help="download Pfam-A.seed and the clans of a release")
    parser.add_argument("--clans", default="", metavar="FILE", help="Pfam-A.clans.tsv[.gz]; needed with --input")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, for data.dir")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument(
        "--skip-bad", action="store_true", help="list malformed families instead of stopping at the first"
    )
    parser.add_argument("--max-rows", type=int, metavar="N", help="keep N rows a family, the choice is fixed")
    parser.add_argument(
        "--max-family-bytes", type=int, default=MAX_FAMILY_BYTES, metavar="N", help="larger families are an error"
    )
    parser.add_argument(
        "--evaluation-only", action="store_true", help="all families go to test_ood, never to be trained on; no --clans"
    )
    parser.add_argument(
        "--pairs-per-family", type=int, default=PAIRS_PER_FAMILY, metavar="N", help="evaluation pairs, at most"
    )
    parser.add_argument("--num-shards", type=int, metavar="N", help="shards a split; default: by size")
    parser.add_argument("--mirror", default=RELEASES, metavar="URL", help="parent of the Pfam37.0 folders")
    parser.add_argument(
        "--download-dir", metavar="DIR", help="keeps downloads for later builds; default: OUT.downloads"
    )
    parser.add_argument("--beam", action="store_true", help="run as an Apache Beam pipeline (requirements-beam.txt)")
    parser.add_argument(
        "--beam-options",
        nargs=argparse.REMAINDER,
        default=[],
        help="all that follows goes to Beam, --runner=... included",
    )
    return parser.parse_args(argv)


def recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(
        inputs=tuple(args.input),
        clans=args.clans,
        release=args.release,
        mirror=args.mirror,
        skip_bad=args.skip_bad,
        max_rows=args.max_rows,
        max_family_bytes=args.max_family_bytes,
        num_shards=args.num_shards,
        evaluation_only=args.evaluation_only,
        pairs=args.pairs_per_family,
    )


def engine(args: argparse.Namespace) -> dict:
    """The builder class and what TFDS's DownloadConfig takes beside it."""
    if not (args.beam or args.beam_options):
        return {"builder": Pfam}
    from data.beam import PfamBeam, pipeline_options

    return {"builder": PfamBeam, "beam_options": pipeline_options(args.beam_options)}


def show(report: Report, out: str) -> None:
    for title, lines in (("malformed, skipped", report.skipped), ("left out", report.dropped)):
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
        print(f"{len(lines)} families {title}", file=sys.stderr)
    print(f"{out}: " + ", ".join(f"{split} {count}" for split, count in report.records.items()))


if __name__ == "__main__":
    sys.exit(main())
