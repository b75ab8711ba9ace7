"""Files that are damaged or meant to harm: a clear error or a right answer, soon, in bounded memory.

The long half, `python -m pytest -m slow tests/test_hostile.py`, tries more than 100,000 of them.
"""

import ast
import contextlib
import copy
import datetime
import functools
import gzip
import io
import json
import mmap
import re
import resource
import socket
import string
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from alignment import sequences
from configs import base
from data import families, pfam, stockholm
from data.transforms import Pair
from evaluation import report, runs, scoring
from models import weights
from tests.support import processes as several
from tests.support import tiny
from tests.support.stockholm_text import written
from training import checkpoints, run_folder
from training.run_folder import without_folders

CLEAR = (ValueError, OSError)  # what programs turn into one line
SEEDS = {
    "stockholm": b"# STOCKHOLM 1.0\n#=GF AC PF1.2\n#=GS a/1 DR x\n"
    b"a/1 AC-d.\n#=GR a/1 SS HHEEC\nb AC.XD\n#=GC RF xx.xx\n\n"
    b"a/1 ACD\n#=GR a/1 SS HHH\nb ---\n#=GC RF xxx\n//\n# STOCKHOLM 1.0\nx A\n//\n",
    "fasta": b">a first\nACDEFGH\nIKL\n\n>b\nacd-ef.x*\n;c\n",
    "pairs": b"id\tx\ty\nfirst\tACDE\tCDEF\n#c\n\nsecond\tAC-X\tc*\n",
    "clans": b"PF1.2\tCL1\tname\n\nPF2\t\\N\tx\r\n",
    "config": json.dumps(json.loads(base.get_config().to_json())).encode(),
}
LONGEST = datetime.timedelta(seconds=20)  # for a case, on a machine with other work
RESET_PEAK = Path("/proc/self/clear_refs")
MORE_MEMORY = 400  # MB; what Python, JAX's traces and hypothesis keep


def mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """The seed with pieces changed, doubled, cut out or cut off, some of them packed; now and then other bytes."""
    place, piece = st.integers(0, len(seed)), st.integers(0, 12)
    token = st.sampled_from(
        [b"\n", b"\t", b"//", b"#=GF", b"#=GR ", b">", b"-", b"\0", b"\xff", b"9" * 30, b"[" * 3000]
    )
    change = st.tuples(place, piece, st.one_of(token, st.binary(max_size=4)), st.integers(0, 3))

    def apply(changes, cut, packed) -> bytes:
        data = seed
        for at, length, new, how in changes:
            found = data[at : at + length]
            replaced = (new, new + found, found * 40, b"")[how]
            data = data[:at] + replaced + data[at + length :]
        data = data[:cut] if cut is not None else data
        if packed is None:
            return data
        whole = bytearray(gzip.compress(data, mtime=0))
        whole[packed % len(whole)] ^= packed // 256 % 256
        return bytes(whole)

    changed = st.builds(
        apply,
        st.lists(change, max_size=4),
        st.one_of(st.none(), st.none(), place),
        st.one_of(st.none(), st.none(), st.integers(0, 2**16)),
    )
    return st.one_of(changed, changed, changed, st.binary(max_size=200))


