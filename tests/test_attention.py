"""Attention within rows: blocks of scores, the kernels of GPUs and TPUs, and who is chosen when.

No GPU and no TPU is here: splash runs in Pallas' interpreter, and cuDNN's path is lowered for CUDA
and held to what jax's own XLA implementation gives for the very same arguments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.errors import ConfigError
from relax.models import Transformer, TransformerConfig, kernels
from relax.models.attention import attend, attention_mask
from relax.models.cache import Keys, Values, attend_cached
from relax.models.kernels import AttentionSpec, Device, choose, refusal, summary

B, T, K, G, H = 2, 90, 2, 3, 8
CPU, TPU = Device("cpu"), Device("tpu")
AMPERE, HOPPER = Device("cuda", (8, 0)), Device("cuda", (9, 0))


def inputs(T=T, dtype=np.float32, seed=0):
    """Queries, keys and values, and two rows of segments: three documents, and two and padding."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, K, G, H), (B, T, K, H), (B, T, K, H))
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = np.zeros((B, T), np.int32)
    segments[0], segments[1, : T - 7] = 3, 2
    segments[0, : T // 2], segments[0, : T // 4], segments[1, : T // 3] = 2, 1, 1
    return arrays, jnp.asarray(segments)


def softmax_loop(q, k, v, segments, window, multiplier, softcap):
    """One query after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segments = np.zeros(q.shape[:2]) if segments is None else np.asarray(segments)
    out = np.zeros_like(q)
    for b, t, h, g in np.ndindex(q.shape[:4]):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        scores = k[b, seen, h] @ q[b, t, h, g] * multiplier
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h, g] = weights / weights.sum() @ v[b, seen, h]
    return out


CASES = [
    {"segments": True, "window": None, "softcap": None},
    {"segments": False, "window": 11, "softcap": None},
    {"segments": True, "window": 11, "softcap": 2.0},
]


def paths(case, block=None):
    """`f(q, k, v)` of one case by our own attention."""
    segments = inputs()[1] if case["segments"] else None
    mask = attention_mask(segments, B, T, case["window"])
    options = {"block": block} if block else {}
    return functools.partial(attend, mask=mask, multiplier=0.3, softcap=case["softcap"], **options)


def gradients(f, q, k, v):
    """Of a sum in which every entry has a weight of its own."""

    def total(q, k, v):
        out = f(q, k, v).astype(jnp.float32)
        return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).sum()

    return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)


def close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [256, 16])
def test_attention_equals_a_loop_over_queries_in_blocks_or_not(case, block):
    (q, k, v), segments = inputs()
    expected = softmax_loop(
        q, k, v, segments if case["segments"] else None, case["window"], 0.3, case["softcap"]
    )
    close(jax.jit(paths(case, block))(q, k, v), expected, 2e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_blocks(case):
    (q, k, v), _ = inputs()
    close(gradients(paths(case, 16), q, k, v), gradients(paths(case, 256), q, k, v), 2e-6)


def test_gradients_in_blocks_equal_finite_differences():
    (q, k, v), _ = inputs()
    f, rng, step = jax.jit(paths(CASES[2], 16)), np.random.default_rng(1), 1e-2
    towards = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (q, k, v)]
    weights = np.sin(np.arange(q.size)).reshape(q.shape)

    def total(sign):
        moved = [x + sign * step * d for x, d in zip((q, k, v), towards, strict=True)]
        return (np.asarray(f(*moved), np.float64) * weights).sum()

    slope = sum(float((g * d).sum()) for g, d in zip(gradients(f, q, k, v), towards, strict=True))
    assert slope == pytest.approx((total(1) - total(-1)) / (2 * step), rel=1e-3)


def with_sinks(q, k, v, sinks, mask):
    """One score more per head in a plain softmax, of a key whose value is 0."""
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * 0.3
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    more = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, more], axis=-1))[..., :-1]
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)


@pytest.mark.parametrize("block", [256, 16])
def test_a_sink_is_one_more_score_of_a_key_without_a_value(block):
    """The output, and the gradients of everything; in a row of one key, a sigmoid remains."""
    (q, k, v), segments = inputs()
    sinks = jnp.asarray(np.random.default_rng(3).normal(size=(K, G)) * 2, jnp.float32)
    mask = attention_mask(segments, B, T, 11)

    def ours(q, k, v, sinks):
        return attend(q, k, v, mask, multiplier=0.3, sinks=sinks, block=block)

    def gradients(f):
        def total(*arrays):
            out = f(*arrays)
            return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).sum()

        return jax.jit(jax.grad(total, (0, 1, 2, 3)))(q, k, v, sinks)

    out = jax.jit(ours)(q, k, v, sinks)
    close(out, with_sinks(q, k, v, sinks, mask), 2e-6)
    close(gradients(ours), gradients(lambda *x: with_sinks(*x, mask)), 3e-6)
    score = 0.3 * np.einsum("BKGH,BKH->BKG", q[:, 0], k[:, 0])
    alone = 1 / (1 + np.exp(np.asarray(sinks) - score))
    close(out[:, 0], alone[..., None] * np.asarray(v)[:, 0, :, None], 2e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_with_sinks_gives_the_last_row_of_attention(window):
    (q, k, v), _ = inputs(20)
    sinks = jnp.asarray([[0.5, -2.0, 3.0], [1.0, 0.0, -1.0]], jnp.float32)
    mask = attention_mask(None, B, 20, window)
    rows = attend(q, k, v, mask, sinks=sinks)
    keys, values = Keys(k.transpose(0, 2, 3, 1)), Values(v.swapaxes(1, 2))
    options = {"window": window, "multiplier": None, "softcap": None}
    for t in (0, 7, 19):
        last = attend_cached(q[:, t], keys, values, jnp.full((B,), t), sinks=sinks, **options)
        close(last, rows[:, t], 2e-6)


def test_long_rows_need_memory_for_blocks_of_scores_only():
    """All scores of a row never exist together."""

    def temporaries(block):
        (q, k, v), _ = inputs(1024)
        f = functools.partial(attend, block=block)
        grad = jax.jit(jax.grad(lambda q, k, v, mask: f(q, k, v, mask).sum(), (0, 1, 2)))
        compiled = grad.lower(q, k, v, attention_mask(None, B, 1024)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = B * K * G * 1024**2 * 4
    assert temporaries(1024) > scores
    assert temporaries(128) < scores / 4


def test_softmax_over_many_keys_is_exact_in_bfloat16():
    """4,096 equal scores: a sum in bfloat16 would stop at 256."""
    T = 4096
    q, k = jnp.zeros((1, T, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, T, 1, 8), jnp.bfloat16)
    v = jnp.ones_like(k)
    for block in (256, T):
        out = jax.jit(functools.partial(attend, block=block))(q, k, v, attention_mask(None, 1, T))
        assert np.asarray(out[0, -1], np.float32) == pytest.approx(1.0, rel=2**-8)


# Splash, in the interpreter


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_our_attention_forward_and_backward(case):
    (q, k, v), segments = inputs()
    segments = segments if case["segments"] else None

    def splash(q, k, v):
        return kernels._splash(
            q, k, v, segments, case["window"], 0.3, case["softcap"], interpret=True
        )

    close(jax.jit(splash)(q, k, v), paths(case)(q, k, v), 2e-6)
    close(gradients(splash, q, k, v), gradients(paths(case), q, k, v), 2e-6)


# cuDNN, without a GPU


@pytest.mark.parametrize("case", CASES[:2])
def test_what_cudnn_is_asked_for_is_our_attention(case):
    """jax documents one meaning for both implementations; XLA's runs here."""
    (q, k, v), segments = inputs()
    mask = attention_mask(segments, B, T, case["window"]) if case["segments"] else None

    def asked(q, k, v):
        return kernels._cudnn(q, k, v, mask, case["window"], 0.3, implementation="xla")

    close(jax.jit(asked)(q, k, v), paths(case)(q, k, v), 2e-6)
    close(gradients(asked, q, k, v), gradients(paths(case), q, k, v), 2e-6)


# Whole models, lowered for devices that are not here

SHAPE = TransformerConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
)


