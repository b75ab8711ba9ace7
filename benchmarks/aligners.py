"""Run aligners on the same pairs: alignments, their scores by identity, calibration and processor time."""

import concurrent.futures
import hashlib
import itertools
import json
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from benchmarks.peers import FAILURES, Match, Peer
from data import files, vocab
from data.batches import unbatch
from data.evaluation_pairs import evaluation_batches
from data.transforms import NO_TARGET, Pair
from data.variants import EVALUATION_SETS, NEGATIVES
from evaluation import metrics

if TYPE_CHECKING:
    from alignment.inference import Pretrained

SPLITS = tuple(name for name, of in EVALUATION_SETS.items() if of.variant != NEGATIVES)
METRICS = "f1", "mean_f1", "precision", "recall"
_BUCKETS = tuple(128 << n for n in range(10))  # a sample holds pairs of any length
_KEYS = "x", "y", "ref"

Entry = dict[str, Any]  # results of one aligner


class Case(NamedTuple):
    """A pair with its reference, and the family whose pairs are drawn together in the bootstrap."""

    family: str
    pair: Pair


class Cases(NamedTuple):
    """Pairs to align."""

    cases: list[Case]
    covered: bool  # a predicted pair of residues counts only where the reference covers one of them
    source: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """Return number, source and checksum of the pairs."""
        digest = hashlib.sha256(b"covered" if self.covered else b"all")
        for array in (of for case in self.cases for of in case.pair):
            digest.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
        return {"count": len(self.cases), "sha256": digest.hexdigest(), "covered": self.covered, **self.source}


def of_split(data_dir: str, split: str, limit: int | None) -> Cases:
    """Read the pairs that eval.py scores. Raises ValueError or OSError as `open_families` does."""
    from evaluation.alignment import open_families  # takes seconds: errors in a file of pairs appear at once

    base, variant = EVALUATION_SETS[split]
    families = open_families(data_dir, base)
    batches = evaluation_batches(families, 1, _BUCKETS, variant=variant, limit=limit)
    names: dict[int, str] = {}
    cases = []
    for (index, *_), pair in itertools.chain.from_iterable(map(unbatch, batches)):
        if index not in names:
            names[index] = families[index].accession
        cases.append(Case(names[index], pair))
    return Cases(cases, False, {"data": data_dir, "split": split, "limit": limit})


def of_file(path: Path, limit: int | None) -> Cases:
    """Read pairs from JSON lines with x, y and ref, a list of positions [i, j]. Raises ValueError or OSError.

    Only the residues that the reference covers are known: a predicted pair beyond them counts neither way.
    """
    cases = []
    with files.open_unpacked(path) as file:
        try:
            for number, line in enumerate(itertools.islice(filter(bytes.strip, file), limit), start=1):
                cases.append(_case(line, f"{path}, pair {number}"))
        except files.DAMAGED as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): it is truncated or corrupt") from error
    if not cases:
        raise ValueError(f"{path} holds no pair; give JSON lines with {', '.join(_KEYS)}")
    return Cases(cases, True, {"pairs": path.name, "limit": limit})


def _case(line: bytes, where: str) -> Case:
    try:
        row = json.loads(line)
        x, y = (vocab.encode(row[name].encode("ascii")) for name in "xy")
        reference = np.array(row["ref"], np.int64).reshape(-1, 2)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        told = "x and y as letters and ref as a list of [i, j] are needed"
        raise ValueError(f"{where} cannot be read ({type(error).__name__}: {error}); {told}") from error
    inside = (reference >= 0).all() and (reference < (len(x), len(y))).all()
    if not (len(x) and len(y) and inside and (np.diff(reference, axis=0) > 0).all()):
        raise ValueError(f"{where}: ref must be positions from 0 of sequences that are not empty, both rising")
    target = np.full(len(x), NO_TARGET, np.int32)
    target[reference[:, 0]] = reference[:, 1]
    return Case(str(row.get("family", where)), Pair(x, y, target))


def measure_peer(peer: Peer, pairs: Cases, jobs: int = 1) -> Entry:
    """Align all pairs by a peer; count the pairs that it fails on, which then have no alignment."""
    failures: list[str] = []

    def align(case: Case) -> Match:
        try:
            return peer.align(case.pair)
        except FAILURES as error:
            failures.append(" ".join(str(error).split()))
            return np.full(len(case.pair.x), NO_TARGET, np.int32)

    before = _seconds(peer.external)
    aligned = _called(align, pairs.cases, jobs if peer.external else 1)
    found = list(tqdm(aligned, desc=peer.name, total=len(pairs.cases), unit=" pairs", disable=None))
    spent = _seconds(peer.external) - before
    told = {"count": len(failures), "first": failures[0] if failures else ""}
    return {"version": peer.version, "kind": "peer", "failures": told, **_timed(spent, pairs), **_scored(found, pairs)}


