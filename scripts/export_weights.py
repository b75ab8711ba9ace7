"""Write the averaged parameters of a run, and its configuration, into one safetensors file.

python scripts/export_weights.py --workdir=runs/aligner --output=weights/aligner.safetensors
python eval.py --weights=weights/aligner.safetensors --data=runs/pfam
"""

import argparse
import sys

import command_line
from evaluation import model_options, runs
from models import weights


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line.Parser(__doc__)
    model_options.add_model_options(parser, asap=False)
    parser.add_argument("--output", type=command_line.path, required=True, metavar="FILE.safetensors")
    parser.add_argument(
        "--band", type=int, help="half-width in place of the trained one, -1 for all; parameters do not depend on it"
    )
    args = model_options.parse(parser, argv)
    return command_line.run("export_weights.py", lambda: export(args), debug=args.debug)


def export(args: argparse.Namespace) -> None:
    """Load the model, change what the options change, and write it."""
    run = model_options.load(args)
    runs.check_aligns(run)
    if args.band is not None:
        run.config.attention.band = args.band
        runs.make_trainer(run.config)  # refuses a band out of range
    weights.save(args.output, run.params, run.config.to_dict(), run.step)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, step {run.step}")


if __name__ == "__main__":
    sys.exit(main())
