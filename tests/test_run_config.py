"""A run that cannot start says why in one line that names the key, ends with status 1, and leaves no folder."""

import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

import command_line
import train
from configs import aligner, base, pretrain, sort_sinkhorn
from data import pipeline
from evaluation import alignment, task, tasks
from tests.support import tiny
from tests.support.small_families import CONFIG as SMALL_BATCHES
from tests.support.small_families import FAMILIES
from training import run_folder
from training.checkpoints import damage_of, newest_position, set_damaged_aside

CONFIGS = sorted(path.stem for path in (tiny.ROOT / "configs").glob("*.py"))
NO_INTEGER = None, "3", 2.5, True, math.nan, math.inf, [], {}, 2**31, 10**30
NO_NUMBER = None, "1", True, math.nan, math.inf, -math.inf, 1e39, 1e-300, 10**400, -1.0, [], {}
NO_SWITCH = None, 0, 1, "True", 2.0, []
NO_CHOICE = None, "", "nothing", 3, True, ["none"]
NOT_POSITIVE = (*NO_INTEGER, 0, -1, -2)  # -1 means nothing here
NEGATIVE = (*NO_INTEGER, -1)
ALL_OR_POSITIVE = (*NO_INTEGER, 0, -2)
SIZES = {"batch_size": NOT_POSITIVE, "seed": (*(value for value in NEGATIVE if value != 2**31), 2**32)}
COMMON = SIZES | {
    "task": NO_CHOICE,
    "total_steps": NOT_POSITIVE,
    "data.workers": NEGATIVE,
    "data.prefetch": NOT_POSITIVE,
    "attention.kind": NO_CHOICE,
    "attention.epsilon": (*NO_NUMBER, 0, 0.0),
    "attention.base_steps": NEGATIVE,
    "attention.tail_steps": NOT_POSITIVE,
    "attention.band": (*NO_INTEGER, -2),
    "attention.dustbin": NO_CHOICE,
    "attention.gradient": NO_CHOICE,
    "attention.solver": NO_CHOICE,
    "attention.newton_steps": NOT_POSITIVE,
    "attention.cg_steps": NOT_POSITIVE,
    "attention.tau_a": (*NO_NUMBER, 1.5),
    "attention.tau_b": (*NO_NUMBER, 1.5),
    "attention.tolerance": NO_NUMBER,
    "sparse.block": NOT_POSITIVE,
    "sparse.steps": NOT_POSITIVE,
    "sparse.temperature": (*NO_NUMBER, 0.0),
    "sparse.sortcut": NEGATIVE,
    "sparse.mixture": NO_SWITCH,
    "optimizer.learning_rate": (*NO_NUMBER, 0.0),
    "optimizer.warmup_steps": NEGATIVE,
    "optimizer.final_fraction": (*NO_NUMBER, 1.5),
    "optimizer.weight_decay": NO_NUMBER,
    "optimizer.clip_norm": NO_NUMBER,
    "optimizer.ema": (*NO_NUMBER, 1, 1.0, 2.0),
    "optimizer.accumulate": NOT_POSITIVE,
    "mesh.data": ALL_OR_POSITIVE,
    "mesh.model": NOT_POSITIVE,
    "mesh.sequence": NOT_POSITIVE,
    "train.on_nonfinite": NO_CHOICE,
    "train.max_nonfinite": NEGATIVE,
    "checkpoint.every": NEGATIVE,
    "checkpoint.keep": ALL_OR_POSITIVE,
    "checkpoint.keep_every": NEGATIVE,
    "log.every": NEGATIVE,
    "log.eval_every": NEGATIVE,
    "log.eval_splits": (None, (), "validation", ("test",), ("validation", "validation"), (3,), 0, {"negatives": 1}),
    "log.eval_pairs": ALL_OR_POSITIVE,
    "log.trace": NEGATIVE,
    "log.wandb": (*NO_CHOICE, "off", False),
}
ALIGNMENT = COMMON | {
    "data.dir": (None, "", "  ", 3, "a\0b", ["data"]),
    "data.buckets": (None, (), (64, 32), (64, 64), (0, 64), (-1,), ("64",), "64", 64, (64.5,), (math.nan,), (True, 64)),
    "data.pairs_per_family": ALL_OR_POSITIVE,
    "data.identity_mass": (None, 0.5, "", (1.0,), (0.5,) * 7, (1.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0), ("a",) * 7),
    **{f"data.{name}": (*NO_NUMBER, 1.5) for name in ("crop", "stagger", "noise", "flanks", "negatives")},
    "data.max_bad_records": NEGATIVE,
    "model.width": NOT_POSITIVE,
    "model.depth": NOT_POSITIVE,
    "model.kernel": NOT_POSITIVE,
    "model.dilations": NOT_POSITIVE,
    "model.heads": (*NOT_POSITIVE, 5, 128),
    "model.attention_every": NEGATIVE,
    "model.plan_width": (*NOT_POSITIVE, 6),
    "model.plan_gain": (*NO_NUMBER, 0.0),
    "model.value_width": NOT_POSITIVE,
    "model.substitution_prior": NO_SWITCH,
    "model.positions": NO_SWITCH,
    "model.refinement": NEGATIVE,
    "model.residual_scale": (*NO_NUMBER, 0.0),
    "model.implementation": NO_CHOICE,
    "model.dtype": (*NO_CHOICE, "float16"),
    "loss.reconstruction": (*NO_NUMBER, 0, 0.0),  # 0 would leave no term
    "loss.sparse_ce": NO_NUMBER,
    "loss.mask_rate": (*NO_NUMBER, 1, 1.0),
}
OF_PLANS = "model.value_width", "model.substitution_prior", "model.positions", "model.refinement"
PAIR_HMM = {key: values for key, values in ALIGNMENT.items() if key not in OF_PLANS and not key.startswith("loss.")} | {
    "model.heads": NOT_POSITIVE,  # this configuration has no self-attention that they would have to fit
    "model.plan_width": NOT_POSITIVE,  # no positions are rotated
    "model.learn_gaps": NO_SWITCH,
    "model.contextual_gaps": NO_SWITCH,
    "loss.alignment": NO_NUMBER,
    "loss.masked": NO_NUMBER,
    "loss.mask_rate": (*NO_NUMBER, 0, 0.0, 1, 1.0),
}
SORTING = COMMON | {
    "data.sequences": (*NOT_POSITIVE, 7),
    "data.test_sequences": NOT_POSITIVE,
    "data.symbols": NOT_POSITIVE,
    "data.longest": NOT_POSITIVE,
    "model.width": NOT_POSITIVE,
    "model.heads": (*NOT_POSITIVE, 5, 64),
    "model.depth": NOT_POSITIVE,
    "model.hidden": NOT_POSITIVE,
}


