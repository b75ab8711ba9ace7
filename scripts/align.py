"""Align proteins, pair by pair, with a confidence for every column.

python scripts/align.py a.fasta b.fasta                          # each sequence of a with each of b
python scripts/align.py many.fasta                               # the first with all others
python scripts/align.py many.fasta --all-pairs --format=tsv --output=pairs.tsv.gz
python scripts/align.py a.fasta b.fasta --format=stockholm --plot=plan.png
python scripts/align.py many.fasta --format=tsv:x,y,identity,cigar   # a line a pair of sequences; or tsv:blast12
python scripts/align.py queries.fasta many.fasta --format=a3m --output-dir=hits   # a file a query
python scripts/align.py --pairs=pairs.tsv --format=jsonl         # lines: id, x, y with tabs between
python scripts/align.py --pairs=ids.tsv many.fasta               # lines: id of x, id of y
zcat many.fasta.gz | python scripts/align.py - --format=a3m > many.a3m

Sequences may be of any length up to 46,000 residues. Confidence is the probability that a column is right. Input is
FASTA or PIR, plain or compressed by gzip, bzip2 or xz. Files of output appear when they are finished.
"""

import argparse
import bz2
import contextlib
import gzip
import itertools
import lzma
import math
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import platformdirs
from tqdm import tqdm

# Slow imports (jax, the model, matplotlib) stand where they are needed: errors in the input appear at once.
import command_line
from alignment import formats, sequences
from alignment.sequences import PairRecord, Record
from data import files, memory, vocab
from evaluation import model_options

if TYPE_CHECKING:
    from alignment.inference import Pretrained

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights" / "aligner.safetensors"
_DECODERS = ("posterior", "plan")  # alignment.inference.DECODERS, which takes a second to import
_COMPRESSORS: dict[str, Callable[..., Any]] = {
    # gzip's default level, 9, takes longer than all else here, for files a quarter smaller.
    ".gz": lambda file, mode: gzip.GzipFile("", mode, 4, file, mtime=0),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_PICTURES = (".png", ".pdf", ".svg")
_FEW = 8  # pairs; no progress is shown for these
_LONGEST_PICTURE = 1500  # pixels
_LONGEST_NAME = 100  # characters, of a file; systems allow 255 bytes


class _Work(NamedTuple):
    """Pairs to align."""

    pairs: Iterator[PairRecord]
    total: int
    queries: int  # different x
    largest: Collection[PairRecord]  # the pair that takes most memory is among them


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = _parse(argv)
    with command_line.warnings_in_lines("align.py", quiet=args.quiet):
        return command_line.run("align.py", lambda: _run(args), debug=args.debug, threads=args.threads)


def _run(args: argparse.Namespace) -> None:
    left_out: list[ValueError] = []

    def leave_out(error: ValueError) -> None:
        left_out.append(error)
        warnings.warn(f"left out: {error}", stacklevel=2)

    work = _work(args, leave_out if args.skip_bad else None)
    if args.plot and work.total != 1:
        raise ValueError(f"--plot draws the plan of one pair; {work.total} were given")
    if args.format == "a3m" and work.queries > 1 and not args.output_dir:
        raise ValueError(
            f"an A3M holds one query; {work.queries} were given: --output-dir=DIR writes a file for each of them"
        )
    model = _load(args)
    _check_memory(model, work, args.band)
    few = args.quiet or work.total <= _FEW or not sys.stderr.isatty()
    with tqdm(total=work.total, unit=" pairs", disable=few) as progress:
        _write(_aligned(model, work.pairs, args, progress.update), args)
    if left_out:
        warnings.warn(f"{len(left_out)} records or pairs that cannot be read were left out", stacklevel=2)


def _work(args: argparse.Namespace, on_bad: sequences.OnBad | None) -> _Work:
    """Read the pairs to align."""
    records = [sequences.read_fasta(path, on_bad) for path in args.fasta]
    if args.pairs:
        pairs = (
            sequences.read_pairs_of_ids(args.pairs, records[0], records[-1], on_bad)
            if records
            else sequences.read_pairs(args.pairs, on_bad)
        )
        place = {pair.x: n for n, pair in reversed(list(enumerate(pairs)))}
        if args.output_dir:  # pairs of a query together, for its file
            pairs.sort(key=lambda pair: place[pair.x])
        return _Work(iter(pairs), len(pairs), len(place), pairs)
    first = records[0]
    if len(records) == 1 and len(first) < 2:
        raise ValueError(f"{args.fasta[0]} holds one sequence; give a second file, or a file with several sequences")
    chosen: Iterable[tuple[Record, Record]]
    if args.all_pairs:
        chosen, total, queries = itertools.combinations(first, 2), math.comb(len(first), 2), len(first) - 1
        largest = list(itertools.combinations(_extremes(first), 2))
    else:
        xs, ys = records if len(records) == 2 else (first[:1], first[1:])
        chosen, total, queries = itertools.product(xs, ys), len(xs) * len(ys), len(xs)
        largest = list(itertools.product(_extremes(xs), _extremes(ys)))
    return _Work(map(_pair, chosen), total, queries, [_pair(sides) for sides in largest])


def _pair(sides: tuple[Record, Record]) -> PairRecord:
    x, y = sides
    return PairRecord(f"{x.id}:{y.id}", x, y)


def _extremes(records: list[Record]) -> list[Record]:
    """Return the shortest sequence and the two longest: memory grows with lengths, and with their difference."""
    by_length = sorted(records, key=lambda record: len(record.residues))
    return by_length if len(by_length) < 3 else [by_length[0], *by_length[-2:]]


def _load(args: argparse.Namespace) -> "Pretrained":
    path = args.weights or WEIGHTS
    if not (args.workdir or path.exists()):
        raise FileNotFoundError(f"no weights at {path}; name others with --weights=FILE.safetensors or --workdir=RUN")
    import jax

    # Compiled programs, one for each padded length, stay in the user's cache folder.
    if not jax.config.values["jax_compilation_cache_dir"]:  # unless JAX_COMPILATION_CACHE_DIR names another
        jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("ot-attention"))
    if args.workdir:
        return model_options.load(args).pretrained()
    from alignment.inference import Pretrained

    model = Pretrained.load(path)
    return model.with_asap(args.asap) if args.asap else model


