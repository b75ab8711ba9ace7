"""Other aligners, each behind a function from a pair of sequences to an alignment: parasail's, and installed programs.

A program gets both sequences in a folder of its own, and writes FASTA with gaps; HHalign writes a table of positions.
"""

import functools
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import parasail
from Bio.SeqIO.FastaIO import SimpleFastaParser
from jaxtyping import Int32

from data import transforms, vocab
from data.transforms import NO_TARGET, Pair
from evaluation import baselines

Match = Int32[np.ndarray, " x_length"]  # position in y of each residue of x, or -1

ALL, NONE = "all", "none"
FAILURES = (OSError, ValueError, RuntimeError, subprocess.SubprocessError)  # of one pair, which counts as unaligned
_SECONDS = 600  # that a program may take for one pair
_TOLD = 200  # characters of a message


class Peer(NamedTuple):
    """An aligner that can be called."""

    name: str
    version: str
    external: bool  # a program of its own, whose time is that of child processes
    align: Callable[[Pair], Match]


def from_fasta(text: str, pair: Pair) -> Match:
    """Read an alignment from FASTA with gaps, records x and y in any order. Raises ValueError if it is not of the pair.

    The programs print other lines before the first record, which are skipped.
    """
    rows = {title.split()[0]: row for title, row in SimpleFastaParser(io.StringIO(text)) if title.strip()}
    if rows.keys() != {"x", "y"}:
        raise ValueError(f"the output has the records {', '.join(rows) or 'none'}, and must have x and y")
    if len(rows["x"]) != len(rows["y"]):
        raise ValueError(f"the output has rows of {len(rows['x'])} and {len(rows['y'])} columns, which must be equal")
    columns = np.stack([np.frombuffer(rows[name].encode(), np.uint8) for name in "xy"])
    found = transforms.pair(columns, 0, 1)
    if not (np.array_equal(found.x, pair.x) and np.array_equal(found.y, pair.y)):
        raise ValueError("the sequences in the output are not those that were given")
    return found.target


def from_positions(text: str, pair: Pair) -> Match:
    """Read the first alignment of HHalign's table: a line for each pair of residues, counted from 1."""
    match = np.full(len(pair.x), NO_TARGET, np.int32)
    _, _, first = text.partition(">")
    for line in first.partition("\n>")[0].splitlines():
        if found := re.match(r"\s*(\d+)\s+(\d+)\s", line):
            i, j = int(found[1]) - 1, int(found[2]) - 1
            if not (0 <= i < len(pair.x) and 0 <= j < len(pair.y)):
                raise ValueError(f"the output aligns residues {found[1]} and {found[2]}, beyond the sequences")
            match[i] = j
    return match


class Tool(NamedTuple):
    """A program, and how it is called."""

    package: str  # of Debian
    version_is: str  # pattern in what it prints as its version: one name may serve two programs
    arguments: str  # for two sequences in in.fa, or one in each of x.fa and y.fa
    output: str = ""  # file that it writes, or else standard output
    version: str = "--version"  # option that makes it tell its version
    programs: tuple[str, ...] = ()  # names that it may have, if not that of the package
    read: Callable[[str, Pair], Match] = from_fasta