OF_AN_ENCODER = (
    *("width", "depth", "kernel", "dilations", "heads", "attention_every", "implementation", "dtype"),
    "residual_scale",
)
MASKED = COMMON | {
    **{key: ALIGNMENT[key] for key in ("data.dir", "data.buckets", *(f"model.{name}" for name in OF_AN_ENCODER))},
    "model.heads": NOT_POSITIVE,  # this configuration has no self-attention that they would have to fit
    "data.join": NO_SWITCH,
    "loss.mask_rate": (*NO_NUMBER, 0, 0.0, 1, 1.0),
}


def loaded(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def changed(config: ConfigDict, key: str, value: object) -> ConfigDict:
    """Set any value, as a configuration file can."""
    *outer, last = key.split(".")
    whole = config.to_dict()
    (whole[outer[0]] if outer else whole)[last] = value
    return ConfigDict(whole)


def keys_of(config: ConfigDict) -> set[str]:
    return {key for key, *_ in run_folder.differences({}, config.to_dict())}


@pytest.mark.parametrize(
    ("config", "table"),
    [(base, ALIGNMENT), (aligner, PAIR_HMM), (sort_sinkhorn, SORTING), (pretrain, MASKED)],
    ids=["plans", "aligner", "sorter", "masked"],
)
def test_any_value_that_is_not_allowed_is_refused_by_name(config, table, tmp_path, capsys):
    """Exit status, line and folder for every key and every value of the table; a key that is not in it fails."""
    whole = tasks.checked(config.get_config())
    assert keys_of(whole) == table.keys(), "every key needs values that are refused"
    workdir = tmp_path / "runs" / "run"
    for key, values in table.items():
        for value in values:
            wrong = changed(whole, key, value)
            assert command_line.run("train.py", lambda wrong=wrong: train.train(wrong, workdir) and None) == 1, (
                key,
                value,
            )
            out, told = capsys.readouterr()
            assert told.startswith("train.py: ") and told.count("\n") == 1 and out == "", (key, value, told)
            assert f"{key}=" in told and ("allowed" in told or key == "loss.reconstruction"), told
            assert len(told) < 400 and list(tmp_path.iterdir()) == []


def test_keys_that_are_missing_have_the_defaults_of_new_runs():
    """Runs of earlier versions lack keys; a section and configs/base.py must not differ about them."""
    missing = json.loads(json.dumps(tasks.completed({})))
    assert missing == json.loads(base.get_config().to_json()) | {"task": "alignment"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_allowed_and_reads_the_same_again(name):
    config = tasks.checked(loaded(name))
    assert tasks.checked(config).to_dict() == config.to_dict()
    stored = ConfigDict(json.loads(run_folder.as_text(config)))
    assert run_folder.as_text(tasks.checked(stored)) == run_folder.as_text(config)
    kept = {key: value for key, value in loaded(name).to_dict().items() if not isinstance(value, dict)}
    assert kept.items() <= config.to_dict().items()


def test_defaults_of_the_sections_are_those_of_the_base_configuration():
    """A run of an earlier version lacks a key: it was trained with its default."""
    config = base.get_config()
    for section in alignment.PlanTask.sections:
        given = config.to_dict()[section.name] if section.name else config.to_dict()
        if section is not alignment.DataConfig:  # its class is used without a configuration, too
            assert {key: section.defaults()[key] for key in given if key in section.defaults()} == {
                key: value for key, value in given.items() if not isinstance(value, dict)
            }


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("checkpoint.every", 0, 0),
        ("checkpoint.keep", -1, -1),
        ("checkpoint.keep_every", 0, 0),
        ("log.every", 0, 0),
        ("log.eval_every", 0, 0),
        ("log.eval_pairs", -1, -1),
        ("log.eval_splits", ["negatives", "test_iid"], ("negatives", "test_iid")),
        ("log.trace", 0, 0),
        ("attention.band", 0, 0),
        ("attention.band", -1, -1),
        ("mesh.data", -1, -1),
        ("data.pairs_per_family", -1, -1),
        ("data.max_bad_records", 0, 0),
        ("optimizer.clip_norm", 0, 0.0),
        ("optimizer.learning_rate", 1, 1.0),
        ("data.buckets", [64, np.int64(96)], (64, 96)),
        ("data.identity_mass", [], ()),
        ("data.identity_mass", [1, 0, 0, 0, 0, 0, 0], (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        ("batch_size", np.int32(4), 4),
        ("seed", 2**32 - 1, 2**32 - 1),
    ],
)
def test_0_is_off_and_minus_1_is_all(key, value, kept):
    found = tasks.checked(changed(base.get_config(), key, value))
    for part in key.split("."):
        found = found[part]
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": 3}, r"model=3: allowed is a section with the keys width"),
        ({"extra": 3}, r"extra: there is no such key; known are task, total_steps"),
        ({"losss": {}}, r"losss: there is no such key"),
        ({"loss": {"cross_entropy": 1.0}}, r"loss\.cross_entropy: there is no such key; known are reconstruction"),
        ({"task": "sort"}, r"task='sort': allowed is one of alignment, pair_hmm, sorting"),
    ],
)
def test_unknown_keys_and_sections_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        tasks.checked(ConfigDict(base.get_config().to_dict() | change))