def _check_memory(model: "Pretrained", work: _Work, band: int | None) -> None:
    """Raise ValueError, before anything is compiled, if the largest pair does not fit into the memory that is left."""
    import jax

    if jax.default_backend() != "cpu":  # accelerators have memory of their own, and say when it is too little
        return

    def needed(pair: PairRecord) -> int:
        return model.memory(len(pair.x.residues), len(pair.y.residues), pairs=work.total, band=band)

    pair, available = max(work.largest, key=needed), memory.available()
    if needed(pair) > available:
        narrower = "--band=N with a smaller N" if band not in (None, -1) else "--band=N"
        raise ValueError(
            f"{pair.id}, {len(pair.x.residues)} x {len(pair.y.residues)} residues: its alignment takes about "
            f"{needed(pair) / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are left; {narrower} searches fewer "
            "partners, for less memory"
        )


def _aligned(
    model: "Pretrained", pairs: Iterator[PairRecord], args: argparse.Namespace, done: Callable[[int], object]
) -> Iterator[formats.Aligned]:
    size, waiting = model.chunk_size(), deque[list[PairRecord]]()

    def chunks() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        while chunk := list(itertools.islice(pairs, size)):
            waiting.append(chunk)
            yield [_tokens(pair) for pair in chunk]

    for results in model.align_chunks(chunks(), decoder=args.decoder, band=args.band, done=done):
        chunk = waiting.popleft()
        for (name, x, y), result in zip(chunk, results, strict=True):
            yield formats.Aligned(name, x, y, *result)
        if args.plot:
            _plot(model, chunk[0], args)


def _tokens(pair: PairRecord) -> tuple[np.ndarray, np.ndarray]:
    return vocab.encode(pair.x.residues.encode()), vocab.encode(pair.y.residues.encode())


def _plot(model: "Pretrained", pair: PairRecord, args: argparse.Namespace) -> None:
    from evaluation import figures

    ((_, found),) = model.predict([_tokens(pair)], decoder=args.decoder, band=args.band)
    plan, scale = found.plan.picture(_LONGEST_PICTURE)
    by_posterior = (args.decoder or model.decoder) == "posterior"
    posterior = found.posterior.picture(_LONGEST_PICTURE)[0] if by_posterior else None
    title = f"x: {pair.x.id}, y: {pair.y.id}"
    beside = args.plot.with_name(f".{os.getpid()}.{args.plot.name}")  # whose suffix tells the kind of picture
    try:
        figures.plan_heatmap(plan, beside, match=found.match, scale=scale, title=title, posterior=posterior)
        beside.replace(args.plot)
    finally:
        beside.unlink(missing_ok=True)


