"""Write the averaged parameters of a run, and its configuration, into one safetensors file.

python scripts/export_weights.py --workdir=runs/aligner --output=weights/aligner.safetensors
python eval.py --weights=weights/aligner.safetensors --data=runs/pfam
"""

import argparse
import math
import sys

import jax.numpy as jnp

import command_line
from models.decoding import Gaps
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
    parser.add_argument(
        "--gaps",
        type=float,
        nargs=3,
        metavar=("SHARPNESS", "MATCH", "OPENING"),
        help="log-weights of the pair HMM in place of the learned ones, for instance chosen for F1 on validation pairs",
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
    if args.gaps:
        set_gaps(run, Gaps(*args.gaps))
    weights.save(args.output, run.params, run.config.to_dict(), run.step)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, step {run.step}")


def set_gaps(run: runs.Run, gaps: Gaps) -> None:
    """Replace the learned gap model. Raises ValueError if the model has none, or a value is out of range."""
    finite = math.isfinite(gaps.sharpness + gaps.match + gaps.opening)
    if not finite or gaps.opening <= 0:
        raise ValueError(f"--gaps: {gaps} was given; all must be finite, and opening above 0")
    if "gaps" not in run.params:
        raise ValueError("--gaps: the model was trained without model.gap_model, and has none to replace")
    values = {"log_sharpness": math.log(gaps.sharpness), "match": gaps.match, "log_opening": math.log(gaps.opening)}
    run.params["gaps"] = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
