"""Draw the pairs of a training batch, with everything that was done to them.

python scripts/show_batch.py --config=configs/aligner.py --output=runs/batch.png
python scripts/show_batch.py --config=configs/aligner.py --config.data.dir=runs/pfam:1,runs/hmm:0.5 --step=7 --pairs=20
python scripts/show_batch.py --config=configs/r2_dustbin.py --config.data.flanks=1 --config.data.negatives=0.2

Each pair is two bars, x above y. Blue stretches between them are aligned, the darker, the more of their residues are
identical. Orange residues are unrelated flanks. A pair of different families is negative: nothing is aligned.
Batches are a function of data, settings and step, so this is what a run of the same options trains on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

import command_line
from data import files, vocab
from data.index import Families
from data.pipeline import Example, PairStream
from data.transforms import NO_TARGET, pair_identity
from evaluation import figures, tasks
from evaluation.alignment import AlignmentTask, open_families


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line.Parser(
        __doc__, usage="show_batch.py --config=FILE [--config.KEY=VALUE ...] [options]", allow_abbrev=False
    )
    parser.add_argument("--step", type=command_line.at_least(0), default=0, metavar="N", help="default: 0, the first")
    parser.add_argument("--pairs", type=command_line.at_least(1), default=12, metavar="N", help="at most; default: 12")
    parser.add_argument("--output", type=command_line.path, default=Path("runs/batch.png"), metavar="FILE.png")
    args, config = command_line.parse_with_config(parser, arguments)
    return command_line.run("show_batch.py", lambda: print(show(args, config)), debug=args.debug)


def show(args: argparse.Namespace, config: ConfigDict) -> str:
    """Draw the batch; return what was drawn, and where."""
    files.check_writable(args.output)
    config = tasks.checked(config)
    task = tasks.task_of(config)
    if not isinstance(task, AlignmentTask):
        raise ValueError(f"task={config.task!r} has no pairs to draw; give a configuration that aligns")
    families = open_families(config.data.dir, "train")
    stream = PairStream(families, task.data())
    length, examples = stream.examples(args.step)
    chosen = examples[: args.pairs]
    title = f"step {args.step}: {len(chosen)} of {len(examples)} pairs, padded to {length} residues"
    figures.training_pairs([picture(example, families) for example in chosen], args.output, title=title)
    return f"{stream.description()}\n{title}\nwritten: {args.output}"


def picture(example: Example, families: Families) -> figures.PairPicture:
    """Return what is drawn of a pair."""
    (x, y, target), (x_family, i, y_family, j) = example.pair, example.id
    identical = (target != NO_TARGET) & (x == y[target]) & (x != vocab.X)
    names = dict.fromkeys(families[family].accession for family in (x_family, y_family))
    identity = pair_identity(example.pair)
    told = f"identity {identity:.0%}" if np.isfinite(identity) else "nothing aligned"
    changes = ", ".join(example.changes) or "as it is"
    title = f"{' and '.join(names)}, rows {i} and {j}: {told}; {changes}"
    return figures.PairPicture(title, len(x), len(y), target, identical, example.ends)


if __name__ == "__main__":
    sys.exit(main())
