"""Align proteins, pair by pair, with a probability of homology and a confidence for every column.

python scripts/align.py a.fasta b.fasta                          # each sequence of a with each of b
python scripts/align.py many.fasta                               # the first with all others
python scripts/align.py many.fasta --all-pairs --format=tsv --output=pairs.tsv.gz
python scripts/align.py a.fasta b.fasta --mode=local --format=stockholm --plot=plan.png
python scripts/align.py many.fasta --format=tsv:x,y,probability,cigar   # a line a pair of sequences; or tsv:blast12
python scripts/align.py queries.fasta many.fasta --top=20 --min-probability=.5 --format=a3m --output-dir=hits
python scripts/align.py queries.fasta many.fasta --format=jsonl --output=all.jsonl --resume   # after any stop
python scripts/align.py --pairs=pairs.tsv --format=jsonl         # lines: id, x, y with tabs between
python scripts/align.py --pairs=ids.tsv many.fasta               # lines: id of x, id of y
zcat many.fasta.gz | python scripts/align.py - --format=a3m > many.a3m

Sequences may be as long as memory allows. Confidence is the probability that a column is right. Input is
FASTA or PIR, plain or compressed by gzip, bzip2 or xz. Files of output appear when they are finished.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
from tqdm import tqdm

# Slow imports (jax, the model, matplotlib) stand where they are needed: errors in the input appear at once.
import command_line
from alignment import formats, output, pairing, selection, sequences, tables
from alignment.aligner import WEIGHTS
from alignment.columns import Aligned
from alignment.pairing import Work
from alignment.sequences import PairRecord
from data import files, memory, vocab
from evaluation import model_options

if TYPE_CHECKING:
    from alignment.inference import Pretrained

_MODES = ("global", "glocal", "local")  # models.pair_hmm.MODES, which takes a second to import
_OPTIONS = ("mode", "band", "top", "min_probability", "format", "all_pairs")  # on which results depend
_PICTURES = (".png", ".pdf", ".svg")
_FEW = 8  # pairs; no progress is shown for these
_LONGEST_PICTURE = 1500  # pixels


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
    if args.format == "a3m" and len(work.queries) > 1 and not args.output_dir:
        raise ValueError(
            f"an A3M holds one query; {len(work.queries)} were given: --output-dir=DIR writes a file for each of them"
        )
    model = _load(args)
    _check_memory(model, work, args.band)
    with _results(args, work, model) as results:
        few = args.quiet or work.total <= _FEW or not sys.stderr.isatty()
        with tqdm(total=work.total, initial=results.reached.pairs, unit=" pairs", disable=few) as progress:
            alignments = _aligned(model, work.pairs, results.reached.pairs, args, progress.update)
            for settled in selection.settled(alignments, least=args.min_probability, top=args.top):
                results.take(settled)
    if results.reached.left_out:
        told = f"{results.reached.left_out} of {work.total} pairs were left out"
        warnings.warn(f"{told}: --min-probability={args.min_probability:g}", stacklevel=2)
    if left_out:
        warnings.warn(f"{len(left_out)} records or pairs that cannot be read were left out", stacklevel=2)


def _work(args: argparse.Namespace, on_bad: sequences.OnBad | None) -> Work:
    """Read the pairs to align."""
    if args.pairs:
        return pairing.of_table(args.pairs, args.fasta, on_bad, by_query=bool(args.output_dir or args.top))
    return pairing.of_files(args.fasta, on_bad, every=args.all_pairs, both_ways=bool(args.top))


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


def _check_memory(model: "Pretrained", work: Work, band: int | None) -> None:
    """Raise ValueError, before anything is compiled, if the largest pair does not fit into the memory that is left."""
    import jax

    if jax.default_backend() != "cpu":  # accelerators have memory of their own, and say when it is too little
        return

    def needed(pair: PairRecord, band: int | None = band) -> int:
        return model.memory(len(pair.x.residues), len(pair.y.residues), pairs=work.total, band=band)

    pair, available = max(work.largest, key=needed), memory.available()
    if needed(pair) > available:
        narrower = "--band=N with a smaller N" if band not in (None, -1) else "--band=N"
        advice = f"{narrower} searches fewer partners, for less memory"
        if needed(pair, 1) > available:  # what takes most are the residues
            advice = "cut the longer sequence into domains"
        raise ValueError(
            f"{pair.id}, {len(pair.x.residues)} x {len(pair.y.residues)} residues: its alignment takes about "
            f"{needed(pair) / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are left; {advice}"
        )


def _results(
    args: argparse.Namespace, work: Work, model: "Pretrained"
) -> contextlib.AbstractContextManager[output.Results]:
    """Open the place where results are written."""
    how: dict[str, Any] = {"resume": args.resume, "total": work.total}
    if args.output_dir:
        run = _run_of(args, work, model)
        return output.to_folder(
            args.output_dir, args.format, run, queries=work.queries, key=pairing.digest(work.queries), **how
        )
    if args.output and str(args.output) != files.STANDARD_STREAM:
        run = _run_of(args, work, model)
        return output.to_file(args.output, args.format, run, every=model.chunk_size(), **how)
    return output.to_standard_output(args.format)


def _run_of(args: argparse.Namespace, work: Work, model: "Pretrained") -> output.Run:
    """Return all that results depend on, by names for users."""
    import jax

    return {
        **{name: pairing.digest(rows) for name, rows in work.inputs},
        "the model": _digest_of(model, args.asap),
        "the version of this program": command_line.version(),
        "the device": jax.default_backend(),
        "the number of pairs in a chunk": model.chunk_size(),
        **{f"--{name.replace('_', '-')}": getattr(args, name) for name in _OPTIONS},
    }


def _digest_of(model: "Pretrained", asap: Path | None) -> str:
    """Return the SHA-256 of parameters, band and maps."""
    import jax

    found = hashlib.sha256(f"{model.band}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    if asap:
        found.update(asap.read_bytes())
    return found.hexdigest()


def _aligned(
    model: "Pretrained",
    pairs: Iterator[PairRecord],
    begin: int,
    args: argparse.Namespace,
    done: Callable[[int], object],
) -> Iterator[Aligned]:
    """Yield the alignments from the pair at place `begin` on.

    The whole chunk of this pair is aligned again: alignments may depend, in their last digits, on others of a batch.
    """
    waiting, left = deque[tuple[list[PairRecord], int]](), begin

    def chunks() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        nonlocal left
        for chunk in pairing.chunks(pairs, model.chunk_size()):
            if left < len(chunk):
                waiting.append((chunk, left))
                yield [_tokens(pair) for pair in chunk]
            left = max(0, left - len(chunk))

    for results in model.align_chunks(chunks(), mode=args.mode, band=args.band, done=done):
        chunk, known = waiting.popleft()
        for (name, x, y), result in list(zip(chunk, results, strict=True))[known:]:
            yield Aligned(name, x, y, *result)
        if args.plot:
            _plot(model, chunk[0], args)


def _tokens(pair: PairRecord) -> tuple[np.ndarray, np.ndarray]:
    return vocab.encode(pair.x.residues.encode()), vocab.encode(pair.y.residues.encode())


def _plot(model: "Pretrained", pair: PairRecord, args: argparse.Namespace) -> None:
    from evaluation import figures

    ((_, found),) = model.predict([_tokens(pair)], mode=args.mode, band=args.band)
    plan, scale = found.plan.picture(_LONGEST_PICTURE)
    posterior = found.posterior.picture(_LONGEST_PICTURE)[0] if model.has_pair_hmm else None
    title = f"x: {pair.x.id}, y: {pair.y.id}"
    beside = args.plot.with_name(f".{os.getpid()}.{args.plot.name}")  # whose suffix tells the kind of picture
    try:
        options: dict[str, Any] = {"label": model.plan_label, "posterior": posterior, "scale": scale, "title": title}
        figures.plan_heatmap(plan, beside, match=found.match, **options)
        beside.replace(args.plot)
    finally:
        beside.unlink(missing_ok=True)


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
        "--mode",
        choices=_MODES,
        default="glocal",
        help="what residues beyond the aligned ends cost: global, as gaps inside; glocal, a price of its own, whatever "
        "their number; local, nothing; default: glocal",
    )
    parser.add_argument(
        "--top",
        type=command_line.at_least(1),
        metavar="N",
        help="for each query x the N most probable y, the most probable first; --all-pairs then aligns each sequence "
        "as query with all others",
    )
    parser.add_argument(
        "--min-probability",
        type=_share,
        default=0.0,
        metavar="P",
        help="leave out pairs whose probability of homology is below P, 0 to 1",
    )
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
        "--resume",
        action="store_true",
        help="continue what an interrupted run with the same input, options and model left in FILE.part or DIR; "
        "without such a run, begin",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=_picture, help="draw one pair: plan, posterior, alignment; or .pdf, .svg"
    )
    model_options.add_model_options(parser, default=f"{WEIGHTS.relative_to(WEIGHTS.parents[1])}, which ships")
    parser.add_argument(
        "--band",
        type=int,
        metavar="N",
        help="search for partners up to N residues from the best path, -1 for all; default: all up to 1,024 residues, "
        "and 256 beyond. Of a model of plans: from the diagonal",
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
    if args.resume and not (args.output_dir or (args.output and str(args.output) != files.STANDARD_STREAM)):
        parser.error("--resume continues a file: give --output=FILE or --output-dir=DIR")
    if args.top and args.pairs and not args.fasta:
        parser.error(
            "--top compares the partners of a query; a table of sequences names none: give FASTA, or --pairs "
            "of ids beside FASTA"
        )
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


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, allowed is 0 to 1")
    return number


def _picture(text: str) -> Path:
    path = command_line.path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} was given; names of pictures end in {', '.join(_PICTURES)}")
    return path


def _help_of_columns() -> str:
    rows = "\n".join(f"  {name:12} {told}" for name, (told, _) in tables.COLUMNS.items())
    return f"""columns of --format=tsv:NAME,NAME,... which writes their names, then a line for each pair of sequences:
{rows}
  {tables.BLAST:12} the twelve of BLAST's table, without the line of names
evalue and bitscore: BLAST's gap costs (11, and 1 a residue) and statistics (lambda {tables.LAMBDA}, K {tables.K});
evalue is of this pair of sequences alone: multiply it by the number of sequences that were searched.
"""


if __name__ == "__main__":
    sys.exit(main())