def _write(alignments: Iterator[formats.Aligned], args: argparse.Namespace) -> None:
    if not args.output_dir:
        with _opened(args.output) as write:
            for piece in formats.written(alignments, args.format):
                write(piece)
        return
    names: set[str] = set()
    for query, of_query in itertools.groupby(alignments, key=lambda aligned: aligned.x):
        # Some file systems take names in another case for the same.
        name = sequences.told_apart(_file_name(query.id), names, str.lower)
        names.add(name.lower())
        with _opened(args.output_dir / f"{name}{formats.suffix(args.format)}") as write:
            for piece in formats.written(of_query, args.format):
                write(piece)


def _file_name(identifier: str) -> str:
    """Return a name that file systems allow and programs do not mistake for an option."""
    return re.sub(r"^[-.]|[^\w.=+@-]", "_", identifier, flags=re.ASCII)[:_LONGEST_NAME]


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Open a file, which is compressed if its name says so, or standard output; what is yielded writes text to it."""
    if path is None or str(path) == files.STANDARD_STREAM:
        if sys.stdout is None:
            raise ValueError("standard output is closed; give --output=FILE")
        yield sys.stdout.write
        sys.stdout.flush()
        return
    with files.finished(path, "wb") as raw, contextlib.ExitStack() as closed:
        compressor = _COMPRESSORS.get(path.suffix)
        file = closed.enter_context(compressor(raw, "wb")) if compressor else raw
        yield lambda text: file.write(text.encode())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(f"{__doc__}\n{_help_of_columns()}", threads=True, prog="align.py")
    parser.add_argument(
        "fasta",
        nargs="*",
        metavar="FASTA",
        type=command_line.file_name,
        help="one file or two, FASTA or PIR, plain, gzip, bzip2 or xz; - reads stdin",
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE.tsv",
        type=command_line.file_name,
        help="lines of id, x and y (sequences); beside FASTA, lines of two ids, of x and of y; - reads stdin",
    )
    parser.add_argument("--all-pairs", action="store_true", help="align each sequence of one file with each other")
    parser.add_argument(
        "--format",
        type=_format,
        default="text",
        help=f"{', '.join(formats.FORMATS)}, or tsv:NAME,NAME,... for a table of the columns above; default: text",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=command_line.path, help="in place of stdout; .gz, .bz2 and .xz compress"
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", type=command_line.path, help="write a file for each query, named by its id"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=_picture, help="draw one pair: plan, posterior, alignment; or .pdf, .svg"
    )
    model_options.add_model_options(parser, default=f"{WEIGHTS.relative_to(ROOT)}, which ships")
    parser.add_argument(
        "--decoder",
        choices=_DECODERS,
        help="maximum expected accuracy: posterior under affine gap costs, plan with free gaps; default: posterior if "
        "the model learned gap costs, as the shipped one did, else plan",
    )
    parser.add_argument(
        "--band",
        type=int,
        metavar="N",
        help="search for partners up to N residues from the diagonal, -1 for all; default: as in training, and more "
        "where lengths differ",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out records and pairs that cannot be read")
    parser.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    args = model_options.parse(parser, argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error of the command line where options do not go together."""
    inputs = [*args.fasta, *([args.pairs] if args.pairs else [])]
    if not inputs or len(args.fasta) > 2:
        parser.error("give one or two FASTA files, or --pairs=FILE.tsv")
    if args.all_pairs and (args.pairs or len(args.fasta) != 1):
        parser.error("--all-pairs takes one FASTA file, and no --pairs")
    if inputs.count(files.STANDARD_STREAM) > 1:
        parser.error("standard input (-) can be read once")
    if args.output and args.output_dir:
        parser.error("--output writes one file, --output-dir one for each query: give one of them")
    for option, path in (("--output", args.output), ("--plot", args.plot)):
        if path and path.is_file() and any(Path(name).exists() and path.samefile(name) for name in inputs):
            parser.error(f"{option}={path} is a file of input, which it would replace")
    if args.band is not None and args.band < 1 and args.band != -1:
        parser.error(f"--band={args.band} must be at least 1, or -1 for all")


def _format(text: str) -> str:
    try:
        formats.check_format(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _picture(text: str) -> Path:
    path = command_line.path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} was given; names of pictures end in {', '.join(_PICTURES)}")
    return path


def _help_of_columns() -> str:
    rows = "\n".join(f"  {name:12} {told}" for name, (told, _) in formats.COLUMNS.items())
    return f"""columns of --format=tsv:NAME,NAME,... which writes their names, then a line for each pair of sequences:
{rows}
  {formats.BLAST:12} the twelve of BLAST's table, without the line of names
evalue and bitscore: BLAST's gap costs (11, and 1 a residue) and statistics (lambda {formats.LAMBDA}, K {formats.K});
evalue is of this pair of sequences alone: multiply it by the number of sequences that were searched.
"""


if __name__ == "__main__":
    sys.exit(main())
