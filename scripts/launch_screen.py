"""Train several configurations one after the other, score each, and write one table and figures.

  python scripts/launch_screen.py                                    # the four of the screen, on the data that ship
  python scripts/launch_screen.py --data=runs/pfam --steps=500       # on larger shards
  python scripts/launch_screen.py --configs supervised --out=runs/supervised -- --config.batch_size=16
  python scripts/launch_screen.py --configs dial:0.5 dial:0.8 dial:softmax --out=runs/dial  # configs/dial.py:0.5, ...
  python scripts/launch_screen.py --dry-run                          # only prints the commands
  python scripts/launch_screen.py --target=tpu --project=P --zone=us-east5-b --bucket=gs://B   # docs/distributed.md

Start it again after any stop: finished runs are not trained again, and interrupted runs continue. Exits with 75 if
Ctrl-C or another signal stopped it, and the run is saved; a second one ends it at once, with 130.
"""

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

import command_line
from data import files
from evaluation import figures, task
from evaluation.baselines import BASELINES
from evaluation.metrics import METRICS
from scripts import launch_tpu
from training import processes, run_folder

STOPPED = 75  # exit code of a train.py that a signal stopped, and of this script then
SCREEN = ("r1_balanced", "r2_balanced", "r1_dustbin", "r2_dustbin")
SPLITS = ("validation", *task.SPLITS["test"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    args = _parse(parser, arguments)

    def work() -> None:
        (on_tpu if args.target == "tpu" else here)(args)
        if not args.dry_run:
            collect(args.configs, args.out)

    also = launch_tpu.LaunchError, subprocess.CalledProcessError
    return command_line.run("launch_screen.py", work, debug=args.debug, also=also)


def here(args: argparse.Namespace) -> None:
    """Run every command on this machine."""
    # The same programs are compiled again when a run resumes or is scored; on a CPU that takes minutes.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(args.out.absolute() / "compiled")} | os.environ
    for command in (command for name in args.configs for command in commands(name, args)):
        print("$", shlex.join(command), flush=True)
        if not args.dry_run:
            status, signals = run_child(command, environment)
            if signals or status == STOPPED:
                sys.exit(STOPPED if signals < 2 else command_line.INTERRUPTED)  # the run has said that it is saved
            if status:
                sys.exit(f"launch_screen.py: {command[1]} ended with exit status {status}, it says why above")


def run_child(command: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """Run a command that gets the signals of this process; return its exit status, and how many signals came.

    Its process group is its own: a terminal would send it each Ctrl-C a second time, which ends it without saving.
    """
    process: subprocess.Popen | None = None
    signals, missed = list[int](), list[int]()

    def pass_on(number: int, frame: object) -> None:
        signals.append(number)
        process.send_signal(number) if process else missed.append(number)

    def pause(number: int, frame: object) -> None:
        if process:
            process.send_signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            process.send_signal(signal.SIGCONT)

    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), pass_on) | {signal.SIGTSTP: pause}
    heeded = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    try:
        process = subprocess.Popen(command, cwd=launch_tpu.ROOT, env=environment, process_group=0)
        for number in missed:
            process.send_signal(number)
        with processes.ended_with_parent(process.pid, signal.SIGTERM):
            return process.wait(), len(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_tpu(args: argparse.Namespace) -> None:
    """Run the screen on a TPU's machine, and copy its runs here."""
    given = {"steps": args.steps, "limit": args.limit}
    arguments = [f"--{option}={value}" for option, value in given.items() if value is not None]
    arguments += ["--configs", *args.configs, "--", *args.overrides]
    folder, data = f"{args.bucket.rstrip('/')}/{args.name}", args.data and args.data.absolute()
    of_google = args.name, args.project, args.zone, folder, args.accelerator, not args.on_demand
    tpu = launch_tpu.Tpu(*of_google, data, tuple(arguments), args.snapshot_every, args.poll_every)
    launch_tpu.show(tpu) if args.dry_run else launch_tpu.run(tpu, args.out)


def commands(name: str, args: argparse.Namespace) -> list[list[str]]:
    """List the command of training, then of scores before and after it."""
    workdir, (config, colon, place) = args.out.absolute() / folder_of(name), name.partition(":")
    train = [sys.executable, "train.py", f"--config=configs/{config}.py{colon}{place}", f"--workdir={workdir}"]
    train += [f"--config.data.dir={args.data.absolute()}"] if args.data else []
    train += [f"--config.total_steps={args.steps}"] if args.steps else []
    # Step 0 is a multiple of everything, so this keeps it.
    train += [f"--config.checkpoint.keep_every={args.steps or 10**9}", *args.overrides]
    score = [sys.executable, "eval.py", f"--workdir={workdir}", *([f"--limit={args.limit}"] if args.limit else [])]
    result = [train]
    for split, (when, step) in itertools.product(SPLITS, (("end", []), ("start", ["--step=0"]))):
        result.append([*score, f"--split={split}", *step, f"--output={workdir / f'{when}_{split}.json'}"])
    return result


def folder_of(name: str) -> str:
    config, _, place = name.partition(":")
    return run_folder.name_of(config, place)


def collect(names: list[str], out: Path) -> None:
    """Write screen.md, screen.json and the figures from the reports of every run."""
    arguments = {folder_of(name): name.partition(":")[::2] for name in names}
    names = list(arguments)

    def read(name: str, when: str, split: str) -> dict:
        return json.loads((out / name / f"{when}_{split}.json").read_text())["splits"][split]

    runs = {name: ((name, "start"), (name, "end")) for name in names}
    report = {split: {name: [read(*of, split) for of in pair] for name, pair in runs.items()} for split in SPLITS}
    files.write(out / "screen.json", json.dumps(report, indent=1) + "\n")
    text = "\n\n".join(f"### {split}\n\n{markdown(of_runs)}" for split, of_runs in report.items())
    files.write(out / "screen.md", text + "\n")
    curves = {name: run_folder.read_metrics(out / name) for name in names}
    if any(key.startswith("validation/") for rows in curves.values() for row in rows for key in row):
        figures.screen_figure(curves, out / "curves.png")
    for split, of_runs in report.items():
        ends = {name: end["model"]["overall"] for name, (_, end) in of_runs.items()}
        baselines = {who: next(iter(of_runs.values()))[1][who]["overall"] for who in BASELINES}
        figures.comparison_bars(ends, baselines, out / f"{split}.png", title=split)
        if lines := along_places(ends, arguments):
            figures.along_places(lines, out / f"{split}_places.png", title=split)
    print(f"{text}\n\nwritten: {out / 'screen.md'}, screen.json and figures beside it")


def along_places(ends: dict[str, dict], arguments: dict[str, tuple[str, str]]) -> dict[str, dict[str, dict]]:
    """Return the runs whose configurations have arguments: the first part is a place, and the rest names a line."""
    lines: dict[str, dict[str, dict]] = {}
    for name, (config, argument) in arguments.items():
        place, _, rest = argument.partition(",")
        if place:
            lines.setdefault(f"{config}, {rest}" if rest else config, {})[place] = ends[name]
    return lines


def markdown(of_runs: dict[str, list[dict]]) -> str:
    """Return one split as a table: every run from its first to its last step, then the baselines."""
    rows, (_, first) = [], next(iter(of_runs.values()))
    for name, reports in of_runs.items():
        start, end = (report["model"]["overall"] for report in reports)
        rows.append({"": name} | {of: f"{start[of]['value']:.2f} → {end[of]['value']:.3f}" for of in METRICS})
    for who in BASELINES:
        rows.append({"": who} | {of: f"{x['value']:.3f}" for of, x in first[who]["overall"].items()})
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _parser() -> command_line.Parser:
    parser, path, natural = command_line.Parser(__doc__), command_line.path, command_line.at_least(1)
    parser.add_argument("--configs", nargs="+", default=list(SCREEN), help=f"default: {' '.join(SCREEN)}")
    parser.add_argument("--out", type=path, default=Path("runs/screen"), help="folder of the runs and the table")
    parser.add_argument("--data", type=path, help="shards made by build_pfam.py; default: those that ship")
    told = "total_steps of every run; default: the configuration's"
    parser.add_argument("--steps", type=natural, metavar="N", help=told)
    told = "score at most this many pairs a split, for a quick look"
    parser.add_argument("--limit", type=natural, metavar="N", help=told)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("overrides", nargs="*", help="after --: further options for train.py")
    parser.add_argument("--target", choices=("local", "tpu"), default="local", help="where; default: local")
    tpu = parser.add_argument_group("with --target=tpu (docs/distributed.md)")
    tpu.add_argument("--project", help="Google Cloud project")
    tpu.add_argument("--zone", help="zone with TPUs of the kind, for example us-east5-b")
    tpu.add_argument("--bucket", metavar="gs://BUCKET", help="code, data and runs are kept in BUCKET/NAME")
    tpu.add_argument("--name", default="ot-screen", help="name of the TPU and the screen; default: ot-screen")
    tpu.add_argument("--accelerator", choices=launch_tpu.RUNTIMES, default="v6e-8", help="default: v6e-8")
    tpu.add_argument("--on-demand", action="store_true", help="a TPU that is never preempted, at a higher price")
    tpu.add_argument("--snapshot-every", type=natural, default=120, metavar="S", help="seconds; default: 120")
    tpu.add_argument("--poll-every", type=natural, default=30, metavar="S", help="seconds; default: 30")
    return parser


def _parse(parser: command_line.Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    known = sorted(path.stem for path in (launch_tpu.ROOT / "configs").glob("*.py"))
    if unknown := [name for name in args.configs if name.partition(":")[0] not in known]:
        parser.error(f"--configs: {', '.join(unknown)} not found in configs/; there are {', '.join(known)}")
    if args.target == "tpu":
        if missing := [f"--{name}" for name in ("project", "zone", "bucket") if not getattr(args, name)]:
            parser.error(f"--target=tpu needs {', '.join(missing)}")
        if not args.bucket.startswith("gs://"):
            parser.error(f"--bucket={args.bucket} must begin with gs://")
    return args


if __name__ == "__main__":
    sys.exit(main())