@contextlib.contextmanager
def memory_grows_by_at_most(megabytes: int) -> Iterator[None]:
    """Measures the peak of resident memory, where its high-water mark can be reset (Linux)."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5")  # or a larger peak of an earlier test hides this one
    before = peak()
    yield
    assert peak() - before <= megabytes or not RESET_PEAK.exists(), f"{peak() - before} MB more than before"


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="only Linux can reset the high-water mark of memory")
def test_memory_is_measured_after_a_larger_peak():
    def touch(megabytes: int) -> None:
        """Take pages from the system, not from what malloc keeps, and give them back."""
        with mmap.mmap(-1, megabytes << 20) as memory:
            memory[::4096] = bytes(megabytes << 8)

    touch(100)
    with memory_grows_by_at_most(20):
        touch(10)
    with pytest.raises(AssertionError, match="MB more"), memory_grows_by_at_most(20):
        touch(40)


def tried(cases: int, strategy: st.SearchStrategy, check: Callable) -> None:
    """`check` takes every case, in time and without growing."""

    @settings(
        max_examples=cases,
        deadline=LONGEST,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def case(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(data)

    with memory_grows_by_at_most(MORE_MEMORY):
        case()


def of(fast: int, long: int):
    return pytest.mark.parametrize("cases", [fast, pytest.param(long, marks=pytest.mark.slow)])


@of(300, 30_000)
def test_stockholm(cases):
    def check(data):
        with contextlib.suppress(stockholm.StockholmError):
            for found in stockholm.read(io.BytesIO(data), max_row_bytes=4000, max_family_bytes=20000):
                (same,) = stockholm.read(io.BytesIO(written(found)))
                assert same.ids == found.ids and np.array_equal(same.rows, found.rows)
        bad = []
        read = list(stockholm.read(io.BytesIO(data), max_row_bytes=4000, on_bad=bad.append))
        assert all(str(error) for error in bad) and len(read) + len(bad) <= data.count(b"\n") + 2

    tried(cases, mutated(SEEDS["stockholm"]), check)


@of(150, 20_000)
@pytest.mark.parametrize("kind", ["fasta", "pairs", "clans"])
def test_tables_and_sequences(cases, kind, tmp_path):
    path, letters = tmp_path / "file", set("ACDEFGHIKLMNPQRSTVWYBJOUXZ")
    read = {"fasta": sequences.read_fasta, "clans": families.read_clans}
    read["pairs"] = lambda path: [side for pair in sequences.read_pairs(path) for side in pair[1:]]

    def check(data):
        path.write_bytes(data)
        try:
            found = read[kind](str(path))
        except CLEAR as error:
            assert str(path) in str(error), "an error names the file"
            return
        if kind != "clans":
            assert all(record.residues and set(record.residues) <= letters for record in found)

    tried(cases, mutated(SEEDS[kind]), check)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**30, -1, 2**31, 1e400, 1e-300, float("nan"), "", "xla", [], [1], {}, {"a": 1}]),
    st.floats(),
    st.text(string.printable, max_size=5),
)


@of(25, 1500)
def test_stored_configurations(cases):
    """Any value anywhere, or bytes anywhere: a trainer, or an error that names the file."""
    whole = json.loads(SEEDS["config"])
    # Small, as each trainer is traced.
    whole["model"] |= {"width": 8, "depth": 1, "heads": 2, "attention_every": 0, "plan_width": 8, "value_width": 8}
    keys = [(a,) for a in whole] + [(a, b) for a in whole if isinstance(whole[a], dict) for b in whole[a]]

    def check(change):
        keys, value = change
        config = copy.deepcopy(whole)
        *outer, last = keys
        functools.reduce(dict.__getitem__, outer, config)[last] = value
        with contextlib.suppress(ValueError):
            runs.described(ConfigDict(config), Path("config.json"))

    tried(cases, st.tuples(st.sampled_from(keys), VALUES), check)


@of(150, 15_000)
def test_bytes_of_a_stored_configuration(cases, tmp_path):
    def check(data):
        (tmp_path / "config.json").write_bytes(data)
        with contextlib.suppress(ValueError):
            run_folder.read_config(tmp_path)

    tried(cases, mutated(SEEDS["config"]), check)


@of(150, 15_000)
def test_weights(cases, tmp_path):
    path, whole = tmp_path / "file.safetensors", tmp_path / "whole.safetensors"
    like = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.ones(2, np.float32)}}
    weights.save(whole, like, {"model": {}}, 3)

    def check(data):
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            config, step = weights.read_config(path)
            assert isinstance(config, dict) and isinstance(step, int)
        with contextlib.suppress(ValueError):
            assert weights.load(path, like)["a"].shape == (2, 3)

    tried(cases, mutated(whole.read_bytes()), check)


@of(150, 15_000)
def test_no_change_to_a_checkpoint_goes_unnoticed(cases, tmp_path):
    folder = tmp_path / "7"
    (folder / "state" / "d").mkdir(parents=True)
    contents = {"state/d/array": bytes(range(256)), "state/manifest": b"m" * 40, "iterator": b'{"step": 7}'}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    contents[checkpoints.SUMS] = "".join(f"{line}\n" for line in checkpoints._sums(folder)).encode()
    cases_of = [mutated(data).map(lambda changed, name=name: (name, changed)) for name, data in contents.items()]

    def check(change):
        name, data = change
        for of_one, whole in contents.items():
            (folder / of_one).write_bytes(data if of_one == name else whole)
        damage = checkpoints.damage_of(folder)
        if name == checkpoints.SUMS:
            listed = dict(line.split("  ", 1)[::-1] for line in contents[name].decode().splitlines())
            given = data.decode(errors="replace").splitlines()
            assert (damage is None) == (dict(x.split("  ", 1)[::-1] for x in given if "  " in x) == listed)
        else:
            assert (damage is None) == (data == contents[name])

    tried(cases, st.one_of(cases_of), check)


@of(6, 600)
def test_shards(cases, tmp_path_factory):
    """Any byte of a shard: the families are those that were written, or it is said which are not."""
    source = tiny.ROOT / "data/default/pfam/1.0.0"
    name = "pfam-validation.array_record-00000-of-00001"
    whole, folder = (source / name).read_bytes(), tmp_path_factory.mktemp("shards") / "1.0.0"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    expected = [family.alignment for family in map(pfam.open_split(source, "validation").__getitem__, range(2))]

    def check(change):
        at, bit, length = change
        data = bytearray(whole[: len(whole) if length is None else length])
        if at < len(data):
            data[at] ^= 1 << bit
        (folder / name).write_bytes(bytes(data))
        opened = pfam.open_split(folder.parent, "validation")
        for n, alignment in enumerate(expected):
            with contextlib.suppress(families.BadRecordError):
                assert np.array_equal(opened[n].alignment, alignment)

    places = st.one_of(
        st.integers(0, len(whole) - 1), st.integers(0, 30_000), st.integers(len(whole) - 65536, len(whole) - 60000)
    )
    tried(
        cases, st.tuples(places, st.integers(0, 7), st.one_of(st.none(), st.none(), st.integers(0, len(whole)))), check
    )


def test_what_is_packed_small_and_unpacks_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "MAX_BYTES", 10_000)
    monkeypatch.setattr(families, "MAX_CLANS_BYTES", 10_000)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b">a\n" + b"A" * 10_000_000))
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        sequences.read_fasta(str(path))
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        families.read_clans(path)
    with gzip.open(path, "wb", 1) as packed:
        packed.write(b"# STOCKHOLM 1.0\n")
        for _ in range(200):
            packed.write(b"A" * 1_000_000)
    too_long = pytest.raises(stockholm.StockholmError, match="line of more than")
    with memory_grows_by_at_most(50), too_long:  # the line has 200 MB
        next(stockholm.read(path))


def sources() -> list[Path]:
    folders = {path.parent.name for path in tiny.ROOT.glob("*/*.py")} - {"tests"}
    return [*tiny.ROOT.glob("*.py"), *(path for folder in folders for path in (tiny.ROOT / folder).rglob("*.py"))]


def test_nothing_reads_pickles_or_runs_text():
    """Nor `numpy.load`, which may; archives are unpacked by tarfile's filter, which refuses paths that lead out."""
    forbidden, found = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}, []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.split(".")[0] in forbidden]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                unsafe = called in ("eval", "exec", "np.load", "numpy.load", "os.system") or any(
                    keyword.arg in ("allow_pickle", "shell") for keyword in node.keywords
                )
                unpacks = called.endswith((".extractall", ".extract")) and "filter='data'" not in ast.unparse(node)
                found += [(path.name, called)] if unsafe or unpacks else []
    assert len(sources()) > 40 and found == []


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    """Unpack archives like scripts/launch_tpu.py."""
    for name in ("../escaped", "/tmp/escaped"):
        path = tmp_path / "runs.tar"
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo(name))
        with (
            tarfile.open(path) as archive,
            pytest.raises(tarfile.FilterError) if name[0] == "." else contextlib.nullcontext(),
        ):
            archive.extractall(tmp_path / "out", filter="data")
    assert not (tmp_path / "escaped").exists() and not Path("/tmp/escaped").exists()


