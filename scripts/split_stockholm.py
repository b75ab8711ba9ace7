"""Divide a Stockholm file into parts of whole families and about equal size, so that several workers can read it.

Example, for parts/Pfam-A.full.part-00000-of-00064.sto.gz and so on:
  python scripts/split_stockholm.py Pfam-A.full.gz --parts 64 --out parts
"""

import argparse
import gzip
import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

import command_line
from data.files import DAMAGED, STANDARD_STREAM, display_name, open_unpacked, without_endings
from data.stockholm import MAX_ROW_BYTES, is_header, no_header

MAX_PARTS = 1000  # all are open at once; systems allow a process 1,024 files or more


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("input", type=command_line.file_name, help="Stockholm file, plain or packed; - reads stdin")
    parser.add_argument("--parts", type=parts, required=True, metavar="N", help=f"at most {MAX_PARTS}")
    parser.add_argument("--out", type=command_line.path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    return command_line.run("split_stockholm", lambda: split(args.input, args.parts, args.out), debug=args.debug)


def parts(text: str) -> int:
    """Return the number of parts given on the command line."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} was given, allowed are 1 to {MAX_PARTS}")
    return int(text)


def split(source: str, parts: int, out: Path) -> None:
    """Copy each family to the part that is smallest so far. The build checks the lines later.

    Raises ValueError, and leaves no folder, if the input has fewer families than there are parts.
    """
    if out.exists():
        raise FileExistsError(f"--out {out} exists: give a new folder")
    with open_unpacked(source) as lines:
        out.mkdir(parents=True)
        try:
            # The build reads a file named Pfam-A.full* as one with insert states.
            stem = "" if source == STANDARD_STREAM else f"{without_endings(source)}."
            names = [out / f"{stem}part-{i:05d}-of-{parts:05d}.sto.gz" for i in range(parts)]
            families = _divide(iter(lambda: lines.readline(MAX_ROW_BYTES), b""), display_name(source), names)
            if families < parts:
                raise ValueError(f"--parts {parts}: {display_name(source)} has only {families} families")
        except BaseException:
            shutil.rmtree(out)
            raise


def _divide(lines: Iterable[bytes], source: str, names: list[Path]) -> int:
    """Return the number of families."""
    families = target = 0
    with ExitStack() as stack:
        handles = [stack.enter_context(gzip.open(name, "wb", compresslevel=1)) for name in names]
        sizes = [0] * len(names)
        for line in tqdm(_readable(lines, source), unit=" lines", unit_scale=True, mininterval=1.0, disable=None):
            if is_header(line):
                families += 1
                target = sizes.index(min(sizes))
            elif not families and line.strip():
                raise ValueError(f"{source}: {no_header(line)}")
            handles[target].write(line)
            sizes[target] += len(line)
    if not families:
        raise ValueError(f"{source} holds no family: it is empty; give Stockholm alignments")
    return families


def _readable(lines: Iterable[bytes], source: str) -> Iterable[bytes]:
    """Yield lines; raise ValueError where the file cannot be unpacked further."""
    try:
        yield from lines
    except DAMAGED as error:
        raise ValueError(f"{source} cannot be read further ({error}); it is truncated or corrupt") from error


if __name__ == "__main__":
    sys.exit(main())
