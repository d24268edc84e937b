"""What all tests share: JAX on the CPU, one compile cache per run, tiny models and batches.

The environment is set before jax is imported anywhere, and child processes inherit it: a program
that one test has compiled is read back by every other. A program from the cache gives the same bits
as one just compiled. LLVM optimises little here, since most of the time would go into compiling;
`.ci/run` has it do so fully for a few files, on the newest Python. Shapes must agree without silent
broadcasting (`numpy_rank_promotion`).
"""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # These emitters take two thirds of the compile time. Later versions end on the unknown flag.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="relax-tests-jax-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402

from relax.data import arithmetic_tokenizer as make_arithmetic_tokenizer
from relax.losses import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSS_TYPES,
    PREFERENCE_LOSSES,
    SFT_LOSSES,
)
from relax.models import Transformer, TransformerConfig
from relax.trainers import LossOutput, Sum, Trainer, TrainState

jax.config.update("jax_numpy_rank_promotion", "raise")

# Needs packages that the suite does without, and has a command of its own: see docs/parity.md.
collect_ignore = ["parity"]


def pytest_configure(config):
    # `nohup pytest` leaves children that ignore a closed terminal, as they should.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # A child that a test killed may leave half an entry, which jax then compiles again.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


def pytest_addoption(parser):
    parser.addoption("--one-each", action="store_true", help="the first case of each test only")


# One process may still run the last file when the other has ended: these take the longest.
LONG = ("test_resume.py", "test_parallel.py", "test_grpo_resume.py", "test_processes.py")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if config.getoption("--one-each"):
        _keep_first_cases(config, items)


def _keep_first_cases(config, items):
    """Of each test the first case that is not slow, if there is one."""
    first = {}  # by file, class and function
    for item in sorted(items, key=lambda item: item.get_closest_marker("slow") is not None):
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_unconfigure(config):
    if _cache is not None:
        shutil.rmtree(_cache, ignore_errors=True)


# Every compiled program maps some memory of its own until it is dropped. Linux grants a process
# 65,530 mappings (vm.max_map_count); a compilation that gets no more ends it without an exception.
MANY_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops the compiled programs of earlier files where they have become many."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


class Regression(Trainer):
    """Least squares with three parameters: a trainer whose step compiles in a moment."""

    def __init__(self, optimizer=None, **options):
        super().__init__(None, optimizer or optax.adam(0.1), **options)

    def create_train_state(self, key):
        params = {"w": jax.random.normal(key, (3,))}
        return TrainState.create(params=params, optimizer=self.optimizer, rng=key)

    def compute_loss(self, params, batch):
        error = batch["x"] @ params["w"] - batch["y"]
        rows = jnp.int32(error.size)
        metrics = {"absolute_error": jnp.abs(error).mean(), "num_tokens": Sum(rows)}
        return LossOutput(jnp.square(error).mean(), rows, metrics)


def regression_batches(count, rows=4, seed=0):
    """Batches `x` [rows, 3], `y` [rows] float32."""
    rng = np.random.default_rng(seed)
    xs = rng.normal(size=(count, rows, 3)).astype(np.float32)
    return [{"x": x, "y": x @ np.float32([1, -2, 3])} for x in xs]


def bits(tree):
    """The bytes of every leaf, copied: equal exactly where two trees are, bit for bit."""
    data = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
    return [(np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for x in data]


def is_key(x):
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def packed_batch(documents, length, rows=None):
    """Rows of documents, each `(prompt ids, completion ids)`, as the loader would lay them out."""
    rows = len(documents) if rows is None else rows
    shape = (rows, length)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "positions", "segment_ids")}
    batch["labels"] = np.full(shape, -100, np.int32)
    for row, packed in enumerate(documents):
        start = 0
        for segment, (prompt, completion) in enumerate(packed, 1):
            stop = start + len(prompt) + len(completion)
            batch["input_ids"][row, start:stop] = [*prompt, *completion]
            batch["labels"][row, start + len(prompt) : stop] = completion
            batch["positions"][row, start:stop] = range(stop - start)
            batch["segment_ids"][row, start:stop] = segment
            start = stop
    return batch


REGISTRIES = (ADVANTAGES, KL_ESTIMATORS, LOSS_TYPES, PREFERENCE_LOSSES, SFT_LOSSES)


@pytest.fixture(autouse=True)
def registries():
    """Removes what a test has registered."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="session")
def tiny_model():
    """A Transformer of one layer with grouped heads, tied embeddings and 23 tokens."""
    return Transformer(
        TransformerConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    return jax.jit(tiny_model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


@pytest.fixture(scope="session")
def arithmetic_tokenizer():
    return make_arithmetic_tokenizer()
