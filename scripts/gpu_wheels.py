"""Download the wheels that a machine with an NVIDIA card and JAX, but without a network, lacks for this repository.

  python scripts/gpu_wheels.py                          # into .wheels, for Python 3.12 on x86-64 Linux
  python scripts/gpu_wheels.py --output=/mnt/stick --limit=30

On that machine, in the repository:

  python -m pip install --no-index --no-deps --target=.wheels/site .wheels/*.whl
  PYTHONPATH=.:.wheels/site python scripts/bench_gpu.py --all

The wheels are the packages that pyproject.toml names for training and the machine lacks, and their requirements. It is
expected to have jax 0.11 with its CUDA plugin and the rest of THERE. Downloads use pip as it is configured here.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import command_line

PYTHON = "3.12"
PLATFORMS = "--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64"
THERE = {
    "jax", "optax", "orbax-checkpoint", "jaxtyping", "numpy", "scipy", "matplotlib", "jinja2", "safetensors", "tqdm",
    "absl-py", "psutil", "protobuf", "pyarrow", "etils", "pyyaml", "requests", "cloudpickle", "pytest",
    "torch", "triton",
}  # fmt: skip
NOT_NEEDED = {"wandb"}  # train.py --config.log.wandb=disabled does without
FURTHER = [
    "flax>=0.12.12,<0.13",  # 0.12.8 and .9 do not import with jax 0.11.2
    "beartype>=0.20",  # of the tests
    "flash-sinkhorn>=0.4",  # a peer of benchmarks/gpu_rates.py; PyTorch and Triton are there
    "portpicker>=1.6",  # of grain; what follows is of tensorflow-datasets
    "dm-tree>=0.1.9", "attrs>=18.2", "wrapt>=1.11.2", "immutabledict", "simple-parsing", "docstring-parser~=0.15",
    "tensorflow-metadata", "googleapis-common-protos>=1.56.4,<2", "importlib-resources", "toml", "termcolor", "six",
]  # fmt: skip
SOURCES = ["promise>=2.3"]  # has no wheel: a pure Python package, built here


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line.Parser(__doc__)
    add, told = parser.add_argument, "default: %(default)s"
    add("--output", type=command_line.path, default=Path(".wheels"), metavar="DIR", help=f"folder; {told}")
    add("--limit", type=command_line.positive, default=45, metavar="MIB", help=f"of all wheels; {told}")
    args = parser.parse_args(argv)
    return command_line.run("gpu_wheels.py", lambda: collect(args.output, args.limit), debug=args.debug)


def collect(folder: Path, limit: float) -> None:
    """Replace the wheels in a folder when all are there and fit. Raises ValueError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new", dir=folder) as name:
        download(Path(name))
        wheels = sorted(Path(name).glob("*.whl"))
        size = check(wheels, limit)
        for old in folder.glob("*.whl"):
            old.unlink()
        for wheel in wheels:
            wheel.rename(folder / wheel.name)
    print(f"{folder}: {len(wheels)} wheels, {size:.1f} MiB")


def wanted() -> list[str]:
    """List the requirements of the wheels: FURTHER, and what pyproject.toml requires beside it."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["train"]
    left_out = THERE | NOT_NEEDED | {Requirement(line).name for line in FURTHER}
    return FURTHER + [line for line in required if Requirement(line).name not in left_out]


def download(folder: Path) -> None:
    """Download wheels into a folder, without resolving dependencies: all are named. Raises ValueError if pip fails."""
    target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *PLATFORMS]
    for command in ["download", *target, f"--dest={folder}", *wanted()], ["wheel", f"--wheel-dir={folder}", *SOURCES]:
        if status := subprocess.run([sys.executable, "-m", "pip", *command, "--no-deps", "--quiet"]).returncode:
            needs = f"this Python ({sys.executable}) needs pip and a package index that pip is configured for"
            raise ValueError(f"pip {command[0]} ended with status {status}, see above; {needs}")


def check(wheels: list[Path], limit: float) -> float:
    """Return the total size in MiB. Raise ValueError if it is above the limit, or for wheels of this machine alone."""
    if not wheels:
        raise ValueError("pip downloaded no wheel")
    if bound := [path.name for path in wheels if "-linux_" in path.name]:
        raise ValueError(f"built for this machine only, and of no use elsewhere: {', '.join(bound)}")
    if (size := sum(path.stat().st_size for path in wheels) / 2**20) > limit:
        largest = ", ".join(path.name for path in sorted(wheels, key=lambda path: -path.stat().st_size)[:3])
        told = f"the wheels have {size:.1f} MiB, more than --limit={limit:g}; the largest are {largest}"
        raise ValueError(f"{told}: take one off FURTHER, or raise the limit")
    return size


if __name__ == "__main__":
    sys.exit(main())
