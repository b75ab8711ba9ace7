"""Divide a Stockholm file into parts of whole families and about equal size, so that several workers can read it.

Example, for parts/part-00000-of-00064.sto.gz and so on:
  python scripts/split_stockholm.py Pfam-A.full.gz --parts 64 --out parts
"""

import argparse
import gzip
import sys
import zlib
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from data.stockholm import open_unpacked


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="Stockholm file, plain or gzip")
    parser.add_argument("--parts", type=int, required=True, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    if args.parts < 1:
        parser.error(f"--parts {args.parts}: at least 1")
    try:
        split(args.input, args.parts, args.out)
    except (OSError, EOFError, zlib.error) as error:
        print(f"split_stockholm: {args.input} -> {args.out}: {error}", file=sys.stderr)
        return 1
    return 0


def split(source: Path, parts: int, out: Path) -> None:
    """Copy each family to the part that is smallest so far. The build checks the lines later."""
    with ExitStack() as stack:
        lines = stack.enter_context(open_unpacked(source))
        out.mkdir(parents=True)
        names = [out / f"part-{i:05d}-of-{parts:05d}.sto.gz" for i in range(parts)]
        handles = [stack.enter_context(gzip.open(name, "wb", compresslevel=1)) for name in names]
        sizes = [0] * parts
        target = 0
        for line in tqdm(lines, unit=" lines", unit_scale=True, mininterval=1.0):
            handles[target].write(line)
            sizes[target] += len(line)
            if line.rstrip() == b"//":
                target = sizes.index(min(sizes))


if __name__ == "__main__":
    sys.exit(main())
