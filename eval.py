"""Score a trained model on held-out families, beside two diagonals and Needleman-Wunsch on the same pairs.

python eval.py --workdir=runs/r2_balanced                          # both test splits, table, JSON and figures
python eval.py --workdir=runs/r2_balanced --split=validation --step=0
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

from absl import logging
from tabulate import tabulate

from evaluation import figures, model_options
from evaluation.report import Examples, write_html
from evaluation.tasks import SPLITS
from models.attention import Certificate
from training.run_folder import read_metrics


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; print the table, or exit with one line that says what is wrong."""
    args = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what it reads is read-only
    try:
        print(_evaluate(args, shlex.join(sys.argv[1:] if arguments is None else arguments)))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


def _evaluate(args: argparse.Namespace, command: str) -> str:
    """Evaluate and write all files; return the table and the names of the files."""
    run = model_options.load(args)
    folder, suffix = args.workdir or Path("runs") / f"eval_{args.weights.stem}", "_asap" if args.asap else ""
    pictures, output = folder / f"figures{suffix}", args.output or folder / f"eval_{args.split}{suffix}.json"
    examples = Examples() if args.report else None
    options = {"data_dir": args.data, "limit": args.limit, "examples": examples}
    report = run.task.evaluate(run, args.split, pictures=pictures, **options)
    report |= {"asap": str(args.asap)} if args.asap else {}
    rows = read_metrics(args.workdir) if args.workdir else []
    if rows:
        pictures.mkdir(parents=True, exist_ok=True)
        figures.metric_curves(rows, pictures / "training.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    told = [table(report), f"\nwritten: {output}" + (f", figures in {pictures}" if pictures.exists() else "")]
    if examples:
        write_html(args.report / "report.html", report, examples, rows, f"python eval.py {command}")
        told.append(f"the page: {args.report / 'report.html'}")
    return "\n".join(told)


def table(report: dict) -> str:
    """Return as text every metric with its interval for every split, one metric by bin, and the certificates."""
    return "\n".join(_table_of_split(report, split) for split in report["splits"])


def _table_of_split(report: dict, split: str) -> str:
    result = report["splits"][split]
    model, is_sorting = result["model"], "exact_match" in result["model"]["overall"]
    unit, resampled = ("sequences", "sequences") if is_sorting else ("pairs", "families")
    asap = f", compiled by {report['asap']}" if "asap" in report else ""
    title = f"\n{split}: {model['pairs']} {unit}, step {report['step']}{asap}; 95 % intervals over {resampled}"
    rows = [[name, *(_cell(of["overall"].get(name)) for of in result.values())] for name in model["overall"]]
    metric, label = ("exact_match", "exact match, length") if is_sorting else ("f1", "f1, identity")
    for name in model["bins"]:
        rows.append([f"{label} {name}", *(f"{of['bins'][name][metric]['value']:.3f}" for of in result.values())])
    parts = [title, _text(rows, ["", *result])]
    return "\n".join(parts if is_sorting else [*parts, _certificates(report["certificates"][split])])


def _certificates(layers: dict[str, dict]) -> str:
    def cell(spread: dict) -> str:
        return " / ".join("inf" if x is None else f"{x:.2g}" for x in (spread["median"], spread["worst"]))

    rows = [[layer, *(cell(spread[name]) for name in Certificate._fields)] for layer, spread in layers.items()]
    return _text(rows, ["median / worst", *Certificate._fields])


def _text(rows: list[list[str]], head: list[str]) -> str:
    align = ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, tablefmt="plain", colalign=align, disable_numparse=True)


def _cell(metric: dict | None) -> str:
    return "-" if metric is None else f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options.add_model_options(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test, which is both test splits")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: eval_SPLIT.json in WORKDIR or in runs/eval_NAME of the weights"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="also writes one page, DIR/report.html")
    parser.add_argument("--data", help="folder with other shards than those the run was trained on")
    parser.add_argument("--limit", type=int, help="at most this many pairs a split, for a quick look")
    return model_options.parse(parser, arguments)


if __name__ == "__main__":
    main()
