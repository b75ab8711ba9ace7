"""Compare runs by the last validation scores that they logged: a table, and figures along a setting.

  python scripts/compare_runs.py runs/screen/*_*                 # a row for each run
  python scripts/compare_runs.py runs/seed_*/dial-* --along=attention.tau_b --by=attention.dustbin --output=runs/dial

Runs whose folders have one name share a row, with the mean and the lowest and highest value; these runs may differ in
their seed alone. Needs neither shards nor eval.py: `log.eval_every` of the runs says when they validate.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tabulate import tabulate

import command_line
from data import files
from evaluation import figures
from training import run_folder

_SPLIT = "validation/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=command_line.path, metavar="RUN", help="folder of a run of train.py")
    parser.add_argument("--along", metavar="KEY", help="setting on the horizontal axis, for example attention.tau_b")
    parser.add_argument("--by", metavar="KEY", help="with --along: setting that has a line for each of its values")
    told = "folder for comparison.md, comparison.json and figures; default: only print the table"
    parser.add_argument("--output", type=command_line.path, metavar="FOLDER", help=told)
    args = parser.parse_args(arguments)
    if (args.by and not args.along) or (args.along and not args.output):
        parser.error("--by needs --along, and --along needs --output, the folder of its figure")
    return command_line.run("compare_runs.py", lambda: compare(args), debug=args.debug)


def compare(args: argparse.Namespace) -> None:
    """Print the table, and write it and the figures."""
    groups = grouped(args.runs)
    found = {name: [last_validation(run) for run in runs] for name, runs in groups.items()}
    scores = {name: over_seeds(name, of_runs) for name, of_runs in found.items()}
    table = markdown(scores, {name: (len(of_runs), of_runs[0][0]) for name, of_runs in found.items()})
    print(table)
    if not args.output:
        return
    lines = along({name: runs[0] for name, runs in groups.items()}, scores, args.along, args.by) if args.along else {}
    args.output.mkdir(parents=True, exist_ok=True)
    files.write(args.output / "comparison.md", table + "\n")
    files.write(args.output / "comparison.json", json.dumps(scores, indent=1) + "\n")
    figures.comparison_bars(scores, {}, args.output / "comparison.png", title="validation")
    if lines:
        figures.along_places(lines, args.output / "along.png", title=f"validation, along {args.along}")
    print(f"\nwritten: comparison.md, .json and figures in {args.output}")


def grouped(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Group runs by the name of their folder. Raises ValueError for a group that differs in more than the seed."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.absolute().name, []).append(run)
    for first, *others in groups.values():
        settings = run_folder.read_config(first).to_dict()
        seeds = {settings["seed"]: first}
        for run in others:
            config = run_folder.read_config(run).to_dict()
            found = [key for key, *_ in run_folder.differences(settings, config) if key != "seed"]
            if found:
                raise ValueError(f"{first} and {run} differ in {', '.join(found)}: give their folders different names")
            if (same := seeds.setdefault(config["seed"], run)) is not run:
                raise ValueError(f"{same} and {run} have the same seed, {config['seed']}: give one of them")
    return groups


def last_validation(run: Path) -> tuple[int, dict[str, float]]:
    """Return the step and the scores of the last validation. Raises ValueError if a run has none."""
    for row in reversed(run_folder.read_metrics(run)):
        if scores := {key.removeprefix(_SPLIT): value for key, value in row.items() if key.startswith(_SPLIT)}:
            return row["step"], scores
    raise ValueError(f"{run} has logged no validation: train with --config.log.eval_every=N, or score it with eval.py")


def over_seeds(name: str, found: list[tuple[int, dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Return the mean of each metric, with the lowest and highest value if there are several runs.

    Raises ValueError if the last validations are of different steps.
    """
    if len(steps := {step for step, _ in found}) > 1:
        raise ValueError(f"runs named {name} were validated last at steps {sorted(steps)}: finish them first")
    metrics = [metric for metric in found[0][1] if all(metric in scores for _, scores in found)]
    values = {metric: [scores[metric] for _, scores in found] for metric in metrics}
    several = len(found) > 1
    return {
        metric: {"value": fmean(of), "low": min(of) if several else None, "high": max(of) if several else None}
        for metric, of in values.items()
    }


def along(runs: dict[str, Path], scores: dict[str, dict], key: str, by: str | None) -> dict[str, dict[str, dict]]:
    """Return scores as {value of `by`: {value of `key`: scores}}. Raises ValueError for a place with two runs."""
    lines: dict[str, dict[str, dict]] = {}
    of_places: dict[tuple[str, str], str] = {}
    for name, run in runs.items():
        config = run_folder.read_config(run)
        place, line = setting(config, key), f"{by} {setting(config, by)}" if by else "validation"
        if (other := of_places.setdefault((line, place), name)) != name:
            raise ValueError(
                f"--along={key}: {other} and {name} both have {place}; leave one out, or tell them by --by"
            )
        lines.setdefault(line, {})[place] = scores[name]
    return lines


def setting(config, key: str) -> str:
    """Return the value of a dotted key as text. Raises ValueError if there is no such key."""
    value = config.to_dict()
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(
                f"{key} is no setting of the runs; configs/base.py lists them, for example attention.tau_b"
            )
        value = value[part]
    return str(value)


def markdown(scores: dict[str, dict], sizes: dict[str, tuple[int, int]]) -> str:
    """Return the table: a row for each name, with its number of runs and step, a column for each metric."""

    def cell(of: dict) -> str:
        spread = "" if of["low"] is None else f" ({of['low']:.3f} to {of['high']:.3f})"
        return f"{of['value']:.3f}{spread}"

    rows = []
    for name, found in scores.items():
        runs, step = sizes[name]
        rows.append({"": name, "runs": str(runs), "step": str(step)} | {of: cell(x) for of, x in found.items()})
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