def test_an_aligner_without_any_term_is_refused():
    config = aligner.get_config()
    config.loss.alignment = config.loss.masked = 0.0
    with pytest.raises(ValueError, match=r"loss\.alignment=0\.0, loss\.masked=0\.0: one must be above 0"):
        tasks.checked(config)


def test_no_band_is_a_band_of_the_diagonal_alone():
    spec, _ = alignment.specs_of({"attention": {"band": 0}})
    assert spec.band == 0
    spec, _ = alignment.specs_of({"attention": {"band": -1}})
    assert spec.band is None


# ---- the command line ----


@pytest.fixture
def ended(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; return exit status and what was told, and demand that no folder is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_folder", None)  # no test gets there
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of configuration files
    workdir = tmp_path / "runs" / "run"

    def run(*arguments: str, workdir: str | None = str(workdir)) -> tuple[int, str]:
        argv = ["train.py", *arguments, *([f"--workdir={workdir}"] if workdir is not None else [])]
        monkeypatch.setattr(sys, "argv", argv)
        flags.FLAGS.unparse_flags()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:  # of the call before
            delattr(flags.FLAGS, name)
        before = sorted(tmp_path.iterdir())
        try:
            status = train.main(train.parse_flags(argv))
        except SystemExit as end:
            status = end.code
        finally:
            flags.FLAGS.unparse_flags()
        out, told = capsys.readouterr()
        assert sorted(tmp_path.iterdir()) == before, "nothing may be written"
        return status, out + told

    yield run
    for flag in ("version", "debug", "threads", "workdir", "config"):
        flags.FLAGS[flag].unparse()


CONFIG = f"--config={tiny.ROOT / 'configs/r2_balanced.py'}"


def one_line(told: str) -> str:
    assert told.startswith("train.py: ") and told.count("\n") == 1, told
    return told


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.checkpoint.keep=0"], "checkpoint.keep=0: allowed is an integer, 1 or more, or -1 for all"),
        (["--config.batch_size=2.5"], "--config.batch_size=2.5"),
        (["--config.total_steps=abc"], "--config.total_steps=abc"),
        (["--config.optimizer.ema=1e400"], "optimizer.ema=inf: allowed"),
        (["--config.optimizer.ema=nan"], "optimizer.ema=nan: allowed"),
        (["--config.model.positions=2"], "--config.model.positions=2"),
        (["--config.data.buckets=(64,"], "--config.data.buckets=(64,"),
        (["--config.data.buckets=('a',)"], "data.buckets=('a',): allowed"),
        (["--config.model=3"], "--config.model=3"),
        (["--config.model.wdith=3"], "model.width"),
        (["--config.log.wandb=off"], "log.wandb='off': allowed is one of offline, online, disabled"),
        (["--config.data.dir=nowhere"], "data.dir=nowhere"),
        (["--config.data.dir=data/default:0"], "data.dir='data/default:0': all weights are 0"),
        (["--config.data.dir=data/default:2,nowhere"], "data.dir=nowhere"),
        (["--config.data.dir=~nobody_of_this_name/x"], "data.dir=~nobody_of_this_name/x"),
        (["--config.mesh.data=9"], "mesh.data=9"),
        (["--config.mesh.sequence=2"], "mesh.sequence=2: allowed is 1 for a model that is trained to align"),
        (["--config.model.implementation=pallas_tpu"], "model.implementation='pallas_tpu': needs a TPU"),
        (["--config.model.implementation=pallas_gpu"], "model.implementation='pallas_gpu': needs a GPU"),
    ],
)
def test_a_setting_that_cannot_be_used(ended, arguments, named):
    status, told = ended(CONFIG, *arguments)
    assert status == 1 and named in one_line(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise KeyError('gone')", "KeyError: 'gone'"),
        ("def get_config(", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {'seed': 0}", "get_config() returned dict, allowed is a ConfigDict"),
        ("def get_config():\n    pass", "get_config() returned NoneType"),
        ("x = 1", "get_config() is missing"),
        ("\0", "null bytes"),
    ],
)
def test_a_configuration_file_that_cannot_be_used(ended, tmp_path, text, told):
    path = tmp_path / "mine.py"
    path.write_text(text)
    status, line = ended(f"--config={path}")
    assert status == 1 and told in one_line(line) and f"--config={path}" in line


