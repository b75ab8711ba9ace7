"""Measure training batches of a data set: start with and without its index, memory, rate, and a resumed stream.

python scripts/bench_data.py --config=configs/aligner.py --config.data.dir=runs/pfam
python scripts/bench_data.py --config=configs/aligner.py --config.data.dir=runs/release --output=runs/data.json
python scripts/bench_data.py --make=runs/release.sto.gz --input families.sto.gz --families 24000 --rows 1200000

--make writes a Stockholm file of the size of a release instead, and the table of its clans beside it: real families
under new accessions, one in two without a clan. scripts/build_pfam.py builds it as any other.
"""

import argparse
import gzip
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import psutil
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

import command_line
from data import files, stockholm
from data.index import SplitIndex
from data.pipeline import PairStream
from evaluation import tasks
from evaluation.alignment import AlignmentTask, open_families

_PLAIN = {"identity_mass": (), "crop": 0.0, "stagger": 0.0, "noise": 0.0, "flanks": 0.0, "negatives": 0.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    usage = "bench_data.py --config=FILE [--config.KEY=VALUE ...] [options]\n       bench_data.py --make=FILE [options]"
    parser, natural = command_line.Parser(__doc__, usage=usage, allow_abbrev=False), command_line.at_least(1)
    add = parser.add_argument
    add("--batches", type=natural, default=100, metavar="N", help="to make for a rate; default: 100")
    add("--output", type=command_line.path, metavar="FILE", help="JSON file to write as well")
    add("--make", type=command_line.path, metavar="FILE", help="write this Stockholm file (gzip), and measure nothing")
    add("--input", type=command_line.path, nargs="+", default=[], metavar="FILE", help="families to repeat in it")
    add("--families", type=natural, default=24_000, metavar="N", help="of the file; default: 24,000")
    add("--rows", type=natural, default=1_200_000, metavar="N", help="of the file, about; default: 1,200,000")
    given = sys.argv[1:] if arguments is None else list(arguments)
    if any(argument.split("=")[0] == "--make" for argument in given):
        args = parser.parse_args(given)
        if not args.input:
            parser.error("--make needs --input: Stockholm files whose families are repeated")
        return command_line.run("bench_data.py", lambda: print(make(args)), debug=args.debug)
    args, config = command_line.parse_with_config(parser, given)
    return command_line.run("bench_data.py", lambda: print(measure(args, config)), debug=args.debug)


def measure(args: argparse.Namespace, config: ConfigDict) -> str:
    """Measure, write the numbers, and return them as a table. Raises ValueError if the task has no pairs."""
    if args.output:
        files.check_writable(args.output)
    config = tasks.checked(config)
    task = tasks.task_of(config)
    if not isinstance(task, AlignmentTask):
        raise ValueError(f"task={config.task!r} has no pairs; give a configuration that aligns")
    found = dict(_measured(task, config, args.batches))
    if args.output:
        files.write(args.output, json.dumps(found, indent=1) + "\n")
    return tabulate(
        [(name, f"{value:,.4g}") for name, value in found.items()], tablefmt="plain", colalign=("left", "right")
    )


def _measured(task: AlignmentTask, config: ConfigDict, batches: int) -> Iterator[tuple[str, float]]:
    """Yield names and values: seconds, megabytes, pairs a second."""
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    families, seconds = _timed(lambda: open_families(config.data.dir, "train"))
    yield "families", len(families)
    yield "open (s)", seconds
    _, seconds = _timed(lambda: [SplitIndex.counted(part) for part in families.parts])
    yield "count the index anew (s)", seconds
    [SplitIndex.of(part) for part in families.parts]  # which keeps it, if it took long
    stream, seconds = _timed(lambda: PairStream(families, task.data()))
    yield "start with the index (s)", seconds
    _, seconds = _timed(lambda: stream[0])
    yield "first batch (s)", seconds
    yield "memory of families and index (MB)", (process.memory_info().rss - before) / 1e6
    plain = PairStream(families, type(task.data())(**(vars(task.data()) | _PLAIN)))
    for name, of in (("plain", plain), ("as configured", stream)):
        began, of_processor = time.perf_counter(), time.process_time()
        for step in range(1, batches + 1):
            of[step]
        pairs = batches * config.batch_size
        yield f"pairs/s, {name}", pairs / (time.perf_counter() - began)
        yield f"pairs/s of processor time, {name}", pairs / (time.process_time() - of_processor)
    yield "memory after all batches (MB)", (process.memory_info().rss - before) / 1e6
    again, seconds = _timed(lambda: PairStream(families, task.data())[batches])
    yield "resume at the last batch (s)", seconds
    yield "resumed batch is the same", float(all(np.array_equal(x, again[name]) for name, x in stream[batches].items()))


def _timed(work):
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def make(args: argparse.Namespace) -> str:
    """Write the Stockholm file and the table of its clans; return what was written."""
    pool = [alignment for path in args.input for alignment in stockholm.read(path)]
    rng, written, mean = random.Random(0), 0, sum(len(of.ids) for of in pool) / len(pool)
    rng.shuffle(pool)
    table = args.make.with_suffix(".clans.tsv")
    with files.finished(args.make, "wb") as packed, files.finished(table) as clans, gzip.open(packed, "wb", 1) as file:
        for n in tqdm(range(args.families), unit=" families", disable=None):
            of = pool[n % len(pool)]
            wanted = (args.rows - written) / (args.families - n) / mean  # share of a family's rows
            rows = sorted(rng.sample(range(len(of.ids)), min(len(of.ids), max(2, round(len(of.ids) * wanted)))))
            written += len(rows)
            names = [f"{of.ids[row]:<40} {of.rows[row].tobytes().decode()}" for row in rows]
            lines = [stockholm.HEADER, f"#=GF ID fam{n}", f"#=GF AC PF{50_000 + n}.1", *names, "//", ""]
            file.write("\n".join(lines).encode("latin-1"))
            clans.write(f"PF{50_000 + n}\t{f'CL{n // 3:04}' if n % 2 else ''}\n")
    return f"{args.make}: {args.families:,} families, {written:,} rows; clans in {table}"


if __name__ == "__main__":
    sys.exit(main())
