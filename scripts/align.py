"""Align proteins, pair by pair, with a confidence for every column.

python scripts/align.py a.fasta b.fasta                          # each sequence of a with each of b
python scripts/align.py many.fasta                               # the first with all others
python scripts/align.py many.fasta --all-pairs --format=tsv --output=pairs.tsv.gz
python scripts/align.py a.fasta b.fasta --format=stockholm --plot=plan.png
python scripts/align.py --pairs=pairs.tsv --format=jsonl         # lines: id, x, y with tabs between
zcat many.fasta.gz | python scripts/align.py - --format=a3m > many.a3m

Sequences may be of any length up to 46,000 residues. Confidence is the probability that a column is right.
Exit status: 0, 1 for input that cannot be aligned, 2 for a wrong command line.
"""

import argparse
import contextlib
import gzip
import itertools
import math
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import platformdirs
from tqdm import tqdm

# Slow imports (jax, the model, matplotlib) stand where they are needed: errors in the input appear at once.
from alignment import formats, sequences
from alignment.sequences import PairRecord, Record
from data import vocab
from evaluation import model_options

if TYPE_CHECKING:
    from alignment.inference import Pretrained

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights" / "aligner.safetensors"
_DECODERS = ("posterior", "plan")  # alignment.inference.DECODERS, which takes a second to import
_COMPRESSION = 4  # gzip's default, 9, takes longer than all else here, for files a quarter smaller
_FEW = 8  # pairs; no progress is shown for these
_LONGEST_PICTURE = 1500  # pixels


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = _parse(argv)

    def show(message, *_, **__) -> None:
        if not args.quiet:
            print(f"align.py: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            _run(args)
        except BrokenPipeError:  # the reader has seen enough; what is left in the buffer must not fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError) as error:
            print(f"align.py: {error}", file=sys.stderr)
            return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    pairs, total = _pairs(args)
    if args.plot and total != 1:
        raise ValueError(f"--plot draws the plan of one pair; {total} were given")
    model = _load(args)
    few = args.quiet or total <= _FEW or not sys.stderr.isatty()
    with _opened(args.output) as out, tqdm(total=total, unit=" pairs", disable=few) as progress:
        aligned = _aligned(model, pairs, args, progress.update)
        for piece in formats.written(aligned, args.format):
            out.write(piece)
        out.flush()


def _pairs(args: argparse.Namespace) -> tuple[Iterator[PairRecord], int]:
    """Return the pairs to align, and their number."""
    if args.pairs:
        pairs = sequences.read_pairs(args.pairs)
        return iter(pairs), len(pairs)
    files = [sequences.read_fasta(path) for path in args.fasta]
    records, total = files[0], math.prod(map(len, files))
    if len(files) == 1 and len(records) < 2:
        raise ValueError(f"{args.fasta[0]} holds one sequence; give a second file, or a file with several sequences")
    chosen: Iterable[tuple[Record, ...]] = itertools.product(*files)
    if args.all_pairs:
        chosen, total = itertools.combinations(records, 2), math.comb(len(records), 2)
    elif len(files) == 1:
        chosen, total = ((records[0], other) for other in records[1:]), len(records) - 1
    return (PairRecord(f"{x.id}:{y.id}", x, y) for x, y in chosen), total


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
    figures.plan_heatmap(plan, args.plot, match=found.match, scale=scale, title=title, posterior=posterior)


def _opened(path: str) -> contextlib.AbstractContextManager[IO[str]]:
    if path == sequences.STANDARD_INPUT:
        return contextlib.nullcontext(sys.stdout)
    return gzip.open(path, "wt", _COMPRESSION) if path.endswith(".gz") else Path(path).open("w")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", nargs="*", metavar="FASTA", help="one file or two, plain or gzip; - reads stdin")
    parser.add_argument("--pairs", metavar="FILE.tsv", help="in place of FASTA: lines of id, x and y; - reads stdin")
    parser.add_argument("--all-pairs", action="store_true", help="align each sequence of one file with each other")
    parser.add_argument("--format", choices=formats.FORMATS, default="text", help="default: text")
    parser.add_argument("--output", metavar="FILE", default="-", help="in place of stdout; .gz compresses")
    parser.add_argument("--plot", metavar="FILE.png", help="draw one pair: plan, posterior, alignment")
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
    parser.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    args = model_options.parse(parser, argv)
    if bool(args.pairs) == bool(args.fasta) or len(args.fasta) > 2:
        parser.error("give one or two FASTA files, or --pairs=FILE.tsv")
    if args.all_pairs and len(args.fasta) != 1:
        parser.error("--all-pairs takes one FASTA file")
    if args.fasta.count(sequences.STANDARD_INPUT) > 1:
        parser.error("standard input (-) can be read once")
    if args.band is not None and args.band < 1 and args.band != -1:
        parser.error(f"--band={args.band} must be at least 1, or -1 for all")
    return args


if __name__ == "__main__":
    sys.exit(main())
