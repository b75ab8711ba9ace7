"""Aligns proteins, pair by pair, and says how sure each column is.

python scripts/align.py a.fasta b.fasta                          # each sequence of a with each of b
python scripts/align.py many.fasta                               # the first with all others
python scripts/align.py many.fasta --all-pairs --format=tsv --output=pairs.tsv.gz
python scripts/align.py a.fasta b.fasta --format=stockholm --plot=plan.png
python scripts/align.py --pairs=pairs.tsv --format=jsonl         # lines: id, x, y with tabs between
zcat many.fasta.gz | python scripts/align.py - --format=a3m > many.a3m

Sequences may be of any length up to 46,000 residues. Confidence is the probability that a column is right, from the
transport plan. Exit status: 0, 1 for input that cannot be aligned, 2 for a wrong command line.
"""

import argparse
import contextlib
import functools
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

# What is slow to import (jax, the model, matplotlib) comes where it is needed: errors of the input appear at once.
from alignment import formats, sequences
from alignment.sequences import PairRecord, Record
from data import vocab

if TYPE_CHECKING:
    from alignment.inference import Pretrained

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights" / "aligner.safetensors"
_DECODERS = ("posterior", "plan")  # of models.pretrained, which takes a second to import
_COMPRESSION = 4  # of gzip: its default, 9, takes longer than all else here, for files a quarter smaller
_FEW = 8  # pairs, for which no progress is shown
_LONGEST_PICTURE = 1500  # pixels of the plan


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, args.quiet)
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
    """The pairs to align, and how many they are."""
    if args.pairs:
        pairs = list(sequences.read_pairs(args.pairs))
        return iter(pairs), len(pairs)
    files = [sequences.read_fasta(path) for path in args.fasta]
    if len(files) == 2:
        return _named(itertools.product(*files)), len(files[0]) * len(files[1])
    (records,) = files
    if len(records) < 2:
        raise ValueError(f"{args.fasta[0]} holds one sequence; give a second file, or a file with several sequences")
    if args.all_pairs:
        return _named(itertools.combinations(records, 2)), math.comb(len(records), 2)
    return _named((records[0], other) for other in records[1:]), len(records) - 1


def _named(pairs: Iterable[tuple[Record, ...]]) -> Iterator[PairRecord]:
    return (PairRecord(f"{x.id}:{y.id}", x, y) for x, y in pairs)


def _load(args: argparse.Namespace) -> "Pretrained":
    path = args.weights or WEIGHTS
    if not (args.workdir or path.exists()):
        raise FileNotFoundError(f"no weights at {path}; name others with --weights=FILE.safetensors or --workdir=RUN")
    _keep_compiled()
    from alignment.inference import Pretrained

    if args.workdir:
        from evaluation import runs

        run = runs.load_run(args.workdir)
        runs.check_aligns(run)
        model = Pretrained.from_config(run.config.to_dict(), lambda _: run.params)
    else:
        model = Pretrained.load(path)
    return model.compiled(args.asap) if args.asap else model


def _keep_compiled() -> None:
    """Programs are compiled once for each padded length, and kept in the user's cache folder."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:  # unless JAX_COMPILATION_CACHE_DIR names another
        jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("ot-attention"))


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
            _plot(model, chunk[0], results[0].pairs, args)


def _tokens(pair: PairRecord) -> tuple[np.ndarray, np.ndarray]:
    return vocab.encode(pair.x.residues.encode()), vocab.encode(pair.y.residues.encode())


def _plot(model: "Pretrained", pair: PairRecord, matches: np.ndarray, args: argparse.Namespace) -> None:
    from alignment import decoding, inference
    from evaluation import figures

    plan, scale = inference.dense_maximum(model.plan(*_tokens(pair), band=args.band), _LONGEST_PICTURE)
    match = np.full(len(pair.x.residues), decoding.NO_MATCH)
    match[matches[:, 0]] = matches[:, 1]
    figures.plan_heatmap(plan, args.plot, match=match, scale=scale, title=f"x: {pair.x.id}, y: {pair.y.id}")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[str]]:
    if path == sequences.STANDARD_INPUT:
        yield sys.stdout
        return
    with gzip.open(path, "wt", _COMPRESSION) if path.endswith(".gz") else Path(path).open("w") as file:
        yield file


def _show_warning(quiet: bool, message, *_, **__) -> None:
    if not quiet:
        print(f"align.py: warning: {message}", file=sys.stderr)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", nargs="*", metavar="FASTA", help="one file or two, plain or gzip; - reads stdin")
    parser.add_argument("--pairs", metavar="FILE.tsv", help="instead: lines of id, x and y; - reads stdin")
    parser.add_argument("--all-pairs", action="store_true", help="of one file, each sequence with each other")
    parser.add_argument("--format", choices=formats.FORMATS, default="text", help="default: text")
    parser.add_argument("--output", metavar="FILE", default="-", help="in place of stdout; .gz compresses")
    parser.add_argument("--plot", metavar="FILE.png", help="heat map of one pair's plan, and the alignment in it")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--weights", type=Path, metavar="FILE.safetensors", help=f"default: {WEIGHTS.relative_to(ROOT)}, which ships"
    )
    model.add_argument("--workdir", type=Path, metavar="RUN", help="a run of train.py in place of weights")
    parser.add_argument(
        "--asap",
        type=Path,
        metavar="FILE",
        help="maps of scripts/compile_asap.py in place of the model's Sinkhorn steps",
    )
    parser.add_argument(
        "--decoder",
        choices=_DECODERS,
        default=_DECODERS[0],
        help="posterior (default): maximum expected accuracy under affine gap costs; plan: of the plan, gaps are free",
    )
    parser.add_argument(
        "--band",
        type=int,
        metavar="N",
        help="residues to either side of the diagonal in which partners are looked for, -1 for all; default: as many "
        "as the model was trained with, and more where lengths differ",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    args = parser.parse_args(argv)
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
