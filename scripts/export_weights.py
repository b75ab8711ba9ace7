"""Writes the averaged parameters of a run, and its configuration, into one safetensors file.

python scripts/export_weights.py --workdir=runs/aligner --output=weights/aligner.safetensors
python eval.py --weights=weights/aligner.safetensors --data=runs/pfam
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as evaluation
from models import weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run, as given to train.py")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    args = parser.parse_args(argv)
    try:
        run = evaluation.load_run(args.workdir, args.step)
        weights.save(args.output, run.params, run.config.to_dict(), run.step)
    except (ValueError, OSError) as error:
        print(f"export_weights: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, step {run.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
