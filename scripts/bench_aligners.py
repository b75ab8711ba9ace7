"""Run the aligner and others that are installed on the same pairs: F1, calibration and processor time in one table.

python scripts/bench_aligners.py --data=runs/scop40 --split=test_ood --peers=all --output=runs/bench/scop40.json
python scripts/bench_aligners.py --data=runs/pfam --split=test_ood_flanked --limit=400 --peers=muscle5,probcons
python scripts/bench_aligners.py --pairs=pairs.jsonl.gz --plot=runs/bench/pairs.png    # lines: {"x", "y", "ref"}
python scripts/bench_aligners.py --workdir=runs/aligner --data=runs/pfam --output=runs/bench/pfam.json --resume
python scripts/bench_aligners.py --no-model --data=runs/pfam --jobs=2         # the peers alone

Peers are parasail's algorithms (BLOSUM62, gaps 11 and 1) and programs on the PATH, each with its usual settings and on
one thread. A pair that a peer fails on counts as not aligned. F1 of a split counts as in eval.py: F1 is of all residue
pairs together, mean F1 the mean over pairs of sequences. In a file of --pairs, a predicted residue pair counts where
the reference covers one of its residues.

CPU seconds are user and system time of the programs, or of this process. The model aligns all pairs twice, and the
second time counts, when its programs are compiled. Other work on the machine makes times longer.

OUTPUT is written after each aligner. --resume keeps what it holds of the same pairs, and measures the model, and peers
that are missing or have another version.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

# Slow imports (the model, matplotlib) stand where they are needed: errors in the input appear at once.
import command_line
from alignment.aligner import WEIGHTS
from benchmarks import aligners, peers
from benchmarks.aligners import Entry
from data import files
from evaluation import model_options

if TYPE_CHECKING:
    from alignment.inference import Pretrained

_TITLES = {"f1": "F1", "mean_f1": "mean F1", "precision": "precision", "recall": "recall"}
_BEST = " *"
_PICTURES = (".png", ".pdf", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    args = model_options.parse(parser, arguments)
    if args.no_model and (args.weights or args.workdir):
        parser.error("--no-model measures the peers alone; leave out --weights and --workdir")
    if args.resume and not args.output:
        parser.error("--resume adds to the file of --output; name it")
    if args.name in peers.NAMES:
        parser.error(f"--name={args.name} is a peer's; choose another")
    return command_line.run("bench_aligners.py", lambda: compare(args), debug=args.debug, threads=args.threads)


def compare(args: argparse.Namespace) -> None:
    """Measure the aligners, and print the tables."""
    for path in filter(None, (args.output, args.plot)):
        files.check_writable(path)
    if args.pairs:
        pairs = aligners.of_file(args.pairs, args.limit)
    else:
        pairs = aligners.of_split(args.data, args.split, args.limit)
    results = aligners.Results(args.output, pairs.described(), resume=args.resume)
    found, missing = peers.find(args.peers)
    if missing:
        packages = " ".join(peers.TOOLS[name].package for name in missing)
        print(f"not found, and left out: {', '.join(missing)} (Debian packages: {packages})", flush=True)
    if not args.no_model:
        model, version = _model(args)
        results.add(args.name, aligners.measure_model(model, pairs, args.name, version))
    for peer in found:
        if not results.has(peer):
            results.add(peer.name, aligners.measure_peer(peer, pairs, args.jobs))
    if not results.aligners:
        raise ValueError("--no-model and --peers=none leave nothing to measure")
    print(report(results.aligners, "" if args.no_model else args.name))
    if args.plot:
        _draw(results.aligners, args.plot, "mean_f1" if pairs.covered else "f1")


def _model(args: argparse.Namespace) -> tuple["Pretrained", str]:
    """Load the model as scripts/align.py does; return also the name of its version."""
    if args.workdir:
        run = model_options.load(args)
        return run.pretrained(), f"{args.workdir.name}, step {run.step}"
    from alignment.inference import Pretrained

    path = args.weights or WEIGHTS
    model = Pretrained.load(path)
    return model, f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def report(entries: dict[str, Entry], model: str = "") -> str:
    """Return all results as text, best values with a star; `model` is compared with the peers in plain lines."""
    parts = [_overall(entries)]
    parts += [f"{_TITLES[metric]} by identity\n{_by_bin(entries, metric)}" for metric in ("f1", "mean_f1")]
    parts += [_calibration(name, of["calibration"]) for name, of in entries.items() if "calibration" in of]
    parts += [
        f"{name} failed on {of['failures']['count']} of {of['pairs']} pairs, first: {of['failures']['first'][:300]}"
        for name, of in entries.items()
        if of["failures"]["count"]
    ]
    parts += [ahead(entries, model, metric) for metric in ("f1", "mean_f1") if model]
    return "\n\n".join(parts)


def _overall(entries: dict[str, Entry]) -> str:
    size = next(iter(entries.values()))
    columns = [_column(entries, lambda of, name=name: of["overall"].get(name, {}).get("value")) for name in _TITLES]
    columns.append(_column(entries, lambda of: of["cpu_seconds_per_1000_pairs"], least=True, form="{:.3g}"))
    head = [*_TITLES.values(), "CPU s / 1,000", "failed"]
    columns.append([str(of["failures"]["count"]) for of in entries.values()])
    title = f"{size['pairs']} pairs of {size['families']} families; best of each column with a star"
    return f"{title}\n{_table(entries, head, columns)}"


def _by_bin(entries: dict[str, Entry], metric: str) -> str:
    bins = next(iter(entries.values()))["bins"]
    columns = [_column(entries, lambda of, name=name: of["bins"][name].get(metric, {}).get("value")) for name in bins]
    return _table(entries, [f"{name}\n{of['pairs']} pairs" for name, of in bins.items()], columns)


def _calibration(who: str, groups: dict[str, dict[str, float]]) -> str:
    rows = [
        [name, f"{of['pairs']}", *(f"{of[key]:.3f}" for key in ("stated", "right", "error"))]
        for name, of in groups.items()
    ]
    head = ["", "residue pairs", "mean confidence", "share that is right", "calibration error"]
    text = tabulate(rows, head, tablefmt="plain", colalign=("left", *["right"] * 4), disable_numparse=True)
    return f"confidence of {who}; expected calibration error over tenths\n{text}"


def _column(
    entries: dict[str, Entry], value: Callable[[Entry], float | None], *, least: bool = False, form: str = "{:.3f}"
) -> list[str]:
    """Return a column of a table, in which the best values have a star."""
    shown = ["-" if (number := value(of)) is None else form.format(number) for of in entries.values()]
    numbers = [float(text) for text in shown if text != "-"]
    best = (min if least else max)(numbers, default=None)
    # The blank under the star keeps the digits of a column below each other.
    return [text + (_BEST if text != "-" and float(text) == best else " " * len(_BEST)) for text in shown]


def _table(entries: dict[str, Entry], head: list[str], columns: list[list[str]]) -> str:
    rows = [[who, *cells] for who, cells in zip(entries, zip(*columns, strict=True), strict=True)]
    align = ("left", *["right"] * len(head))
    options = {"tablefmt": "plain", "colalign": align, "disable_numparse": True, "preserve_whitespace": True}
    return tabulate(rows, ["", *(f"{of}" for of in head)], **options)


def ahead(entries: dict[str, Entry], model: str, metric: str) -> str:
    """Return a line that names each peer with a higher value than the model, overall and in each bin of identity."""
    groups: dict[str, Callable[[Entry], Entry]] = {"overall": lambda of: of["overall"]}
    for name, of_bin in entries[model]["bins"].items():
        groups[f"{name} ({of_bin['pairs']} pairs)"] = lambda of, name=name: of["bins"][name]
    told = []
    for title, group in groups.items():
        ours = group(entries[model]).get(metric, {}).get("value")
        values = {who: group(of).get(metric, {}).get("value") for who, of in entries.items() if of["kind"] == "peer"}
        better = {who: of for who, of in values.items() if of is not None and ours is not None and of > ours}
        if better:
            names = ", ".join(f"{who} {of:.3f}" for who, of in sorted(better.items(), key=lambda of: -of[1]))
            told.append(f"{title}: {names} ({model} {ours:.3f})")
    if not told:
        return f"No peer is ahead of {model} in {_TITLES[metric]}, overall or in any bin."
    return f"Ahead of {model} in {_TITLES[metric]}: {'; '.join(told)}."


def _draw(entries: dict[str, Entry], path: Path, metric: str) -> None:
    """Draw a panel for all pairs and one for each bin, models in colour."""
    from evaluation import figures

    def bars(kind: str) -> dict[str, dict]:
        return {
            who: {
                f"{name} ({of['pairs']} pairs)": of[metric]
                for name, of in {"all": entry | entry["overall"], **entry["bins"]}.items()
                if metric in of
            }
            for who, entry in entries.items()
            if entry["kind"] == kind
        }

    title = f"{_TITLES[metric]} by identity, 95 % intervals over families"
    figures.comparison_bars(bars("model"), bars("peer"), path, title=title)


def _picture(text: str) -> Path:
    path = command_line.path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} was given; names of pictures end in {', '.join(_PICTURES)}")
    return path


def _peers(text: str) -> Sequence[str] | None:
    try:
        return peers.chosen(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> command_line.Parser:
    parser, natural = command_line.Parser(__doc__, threads=True), command_line.at_least(1)
    add = parser.add_argument
    add("--data", type=command_line.file_name, default="data/default", metavar="DIR", help="default: %(default)s")
    add("--split", choices=aligners.SPLITS, default="test_ood", help="of the data; default: %(default)s")
    told = "pairs of this file instead: JSON lines, plain or packed, with x, y and ref, a list of positions [i, j]"
    add("--pairs", type=command_line.path, metavar="FILE.jsonl", help=told)
    told = "at most this many pairs, spread over the families of a split (of any length), or the first of a file"
    add("--limit", type=natural, metavar="N", help=told)
    told = f"{peers.ALL} that are installed (default), {peers.NONE}, or some that must be: {', '.join(peers.NAMES)}"
    add("--peers", type=_peers, metavar="NAME,NAME", help=told)
    model_options.add_model_options(parser, default="weights/aligner.safetensors", asap=False)
    add("--no-model", action="store_true", help="measure the peers alone")
    add("--name", default="ours", help="of the model in the tables; default: %(default)s")
    add("--jobs", type=natural, default=1, metavar="N", help="programs to run at once; default: %(default)s")
    add("--output", type=command_line.path, metavar="FILE", help="JSON file, written after each aligner")
    add("--resume", action="store_true", help="keep what OUTPUT holds of peers on the same pairs")
    add("--plot", type=_picture, metavar="FILE.png", help="draw F1 by identity; or .pdf, .svg")
    return parser


if __name__ == "__main__":
    sys.exit(main())
