"""Score a trained model on held-out families, beside two diagonals and Needleman-Wunsch on the same pairs.

python eval.py --workdir=runs/r2_balanced                          # both test splits, table, JSON and figures
python eval.py --workdir=runs/r2_balanced --split=validation --step=0
python eval.py --workdir=runs/r2_balanced --split=test_ood_flanked   # unrelated residues at their ends
python eval.py --workdir=runs/r2_balanced --split=negatives        # told from unrelated pairs?
python eval.py --workdir=runs/r2_balanced --data=runs/pfam --output=table.json
python eval.py --workdir=runs/r2_balanced --report=runs/report   # also one HTML page, with alignments
python eval.py --weights=weights/aligner.safetensors --data=runs/pfam --split=test_ood
python eval.py --workdir=runs/r2_dustbin --asap=runs/r2_dustbin/asap.safetensors   # of scripts/compile_asap.py

An aligner is scored as scripts/align.py runs it, with its own decoder: same padding, same band, same decoding.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

import command_line
from data import files
from evaluation import figures, metrics, model_options
from evaluation.report import Examples, write_html
from evaluation.task import SPLITS
from models.attention import Certificate
from training.run_folder import read_metrics

_NO_INTERVAL = "(?)"
# Metric that is told by bin, and its label; the first that a report has.
_BINNED = {"exact_match": "exact match, length", "perplexity": "perplexity, length", "f1": "f1, identity"}
_CONFIDENCE = (
    "confidence: {stated:.3f} on average over {pairs:,} aligned residue pairs, of which {right:.3f} are right; "
    "calibration error {error:.3f}"
)
_FOOTNOTES = {
    _NO_INTERVAL: f"no interval: fewer than {metrics.LEAST_FAMILIES} {{resampled}} have the metric",
    "*": f"fewer than {metrics.FEW_PAIRS} {{unit}}: chance decides",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = _parser()
    args = model_options.parse(parser, arguments)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    return command_line.run("eval.py", lambda: print(_evaluate(args, given)), debug=args.debug, threads=args.threads)


def _evaluate(args: argparse.Namespace, command: str) -> str:
    """Evaluate and write all files; return the table and the names of the files."""
    folder, suffix = args.workdir or Path("runs") / f"eval_{args.weights.stem}", "_asap" if args.asap else ""
    pictures, output = folder / f"figures{suffix}", args.output or folder / f"eval_{args.split}{suffix}.json"
    page = args.report and args.report / "report.html"
    run = model_options.load(args)
    for path in filter(None, (output, page)):
        files.check_writable(path)
    rows = read_metrics(args.workdir) if args.workdir else []
    examples = Examples() if page else None
    options = {"data_dir": args.data, "limit": args.limit, "examples": examples}
    report = run.task.evaluate(run, args.split, pictures=pictures, **options)
    report |= {"asap": str(args.asap)} if args.asap else {}
    if rows:
        figures.metric_curves(rows, pictures / "training.png")
    files.write(output, json.dumps(report, indent=1) + "\n")
    told = [table(report), f"\nwritten: {output}" + (f", figures in {pictures}" if pictures.exists() else "")]
    if page:
        write_html(page, report, examples or Examples(), rows, f"python eval.py {command}")
        told.append(f"the page: {page}")
    return "\n".join(told)


def table(report: dict) -> str:
    """Return as text every metric with its interval for every split, one metric by bin, and the certificates."""
    return "\n".join(_table_of_split(report, split) for split in report["splits"])


def _table_of_split(report: dict, split: str) -> str:
    result = report["splits"][split]
    model = result["model"]
    metric = next((name for name in _BINNED if name in model["overall"]), "f1")
    of_sequences = metric != "f1"
    size = {"pairs": "sequences"} if of_sequences else {"pairs": "pairs", "families": "families"}
    unit, resampled = size["pairs"], "sequences" if of_sequences else "families"
    asap = f", compiled by {report['asap']}" if "asap" in report else ""
    counts = " of ".join(f"{model[key]} {name}" for key, name in size.items())
    title = f"\n{split}: {counts}, step {report['step']}{asap}; 95 % intervals over {resampled}"
    rows = [[name, *(_cell(of["overall"].get(name)) for of in result.values())] for name in model["overall"]]
    parts = [title, _text(rows, ["", *result])]
    label, bins = _BINNED[metric], []
    for name, of_bin in model["bins"].items():
        sizes = [str(of_bin[key]) for key in size]
        sizes[0] += " *" if of_bin["pairs"] < metrics.FEW_PAIRS else ""
        values = (of["bins"].get(name, {}).get(metric) for of in result.values())
        bins.append([f"{label} {name}", *sizes, *("-" if of is None else f"{of['value']:.3f}" for of in values)])
    parts += [_text(bins, ["", *size.values(), *result])] if bins else []
    if stated := report.get("calibration", {}).get(split):
        parts.append(_CONFIDENCE.format(**stated))
    certificates = report.get("certificates", {}).get(split)  # neither of sorting nor of negatives
    text = "\n".join([*parts, _certificates(certificates)] if certificates is not None else parts)
    found = [f"{mark} {told}".format(unit=unit, resampled=resampled) for mark, told in _FOOTNOTES.items()]
    return "\n".join([text, *(line for line, mark in zip(found, _FOOTNOTES, strict=True) if f" {mark}" in text)])


def _certificates(layers: dict[str, dict]) -> str:
    def cell(spread: dict) -> str:
        return " / ".join("inf" if x is None else f"{x:.2g}" for x in (spread["median"], spread["worst"]))

    rows = [[layer, *(cell(spread[name]) for name in Certificate._fields)] for layer, spread in layers.items()]
    return _text(rows, ["median / worst", *Certificate._fields])


def _text(rows: list[list[str]], head: list[str]) -> str:
    align = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, tablefmt="plain", colalign=align, disable_numparse=True)


def _cell(metric: dict | None) -> str:
    if metric is None:
        return "-"
    interval = _NO_INTERVAL if metric["low"] is None else f"({metric['low']:.3f}-{metric['high']:.3f})"
    return f"{metric['value']:.3f} {interval}"


def _parser() -> command_line.Parser:
    parser = command_line.Parser(__doc__, threads=True)
    model_options.add_model_options(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test, which is both test splits")
    where = "JSON file; default: eval_SPLIT.json in WORKDIR or in runs/eval_NAME of the weights"
    parser.add_argument("--output", type=command_line.path, metavar="FILE", help=where)
    parser.add_argument("--report", type=command_line.path, metavar="DIR", help="also writes one page, DIR/report.html")
    told = "folder with other shards than those the run was trained on"
    parser.add_argument("--data", type=command_line.file_name, metavar="DIR", help=told)
    told = "at most this many pairs a split, for a quick look"
    parser.add_argument("--limit", type=command_line.at_least(1), metavar="N", help=told)
    return parser


if __name__ == "__main__":
    sys.exit(main())