def lowered(monkeypatch, device, **options):
    """The text of a model's gradient, as it would be compiled for a device."""
    monkeypatch.setattr(kernels, "this_device", lambda: device)
    model = Transformer(SHAPE, jnp.dtype(jnp.bfloat16), **options)
    ids = jnp.zeros((2, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]

    def loss(params):
        out = model.apply({"params": params}, ids, None, ids + 1, method="hidden_states")
        return out.astype(jnp.float32).sum()

    return (
        jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(device.platform,)).as_text()
    )


@pytest.mark.parametrize(
    "options, forward",
    [
        ({}, 3),
        ({"gradient_checkpointing": True}, 3),
        ({"gradient_checkpointing": True, "gradient_checkpointing_policy": "attention"}, 3),
        ({"gradient_checkpointing": True, "gradient_checkpointing_policy": "nothing"}, 6),
    ],
)
def test_every_layer_runs_cudnn_once_forward_and_once_backward(monkeypatch, options, forward):
    """Twice forward only where checkpointing keeps nothing."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = lowered(monkeypatch, HOPPER, **options)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == forward
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 3


@pytest.mark.parametrize("policy, forward", [("matmuls", 2), ("nothing", 4)])
def test_both_kinds_of_layer_run_splash(monkeypatch, policy, forward):
    """Layers of one kind share a function, which is called once more where nothing is kept."""
    text = lowered(
        monkeypatch, TPU, gradient_checkpointing=True, gradient_checkpointing_policy=policy
    )
    assert text.count('kernel_name = "splash_mha_fwd_segmented_residuals"') == forward
    assert text.count('kernel_name = "splash_mha_dkv_segmented_no_residuals"') == 2


# Who is chosen


@pytest.mark.parametrize(
    "asked, device, need, expected",
    [
        ("auto", CPU, AttentionSpec("float32", 64), ("xla", "cpu")),
        ("auto", Device("rocm"), AttentionSpec("bfloat16", 64), ("xla", "rocm")),
        ("auto", AMPERE, AttentionSpec("bfloat16", 128), ("cudnn", "cuda")),
        ("auto", Device("cuda"), AttentionSpec("float16", 64), ("cudnn", "cuda")),
        (
            "auto",
            AMPERE,
            AttentionSpec("float32", 64),
            ("xla", "cuDNN has no attention in float32"),
        ),
        ("auto", HOPPER, AttentionSpec("bfloat16", 256), ("cudnn", "cuda")),
        (
            "auto",
            AMPERE,
            AttentionSpec("bfloat16", 256),
            ("xla", "up to 128 in steps of 8, and it is 256"),
        ),
        (
            "auto",
            HOPPER,
            AttentionSpec("bfloat16", 84),
            ("xla", "up to 256 in steps of 8, and it is 84"),
        ),
        (
            "auto",
            HOPPER,
            AttentionSpec("bfloat16", 64, softcap=50.0),
            ("xla", "soft-capping is not in"),
        ),
        ("auto", HOPPER, AttentionSpec("bfloat16", 64, window=512), ("cudnn", "cuda")),
        (
            "auto",
            Device("cuda", (7, 5)),
            AttentionSpec("float16", 64),
            ("xla", "8.0, and this is 7.5"),
        ),
        ("auto", HOPPER, AttentionSpec("bfloat16", 64, length=33), ("xla", "they have 33 tokens")),
        (
            "auto",
            HOPPER,
            AttentionSpec("bfloat16", 64, length=33, segments=False),
            ("cudnn", "cuda"),
        ),
        ("auto", TPU, AttentionSpec("float32", 80, window=9, softcap=50.0), ("splash", "tpu")),
        (
            "auto",
            HOPPER,
            AttentionSpec("bfloat16", 64, sinks=True),
            ("xla", "attention sinks are not in cuDNN"),
        ),
        (
            "auto",
            TPU,
            AttentionSpec("float32", 80, sinks=True),
            ("xla", "attention sinks are not in splash"),
        ),
        ("xla", HOPPER, AttentionSpec("bfloat16", 64), ("xla", "cuda")),
        ("splash", TPU, AttentionSpec("bfloat16", 64), ("splash", "tpu")),
    ],
)
def test_the_platforms_kernel_is_chosen_where_it_can_do_what_a_layer_needs(
    asked, device, need, expected
):
    path, reason = choose(asked, need, device)
    assert path == expected[0] and expected[1] in reason


@pytest.mark.parametrize(
    "asked, device, need, reason",
    [
        (
            "cudnn",
            CPU,
            AttentionSpec("bfloat16", 64),
            "cuDNN is for NVIDIA GPUs, and this is a cpu",
        ),
        ("splash", AMPERE, AttentionSpec("bfloat16", 64), "splash is for TPUs, and this is a cuda"),
        (
            "cudnn",
            HOPPER,
            AttentionSpec("bfloat16", 64, softcap=30.0),
            "soft-capping is not in cuDNN",
        ),
    ],
)
def test_a_path_that_is_asked_for_and_cannot_is_refused_with_the_reason(
    asked, device, need, reason
):
    assert refusal(asked, need, device) == reason
    with pytest.raises(ConfigError, match=f"attn_implementation {asked} .*{reason}"):
        choose(asked, need, device)


def test_the_summary_counts_layers_by_choice():
    mixed = [("cudnn", "cuda"), ("xla", "soft-capping is not in cuDNN"), ("cudnn", "cuda")]
    assert summary(mixed) == "cudnn for 2 layers, xla for 1 layer (soft-capping is not in cuDNN)"


def test_the_line_about_attention_is_that_of_all_layers():
    assert kernels.describe_attention(Transformer(SHAPE), 16) == "xla (cpu)"


def worst_gradient(path, need, softcap=None, T=256):
    """The largest difference of a kernel's gradients from XLA's, in parts of the largest one.

    Over rows of one document and of two, in the dtype and with the window of `need`.
    """
    shapes = ((2, T, 2, 4, need.head_dim), (2, T, 2, need.head_dim), (2, T, 2, need.head_dim))
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(k, s, need.dtype) for k, s in zip(keys, shapes, strict=True)]

    def gradients(path, segment_ids):
        mask = attention_mask(segment_ids, 2, T, need.window)

        def total(q, k, v):
            options = {"path": path, "window": need.window, "softcap": softcap}
            out = kernels.attend_rows(q, k, v, mask, segment_ids, **options)
            return jnp.square(out.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)

    two = jnp.broadcast_to(1 + (jnp.arange(T) >= T // 3)[None, :], (2, T)).astype(jnp.int32)
    pairs = [
        (a.astype(jnp.float32), b.astype(jnp.float32))
        for segment_ids in (None, two)
        for a, b in zip(gradients(path, segment_ids), gradients("xla", segment_ids), strict=True)
    ]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("H", [64, 128])
def test_the_kernel_of_this_device_gives_the_gradients_of_xla(window, H):
    """On an NVIDIA GPU or a TPU: `pytest -m slow tests/test_attention.py`."""
    device = kernels.this_device()
    if device.platform not in kernels.KERNELS:
        pytest.skip(f"{device.platform} has no kernel")
    need = AttentionSpec("bfloat16", H, window)
    path, _ = choose("auto", need, device)
    assert path == kernels.KERNELS[device.platform]
    assert worst_gradient(path, need) < 0.05


def test_the_comparison_of_kernels_finds_one_that_is_blind_to_documents(monkeypatch):
    right = functools.partial(kernels._splash, interpret=True)

    def blind(q, k, v, segment_ids, *rest, **options):
        return right(q, k, v, None, *rest, **options)

    need = AttentionSpec("float32", 64)
    monkeypatch.setattr(kernels, "_splash", right)
    assert worst_gradient("splash", need, T=128) < 1e-3
    monkeypatch.setattr(kernels, "_splash", blind)
    assert worst_gradient("splash", need, T=128) > 0.05