def test_a_command_line_that_is_wrong(ended, tmp_path):
    for arguments, named in (([], "--config is missing"), ([CONFIG, "--foo=1"], "'foo'"), ([CONFIG, "x"], "'x'")):
        status, told = ended(*arguments)
        assert status == 2 and named in one_line(told)
    for given in ("nowhere.py", "", str(tmp_path)):
        status, told = ended(f"--config={given}")
        assert status == 1 and "there is no such file" in one_line(told)


def test_help_and_version(ended):
    status, told = ended("--help")
    assert status == 0 and "exit status: 0, finished;" in told and "python train.py" in told
    status, told = ended("--version")
    assert status == 0 and told == f"train.py {command_line.version()}\n"


def test_a_folder_that_cannot_be_used(ended, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir, named in (("", "--workdir is empty"), ("file", "is a file"), ("file/run", "is a file")):
        status, told = ended(CONFIG, workdir=workdir)
        assert status == 1 and named in one_line(told)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Permissions are imitated, as root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"--workdir=.*run: nothing can be written to .*; give another folder"):
        run_folder.check_place(tmp_path / "run")


def test_home_is_the_home_folder_in_every_path(ended, tmp_path, monkeypatch):
    """The folder, the configuration and the data are looked for there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(tiny.ROOT / "configs" / "r2_balanced.py", tmp_path / "mine.py")
    seen = {}
    monkeypatch.setattr(train, "train", lambda config, workdir, **_: seen.update(config=config, workdir=workdir))
    assert ended("--config=~/mine.py", "--config.data.dir=~/data", workdir="~/run") == (0, "")
    assert seen["workdir"] == tmp_path / "run"
    assert seen["config"].data.dir == "~/data", "the configuration keeps what was given"
    assert task.resolve_data_dir("~/data") == tmp_path / "data"
    assert ended("--config", "~/mine.py", workdir=None) == (0, "")
    assert seen["workdir"] == Path("runs/mine")


def test_wandb_online_needs_a_key_and_nobody_is_asked(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("wandb.setup", lambda: type("Setup", (), {"settings": NoKey}))
    with pytest.raises(ValueError, match=r"log\.wandb=online needs an account.*`wandb login`.*log\.wandb=offline"):
        run_folder.check_wandb("online")
    run_folder.check_wandb("offline")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    run_folder.check_wandb("online")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    run_folder.check_wandb("online")
    (tmp_path / ".netrc").write_text("machine another.example login user password key\n")
    with pytest.raises(ValueError, match="needs an account"):
        run_folder.check_wandb("online")


class NoKey:
    api_key, base_url = None, "https://api.wandb.ai"


def test_a_platform_that_is_not_there_takes_one_line(capsys):
    def no_platform():
        raise RuntimeError("Unable to initialize backend 'cuda': not found (set JAX_PLATFORMS='' to choose)")

    assert command_line.run("train.py", no_platform) == 1
    assert "JAX_PLATFORMS" in one_line(capsys.readouterr().err)


def small(**overrides) -> ConfigDict:
    config = base.changed(base.get_config(), {**tiny.OVERRIDES, "data.buckets": (64,), "log.eval_every": 0})
    return base.changed(config, {name.replace("__", "."): value for name, value in overrides.items()})


def test_a_model_that_cannot_be_traced_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="unrolled"):
        train.train(small(attention__gradient="unrolled", model__implementation="xla"), tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_behind_the_folder_removes_only_what_this_process_made(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("W&B does not start")

    monkeypatch.setattr(train, "Session", fails)
    (tmp_path / "mine").mkdir()
    for workdir in (tmp_path / "new" / "run", tmp_path / "mine"):
        with pytest.raises(ValueError, match="does not start"):
            train.train(small(), workdir)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


# ---- off, and all ----


def test_nothing_is_logged_or_saved_on_the_way_where_it_is_off(tmp_path):
    off = {"checkpoint__every": 0, "checkpoint__keep": -1, "checkpoint__keep_every": 0, "log__every": 0}
    train.train(small(**off, total_steps=3), tmp_path / "run")
    assert run_folder.read_metrics(tmp_path / "run") == []
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "3"]


def test_all_checkpoints_are_kept(tmp_path):
    train.train(small(checkpoint__every=1, checkpoint__keep=-1, checkpoint__keep_every=0, total_steps=4), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "1", "2", "3", "4"]


# ---- what a run is ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two steps of a run with data of its own, `data` beside it; do not change it."""
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny.ROOT / "data" / "default", folder / "data")
    train.train(small(data__dir=str(folder / "data"), total_steps=2), folder / "run")
    return folder


