"""Choice of attention kernels: cuDNN on NVIDIA, splash on TPUs, XLA everywhere.

A kernel is chosen for what it is documented to do. The slow tests of attention compare the kernel
of a device with XLA's, forward and backward; where one fails all the same (an older driver, say),
`--attn_implementation xla` does without.

Axes: B batch, T token, K key-value heads, G query heads per key-value head, H head.
"""

import collections
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from relax import parallel
from relax.errors import ConfigError
from relax.models.attention import SAVED, attend
from relax.models.config import LayerSpec, TransformerConfig

AUTO = "auto"
KERNELS = {"cuda": "cudnn", "tpu": "splash"}  # the kernel of a platform; others have none
LANES = 128  # splash works on multiples of it


class Device(NamedTuple):
    """Where a program is to run.

    Attributes:
      platform: `cpu`, `cuda`, `rocm`, `tpu` or what else jax calls it.
      capability: compute capability of an NVIDIA device, (9, 0) for Hopper; None: unknown.
    """

    platform: str
    capability: tuple[int, int] | None = None


class AttentionSpec(NamedTuple):
    """The requirements of a layer on its attention.

    Attributes:
      dtype: name of the dtype of queries, keys and values.
      head_dim: H.
      window: a token sees itself and `window - 1` tokens before it; None: all before it.
      softcap: bound of the scores; None: no cap.
      length: T.
      segments: rows hold several documents, or padding.
      parents: segments see a parent segment, too.
      sinks: each head has a sink.
    """

    dtype: str
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    length: int = 1024
    segments: bool = True
    parents: bool = False
    sinks: bool = False


def this_device() -> Device:
    """The device that programs are compiled for: the default one, or those of the mesh in use."""
    current = parallel.layout()
    device = jax.devices()[0] if current is None else current.mesh.devices.flat[0]
    if device.platform not in ("gpu", "cuda"):
        return Device(device.platform)
    if "cuda" not in device.client.platform_version.lower():
        return Device("rocm")
    major, _, minor = str(device.compute_capability).partition(".")
    return Device("cuda", (int(major), int(minor or 0)))


def refusal(path: str, need: AttentionSpec, device: Device) -> str | None:
    """Why a path cannot do what a layer needs; None: it can.

    >>> refusal("splash", AttentionSpec("bfloat16", 64), Device("cpu"))
    'splash is for TPUs, and this is a cpu'
    """
    if path == "xla":
        return None
    if path == "splash":
        if device.platform != "tpu":
            return _elsewhere("splash is for TPUs", device)
        if need.sinks:
            return "attention sinks are not in splash"
        return "splash compares segments for equality alone" if need.parents else None
    if device.platform != "cuda":
        return _elsewhere("cuDNN is for NVIDIA GPUs", device)
    if need.dtype not in ("bfloat16", "float16"):
        return f"cuDNN has no attention in {need.dtype}"
    if need.softcap is not None:
        return "soft-capping is not in cuDNN"
    if need.sinks:
        return "attention sinks are not in cuDNN"
    capability = device.capability or (8, 0)
    if capability < (8, 0):
        return f"cuDNN needs compute capability 8.0, and this is {'.'.join(map(str, capability))}"
    widest = 256 if capability >= (9, 0) else 128
    if need.head_dim > widest or need.head_dim % 8:
        return f"cuDNN takes a head_dim up to {widest} in steps of 8, and it is {need.head_dim}"
    if need.segments and need.length % 2:
        return f"cuDNN takes a mask for rows of even length, and they have {need.length} tokens"
    return None


def _elsewhere(what: str, device: Device) -> str:
    return f"{what}, and this is a {device.platform}"


def choose(asked: str, need: AttentionSpec, device: Device) -> tuple[str, str]:
    """The path of a layer, and why it is not the platform's kernel (or which platform it is).

    Args:
      asked: `auto`, or the required implementation.

    Raises:
      ConfigError: the path that is asked for cannot do what the layer needs.
    """
    if asked != AUTO:
        reason = refusal(asked, need, device)
        if reason is not None:
            raise ConfigError(
                f"attn_implementation {asked} cannot be taken: {reason}. Make it {AUTO} or xla."
            )
        return asked, device.platform
    kernel = KERNELS.get(device.platform)
    if kernel is None:
        return "xla", device.platform
    reason = refusal(kernel, need, device)
    return (kernel, device.platform) if reason is None else ("xla", reason)


def choose_for_layer(
    asked: str,
    config: TransformerConfig,
    layer: LayerSpec,
    dtype,
    length: int,
    segments: bool,
    parents: bool = False,
) -> tuple[str, str]:
    """`choose` for a layer with attention over rows of `length` tokens, on `this_device`."""
    need = AttentionSpec(
        jnp.dtype(dtype).name,
        layer.head_dim,
        layer.window,
        config.attn_logit_softcapping,
        length,
        segments,
        parents,
        config.attention_sinks,
    )
    return choose(asked, need, this_device())