TOOLS = {
    "probcons": Tool("probcons", r"PROBCONS version [\d.]+", "in.fa", version="-version"),
    "muscle5": Tool(
        package="muscle",
        version_is=r"muscle 5[\w.]*",
        arguments="-align in.fa -output out.fa -threads 1",
        output="out.fa",
        version="-version",
        programs=("muscle5", "muscle"),
    ),
    "muscle3": Tool(
        package="muscle3",
        version_is=r"MUSCLE v3[\d.]*",
        arguments="-in in.fa -out out.fa -quiet",
        output="out.fa",
        version="-version",
        programs=("muscle3", "muscle"),
    ),
    # L-INS-i
    "mafft": Tool("mafft", r"v[\d.]+", "--localpair --maxiterate 1000 --amino --quiet --thread 1 in.fa"),
    "clustalo": Tool("clustalo", r"[\d.]+", "-i in.fa -o out.fa --seqtype=Protein --threads=1", "out.fa"),
    "kalign": Tool("kalign", r"kalign [\d.]+", "-i in.fa -o out.fa -f fasta -n 1", "out.fa"),
    "fsa": Tool("fsa", r"FSA [\d.]+", "in.fa"),
    "hhalign": Tool(  # each side is one sequence, without a profile
        package="hhsuite",
        version_is=r"HHalign [\d.]+",
        arguments="-i x.fa -t y.fa -M first -o out.hhr -atab out.tab -alt 1 -v 0",
        output="out.tab",
        version="-h",
        programs=("hhalign",),
        read=from_positions,
    ),
    "t_coffee": Tool(
        package="t-coffee",
        version_is=r"Version_[\d.]+",
        arguments="in.fa -type=protein -output=fasta_aln -outfile=out.fa -n_core=1 -quiet",
        output="out.fa",
        version="-version",
        programs=("t_coffee",),
    ),
}
_PARASAIL = {
    "nw_blosum62": parasail.nw_trace_striped_sat,
    "semiglobal_blosum62": parasail.sg_trace_striped_sat,  # gaps at ends cost nothing
    "local_blosum62": parasail.sw_trace_striped_sat,
}
NAMES = (*_PARASAIL, *TOOLS)


def chosen(text: str) -> Sequence[str] | None:
    """Return the names in a list with commas; None for all that are installed. Raises ValueError for unknown ones."""
    if text in (ALL, NONE):
        return None if text == ALL else ()
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"{unknown[0]!r} was given, allowed are {ALL}, {NONE}, or of {', '.join(NAMES)}")
    return names


def find(names: Sequence[str] | None) -> tuple[list[Peer], list[str]]:
    """Return the peers of these names, or all that are installed, and the names of those that are not.

    Raises FileNotFoundError if one of the names is not installed.
    """
    found = {name: _peer(name) for name in (NAMES if names is None else names)}
    missing = [name for name, peer in found.items() if peer is None]
    if names is not None and missing:
        packages = " ".join(TOOLS[name].package for name in missing)
        raise FileNotFoundError(
            f"--peers: {', '.join(missing)} not found on the PATH; install the Debian packages {packages}, "
            f"or give --peers={ALL} for those that are there"
        )
    return [peer for peer in found.values() if peer], missing


def _peer(name: str) -> Peer | None:
    if algorithm := _PARASAIL.get(name):
        version = f"parasail {importlib.metadata.version('parasail')}"
        return Peer(name, version, False, lambda pair: baselines.trace_match(algorithm, pair)[0])
    tool = TOOLS[name]
    for program in filter(None, map(shutil.which, tool.programs or (name,))):
        if version := _version(program, tool):
            return Peer(name, version, True, functools.partial(run, program, tool))
    return None


def _version(program: str, tool: Tool) -> str:
    """Return what a program calls itself; nothing if it is another program, or does not start."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = _call([program, tool.version], folder)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(tool.version_is, done.stdout + done.stderr)
    return found[0] if found else ""


def run(program: str, tool: Tool, pair: Pair) -> Match:
    """Align a pair by a program. Raises one of `FAILURES` if it fails."""
    records = {name: f">{name}\n{vocab.decode(of)}\n" for name, of in (("x", pair.x), ("y", pair.y))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in {"in.fa": "".join(records.values()), "x.fa": records["x"], "y.fa": records["y"]}.items():
            (folder / file).write_text(text)
        done = _call([program, *tool.arguments.split()], name)
        if done.returncode:
            told = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").split())[-_TOLD:]
            raise RuntimeError(f"exit status {done.returncode}: {told}")
        return tool.read((folder / tool.output).read_text() if tool.output else done.stdout, pair)


def _call(command: list[str], folder: str) -> subprocess.CompletedProcess:
    """Run a command in a folder, which also is its home: some leave files there."""
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"HOME": folder},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        check=False,  # the caller tells what the program printed
    )
