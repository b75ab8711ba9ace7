"""Set-up of every test session: quick compilation, a shared folder, checked signatures and the order of modules."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

# Programs here run once or twice: optimising them takes longer than running them. Child processes inherit the flags;
# flags of the user come later and win.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jax") < "0.11":  # later versions end at it
    _QUICK += " --xla_cpu_use_fusion_emitters=false"  # halves the time of compilation
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # the controller has set the environment of the workers

# Programs started in the background of a shell ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not _IS_WORKER:
    os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
    os.environ["OT_TEST_FOLDER"] = tempfile.mkdtemp(prefix="ot_attention_tests_")
    # Equal programs of different processes are compiled once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["OT_TEST_FOLDER"], "compiled"))  # noqa: PTH118
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Not ot_attention.spec and api, which check their arguments themselves, with messages that tests look for.
_NAMES = ("asap", "backends.xla", "dense", "plans", "problem", "reference", "sinkhorn", "steps", "support")
_CHECKED = [f"ot_attention.{name}" for name in _NAMES]
install_import_hook(
    [*_CHECKED, "data", "models", "training", "alignment", "evaluation"], "beartype.beartype"
).__enter__()

# Modules by processor time, longest first. `--dist=loadfile` hands them out in this order, so that no long one is left
# to a single worker at the end.
_LONGEST_FIRST = [
    "test_conformance",
    "test_api_edges",
    "test_second_order",
    "test_eval",
    "test_attention",
    "test_balance",
    "test_report",
    "test_pair_hmm",
    "test_pair_aligner",
    "test_gpu",
    "test_bench_attention",
    "test_asap",
    "test_certificates",
    "test_sequence_axis",
    "test_long_rows",
    "test_training_step",
    "test_masked",
    "test_initial",
    "test_sorting",
    "test_compile_asap",
    "test_bench_gpu",
    "test_path_band",
    "test_nonfinite",
    "test_reliability",
    "test_tpu_tiles",
    "test_models",
    "test_sharding",
    "test_precision",
    "test_align",
    "test_inference",
    "test_notebook",
    "test_weights",
    "test_tpu",
    "test_train",
    "test_run_config",
    "test_implicit",
    "test_bench_balance",
    "test_ott",
    "test_sparse",
    "test_refinement",
    "test_pfam",
    "test_aot_report",
    "test_hostile",
    "test_gpu_stages",
    "test_damaged_data",
    "test_launch_screen",
]


def pytest_collection_modifyitems(items):
    place = {name: n for n, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_unconfigure():
    if not _IS_WORKER:
        shutil.rmtree(os.environ["OT_TEST_FOLDER"], ignore_errors=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Data set of 600 short sequences."""
    from tests.support import small_sequences  # imports the programs, which not all tests need

    return small_sequences.build(small_sequences.random_sequences(600), tmp_path_factory.mktemp("sequences"))


@pytest.fixture(scope="session")
def source(built):
    """Training sequences of `built`."""
    from data.sequences import open_sequences

    return open_sequences(built, "train")


@pytest.fixture(autouse=True, scope="module")
def few_programs_are_kept():
    """Free compiled programs behind each module: thousands take the 65,530 memory maps that Linux allows a process.

    XLA then crashes while it compiles, or while it writes a program.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def forget_programs():
    """Function that forgets compiled attention, also called at the end: before it, the code must not change."""
    from ot_attention import meshes

    yield meshes._compiled.clear_cache
    meshes._compiled.clear_cache()


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)  # for all threads: interpreted kernels have their own
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def kernels_are_interpreted(request, capfd, monkeypatch, forget_programs):
    """Interpret Pallas kernels, and fail if the TPU's have a data race."""
    from jax.experimental.pallas import tpu as pltpu

    from ot_attention.backends import gpu_kernels

    forget_programs()
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("implementation") == "pallas_gpu":  # TPUs' interpreter would take these too
        monkeypatch.setattr(gpu_kernels, "INTERPRET", True)
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