def summary(choices: Iterable[tuple[str, str]]) -> str:
    """One line about the choices of all layers.

    >>> summary([("cudnn", "cuda")] * 2 + [("xla", "soft-capping is not in cuDNN")])
    'cudnn for 2 layers, xla for 1 layer (soft-capping is not in cuDNN)'
    >>> summary([("xla", "cpu")] * 3)
    'xla (cpu)'
    """
    counts = collections.Counter(choices)
    if len(counts) == 1:
        ((path, reason),) = counts
        return f"{path} ({reason})"
    platforms = {"cpu", *KERNELS}

    def part(path, reason, count):
        layers = f"{path} for {count} layer{'s' if count > 1 else ''}"
        return layers if reason in platforms else f"{layers} ({reason})"

    return ", ".join(part(*choice, count) for choice, count in counts.items())


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array | None,
    *,
    path: str,
    window: int | None = None,
    multiplier: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention within rows by one of the paths.

    Args:
      q: `[B, T, K, G, H]`.
      k, v: `[B, T, K, H]`.
      mask: `[B, T, T]` bool, as `attention_mask` makes it of `segment_ids` and `window`.
      segment_ids: `[B, T]`, or None: one segment a row.
      path: `xla`, `cudnn` or `splash`, one for which `refusal` has nothing to say.
      window, multiplier, softcap: as in `TransformerConfig`.
      sinks: `[K, G]`, for the path `xla` alone.

    Returns:
      `[B, T, K, G, H]`.
    """
    if path == "xla":
        return attend(q, k, v, mask, multiplier=multiplier, softcap=softcap, sinks=sinks)
    assert sinks is None, "the kernels have no sinks"
    heads = ("batch", None, "heads")
    if path == "splash":
        kernel = functools.partial(_splash, window=window, multiplier=multiplier, softcap=softcap)
        run = parallel.per_device(kernel, (heads, heads, heads, ("batch",)), heads)
        return run(q, k, v, segment_ids)
    kernel = functools.partial(_cudnn, window=window, multiplier=multiplier)
    run = parallel.per_device(kernel, (heads, heads, heads, ("batch",)), heads)
    return run(q, k, v, mask if segment_ids is not None else None)


def _cudnn(q, k, v, mask, window, multiplier, implementation="cudnn"):
    """`mask` is for rows of segments: cuDNN adds it to the scores, one [T, T] for all heads.

    Without one, cuDNN handles causality and the window itself, and skips masked blocks.
    """
    options = {"is_causal": True, "scale": multiplier, "implementation": implementation}
    if mask is not None:
        options["mask"] = mask[:, None]
    elif window is not None:
        options["local_window_size"] = (window - 1, 0)
    B, T, K, G, H = q.shape
    return jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v, **options).reshape(q.shape)


def _splash(q, k, v, segment_ids, window, multiplier, softcap, interpret=False):
    """Rows and heads are padded to what the kernel works on. No real token sees the padding."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, K, G, H = q.shape
    size = -(-T // LANES) * LANES
    square = (size, size)
    mask = (
        splash.CausalMask(square)
        if window is None
        else splash.LocalMask(square, (window - 1, 0), 0)
    )
    block = next(n for n in (4 * LANES, 2 * LANES, LANES) if size % n == 0)
    forward, backward = ("q", "kv", "kv_compute"), ("q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes: dict[str, Any] = {
        f"block_{name}": block for name in (*forward, *backward, "q_dq", "kv_dq")
    }
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * (K * G)),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def heads_first(x):  # [B, T, N, H] -> [B, N, T', H']
        x = x.swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - T), (0, -H % LANES)))

    q = q * (H**-0.5 if multiplier is None else multiplier)
    arrays = [heads_first(x) for x in (q.reshape(B, T, K * G, H), k, v)]
    if segment_ids is not None:
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, size - T)))
        arrays.append(splash.SegmentIds(ids, ids))
    out = jax.vmap(kernel)(*arrays)
    return out[:, :, :T, :H].swapaxes(1, 2).reshape(q.shape)


def describe_attention(model, length: int, parents: bool = False) -> str:
    """One line about the attention that a model's layers run over packed rows.

    Args:
      model: a `Transformer`.
      length: T of the longest rows.
      parents: documents of a row share their beginnings.

    Raises:
      ConfigError: the path that is asked for cannot do what a layer needs.
    """
    c, asked, dtype = model.config, model.attn_implementation, model.dtype
    return summary(
        choose_for_layer(asked, c, layer, dtype, length, True, parents)
        for layer in c.layers
        if layer.mixer == "attention"
    )