def test_no_secret_and_no_path_reaches_wandb(tmp_path, monkeypatch):
    workdir, data = tmp_path / "home" / "run", tmp_path / "private" / "shards"
    data.parent.mkdir()
    data.symlink_to(tiny.ROOT / "data/default")
    monkeypatch.setenv("SOME_API_TOKEN", "a-planted-secret")
    changes = {"log__wandb": "offline", "log__eval_every": 0, "total_steps": 2, "data__buckets": "(64,)"}
    options = tiny.flags(**changes, data__dir=data)
    config = f"--config={tiny.ROOT / 'configs/r2_dustbin.py'}"
    several.finish(several.start(tiny.ROOT / "train.py", config, f"--workdir={workdir}", *options))
    told = {
        str(tmp_path),
        str(tiny.ROOT),
        "a-planted-secret",
        "private",
        f"{Path.home()}/",
        "site-packages",
    }
    if len(socket.gethostname()) > 3:  # or it would be found by chance
        told.add(socket.gethostname())
    kept = [path for path in (workdir / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in kept)
    for path in [*kept, workdir / "metrics.jsonl"]:
        content = path.read_bytes()
        assert not [text for text in told if text.encode() in content], path
    assert b"shards" in next(path for path in kept if path.suffix == ".wandb").read_bytes(), (
        "the folder's own name is kept"
    )


def test_absolute_paths_are_cut():
    given_ = {"data": {"dir": "/home/somebody/pfam", "buckets": (1, 2)}, "name": "runs/a", "seed": 0}
    assert without_folders(given_) == {"data": {"dir": "pfam", "buckets": (1, 2)}, "name": "runs/a", "seed": 0}


def test_the_name_of_a_family_cannot_lead_out_of_a_folder(tmp_path):
    family = families.Family("../../x/y", "n", "", ("a", "b"), np.zeros((2, 3), np.uint8), np.zeros((0, 2), np.int32))
    pair = Pair(np.array([1, 2], np.int32), np.array([1, 2], np.int32), np.array([0, 1], np.int32))
    plan, match = np.eye(2, dtype=np.float32), np.array([0, 1])
    (tmp_path / "figures").mkdir()
    scoring.draw_plan(
        tmp_path / "figures", "test_ood", report.Example(family, (0, 1), pair, plan, plan, match, *[None] * 2)
    )
    (drawn,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert drawn.parent == tmp_path / "figures" and re.fullmatch(r"[\w-]+\.png", drawn.name)
