"""Scores a trained run on held-out families, beside two diagonals and Needleman-Wunsch on the same pairs.

python eval.py --workdir=runs/r2_balanced                          # both test splits, table, JSON and figures
python eval.py --workdir=runs/r2_balanced --split=validation --step=0
python eval.py --workdir=runs/r2_balanced --data=runs/pfam --output=table.json
python eval.py --workdir=runs/r2_balanced --report=runs/report   # also one HTML page, with alignments
python eval.py --weights=weights/aligner.safetensors --data=runs/pfam --split=test_ood
python eval.py --workdir=runs/r2_dustbin --asap=runs/r2_dustbin/asap.safetensors   # of scripts/compile_asap.py
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from evaluation import figures
from evaluation.report import Examples, write_html
from evaluation.runs import load_run, load_weights, with_asap
from evaluation.tasks import SPLITS
from models.attention import Certificate
from training.run_folder import read_metrics


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what it reads is read-only
    try:
        report = _evaluate(args, shlex.join(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    print(report)


def _evaluate(args: argparse.Namespace, command: str) -> str:
    """Evaluate and write all files; the table, and where the files are, is what is printed."""
    run = load_weights(args.weights) if args.weights else load_run(args.workdir, args.step)
    run = with_asap(run, args.asap) if args.asap else run
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
    """Every metric with its interval for every split, and F1 by identity bin, as text."""
    lines = []
    for split, result in report["splits"].items():
        pairs, sorted_ones = result["model"]["pairs"], "exact_match" in result["model"]["overall"]
        of, over = ("sequences", "sequences") if sorted_ones else ("pairs", "families")
        told = f"step {report['step']}" + (f", compiled by {report['asap']}" if "asap" in report else "")
        lines += [f"\n{split}: {pairs} {of}, {told}; 95 % intervals over {over}"]
        names = list(result["model"]["overall"])
        lines.append(f"{'':24}" + "".join(f"{who:>24}" for who in result))
        for name in names:
            cells = [_cell(summary["overall"].get(name)) for summary in result.values()]
            lines.append(f"{name:24}" + "".join(f"{cell:>24}" for cell in cells))
        metric, of_bin = ("exact_match", "exact match, length ") if sorted_ones else ("f1", "f1, identity ")
        for name in result["model"]["bins"]:
            cells = [f"{summary['bins'][name][metric]['value']:.3f}" for summary in result.values()]
            lines.append(f"{of_bin + name:24}" + "".join(f"{cell:>24}" for cell in cells))
        if not sorted_ones:
            lines += _certificate_lines(report["certificates"][split])
    return "\n".join(lines)


def _certificate_lines(layers: dict[str, dict]) -> list[str]:
    names = Certificate._fields
    lines = [f"{'median / worst':24}" + "".join(f"{name:>20}" for name in names)]
    for layer, spread in layers.items():
        cells = (" / ".join(_number(spread[name][which]) for which in ("median", "worst")) for name in names)
        lines.append(f"{layer:24}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2g}"


def _cell(metric: dict | None) -> str:
    return "-" if metric is None else f"{metric['value']:.3f} ({metric['low']:.3f}-{metric['high']:.3f})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="folder of the run, as given to train.py")
    model.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="instead of a run: weights alone")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test, which is both test splits")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: eval_SPLIT.json in WORKDIR or in runs/eval_NAME of the weights"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="also writes one page, DIR/report.html")
    parser.add_argument(
        "--asap", type=Path, metavar="FILE", help="maps of scripts/compile_asap.py in place of Sinkhorn's steps"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--data", help="folder with other shards than those the run was trained on")
    parser.add_argument("--limit", type=int, help="at most this many pairs a split, for a quick look")
    args = parser.parse_args(arguments)
    if args.weights and args.step is not None:
        parser.error("--step chooses a checkpoint of --workdir; --weights holds a single step")
    return args


if __name__ == "__main__":
    main()