def test_the_place_of_the_data_does_not_matter(trained, tmp_path, monkeypatch):
    """Another spelling, a link, a copy elsewhere; config.json holds the last one."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "link").symlink_to(trained / "data")
    copied = shutil.copytree(trained / "data", tmp_path / "disk" / "data")
    monkeypatch.chdir(trained)
    for place in (f"{tmp_path / 'link'}", str(copied), "./data/../data/"):
        assert int(train.train(small(data__dir=place, total_steps=2), run).step) == 2
        assert run_folder.read_config(run).data.dir == place


def test_other_sequences_of_the_same_lengths_are_refused_untouched(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    before = (run / "config.json").read_bytes()
    read = pipeline.LengthIndex.build
    monkeypatch.setattr(pipeline.LengthIndex, "build", lambda families, *rest: read(Swapped(families), *rest))
    with pytest.raises(ValueError, match=r"trained on other sequences or alignments .* another --workdir"):
        train.train(small(data__dir=str(trained / "data"), total_steps=4), run)
    assert (run / "config.json").read_bytes() == before


class Swapped:
    """Families with one residue changed."""

    def __init__(self, families):
        self.families = families

    def __len__(self):
        return len(self.families)

    def __getitem__(self, index):
        family = self.families[index]
        if index:
            return family
        alignment = family.alignment.copy()
        row, column = np.argwhere(alignment == ord("A"))[0]
        alignment[row, column] = ord("G")
        return dataclasses.replace(family, alignment=alignment)


def test_content_tells_data_apart_that_have_the_same_lengths():
    one, same, other = (pipeline.PairStream(f, SMALL_BATCHES) for f in (FAMILIES, list(FAMILIES), Swapped(FAMILIES)))
    assert one.content == same.content != other.content
    assert one.fingerprint() == other.fingerprint()
    state = pipeline.BatchIterator(one).get_state()
    pipeline.BatchIterator(same).set_state(state)
    with pytest.raises(ValueError, match="other sequences or alignments"):
        pipeline.BatchIterator(other).set_state(state)
    del state["content"]  # as earlier versions saved it
    pipeline.BatchIterator(other).set_state(state)


def test_spelling_and_age_of_a_configuration_do_not_matter(trained, tmp_path):
    """1 for 1.0, a list for a tuple, a key that is missing because its version did not have it."""
    run = tmp_path / "run"
    run.mkdir()
    stored = json.loads((trained / "run" / "config.json").read_text())
    del stored["train"], stored["task"], stored["optimizer"]["accumulate"], stored["attention"]["kind"]
    stored["optimizer"]["clip_norm"] = 1
    (run / "config.json").write_text(json.dumps(stored))
    config = tasks.checked(small())
    run_folder.check_workdir(run, config, tasks.completed)
    stored["optimizer"]["clip_norm"] = 2
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"optimizer\.clip_norm was 2, is 1\.0"):
        run_folder.check_workdir(run, config, tasks.completed)


# ---- what operating systems leave ----

STRAY = ".DS_Store", "._state", ".nfs0000012", "Thumbs.db", "desktop.ini", "metadata~", ".metadata.swp"


def test_what_an_operating_system_leaves_is_no_damage(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "2.bak")
    shutil.copytree(checkpoints / "2", checkpoints / "9 copy")
    (checkpoints / "²").mkdir()
    (checkpoints / "77").write_text("")
    for folder in (run, checkpoints, *(path for path in (checkpoints / "2").rglob("*") if path.is_dir())):
        for name in STRAY:
            (folder / name).write_text("stray")
    for name in (*STRAY, "@eaDir"):
        (checkpoints / "2" / name).mkdir() if name == "@eaDir" else (checkpoints / "2" / name).write_text("stray")
    (checkpoints / "2" / "@eaDir" / "state").write_text("stray")
    assert damage_of(checkpoints / "2") is None and set_damaged_aside(run) == []
    assert newest_position(run)["step"] == 2
    config = small(data__dir=str(trained / "data"), total_steps=3)
    assert int(train.train(config, run).step) == 3
    (checkpoints / "3" / "state" / "more").write_text("unknown")
    assert "more" in damage_of(checkpoints / "3")
    (checkpoints / "3" / "state" / "more").unlink()
    (checkpoints / "3" / "state" / "_METADATA").unlink()
    assert "_METADATA" in damage_of(checkpoints / "3")


def test_a_listed_file_counts_whatever_its_name(tmp_path):
    folder = tmp_path / "checkpoints" / "5"
    folder.mkdir(parents=True)
    (folder / ".zarray").write_text("x")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  .zarray\n")
    assert ".zarray" in damage_of(folder)


def test_places_of_the_dial_are_configurations():
    from configs import dial, r2_balanced, r2_dustbin

    assert dial.get_config("1") == r2_balanced.get_config()
    assert dial.get_config("1,full") == r2_dustbin.get_config()
    softmax = dial.get_config("softmax,unit").attention
    assert (softmax.tau_a, softmax.tau_b, softmax.dustbin) == (1.0, 0.0, "unit")
    with pytest.raises(ValueError, match=r"dial\.py:soft must be a number from 0 to 1 or softmax"):
        dial.get_config("soft")