def measure_model(model: "Pretrained", pairs: Cases, name: str, version: str) -> Entry:
    """Align all pairs by a model twice: once to compile a program for each shape, and once against the clock."""
    sequences, cold, warm = [(case.pair.x, case.pair.y) for case in pairs.cases], 0.0, 0.0
    for desc in (f"{name}, compiling", name):
        before = _seconds(external=False)
        with tqdm(desc=desc, total=len(sequences), unit=" pairs", disable=None) as bar:
            alignments = model.align(sequences, done=bar.update)
        cold, warm = warm, _seconds(external=False) - before
    found, confidence = [], []
    for case, of in zip(pairs.cases, alignments, strict=True):
        match, stated = np.full(len(case.pair.x), NO_TARGET, np.int32), np.full(len(case.pair.x), np.nan)
        match[of.pairs[:, 0]], stated[of.pairs[:, 0]] = of.pairs[:, 1], of.confidence
        found.append(match)
        confidence.append(stated)
    calibrated = {"calibration": _calibration(found, confidence, pairs)}
    times = _timed(warm, pairs) | {"cpu_seconds_with_compilation": cold}
    failures = {"count": 0, "first": ""}
    return {"version": version, "kind": "model", "failures": failures, **times, **_scored(found, pairs), **calibrated}


def _called(function: Callable[[Case], Match], cases: Sequence[Case], jobs: int) -> Iterator[Match]:
    if jobs == 1:
        yield from map(function, cases)
        return
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:  # threads that wait for processes
        yield from pool.map(function, cases)


def _seconds(external: bool) -> float:
    """Return the processor time, user and system, of this process or of its children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if external else resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _timed(seconds: float, pairs: Cases) -> Entry:
    return {"cpu_seconds": seconds, "cpu_seconds_per_1000_pairs": 1000 * seconds / len(pairs.cases)}


def counted(match: Match, case: Case, covered: bool) -> Match:
    """Return the predicted pairs that count: all, or with `covered` those with a residue in the reference."""
    if not covered:
        return match
    target = case.pair.target
    inside = (target != NO_TARGET) | np.isin(match, target[target != NO_TARGET])
    return np.where(inside, match, NO_TARGET).astype(np.int32)


def _scored(found: Sequence[Match], pairs: Cases) -> Entry:
    """Summarise alignments as eval.py does, and also by the mean of F1 over pairs."""
    scores = [
        metrics.score_alignment(case.family, case.pair, counted(match, case, pairs.covered))
        for case, match in zip(pairs.cases, found, strict=True)
    ]
    summary = metrics.summarise(scores)
    f1 = np.array([score.f1 for score in scores])
    ratio = np.stack([np.nan_to_num(f1), np.isfinite(f1).astype(np.float64)])
    families = np.unique([score.family for score in scores], return_inverse=True)[1]
    bins = np.array([metrics.identity_bin(score.identity) or "" for score in scores])
    means = metrics.by_bin({"mean_f1": ratio}, families, bins, metrics.BINS)
    return {
        **summary,
        "overall": summary["overall"] | means["overall"],
        "bins": {name: of | means["bins"][name] for name, of in summary["bins"].items()},
    }


def _calibration(
    found: Sequence[Match], confidence: Sequence[Float[np.ndarray, " x_length"]], pairs: Cases
) -> dict[str, dict[str, float]]:
    """Compare stated confidence with the share of residue pairs that are right, overall and by identity."""
    groups = {name: metrics.Reliability() for name in ("overall", *metrics.BINS)}
    for case, match, stated in zip(pairs.cases, found, confidence, strict=True):
        match = counted(match, case, pairs.covered)
        decoded = np.flatnonzero(match != NO_TARGET)
        right = match[decoded] == case.pair.target[decoded]
        identity = metrics.identity_bin(metrics.pair_identity(case.pair))
        for name in ("overall", identity) if identity else ("overall",):
            groups[name].add(stated[decoded], right)
    return {name: metrics.calibration(of.tenths()) for name, of in groups.items() if of.tenths()}


class Results:
    """Results of aligners on the same pairs, in a JSON file that is written anew after each of them."""

    def __init__(self, path: Path | None, pairs: dict[str, Any], *, resume: bool):
        """Begin, or with `resume` read what is there. Raises ValueError for results of other pairs, or an old file."""
        self._path, self._pairs = path, pairs
        self.aligners: dict[str, Entry] = {}
        if path is None or not path.exists():
            return
        if not resume:
            raise ValueError(f"--output={path} exists: add to it with --resume, or name another file")
        try:
            held = json.loads(path.read_text())
            checksum, self.aligners = held["pairs"]["sha256"], dict(held["aligners"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--output={path} holds no results of bench_aligners.py; name another file") from error
        if checksum != pairs["sha256"]:
            raise ValueError(f"--output={path} holds results of other pairs ({held['pairs']}); name another file")

    def has(self, peer: Peer) -> bool:
        """Tell whether the file holds results of this version of a peer."""
        return self.aligners.get(peer.name, {}).get("version") == peer.version

    def add(self, name: str, entry: Entry) -> None:
        self.aligners[name] = entry
        if self._path:
            files.write(self._path, json.dumps({"pairs": self._pairs, "aligners": self.aligners}, indent=1) + "\n")
