"""Attention as a sequence mixer; its state is keys and values.

Axes: B batch, T token of a row, M = B * T tokens, D model, S columns of a cache, N query heads,
K key-value heads, G = N / K query heads per key-value head, H head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from relax import parallel
from relax.models import cache as kv_cache
from relax.models import kernels
from relax.models.mixers.base import Context, Mixer
from relax.models.rotary import rotate, scale_queries


class Attention(Mixer):
    """W_o softmax(q kᵀ) v over the tokens that each one sees, times gates where there are any.

    The state that whole rows return is keys and values `[B, K, T, H]`, that of a cache `Keys` and
    `Values` of `relax.models.cache`. A layer with a source makes neither: it attends to what that
    one returns, and its own state is `()`.
    """

    def setup(self):
        c, layer = self.config, self.layer
        heads, kv_heads = (n * layer.head_dim for n in (c.num_attention_heads, layer.kv_heads))
        self.q_proj = self.linear(
            heads * (2 if c.attention_gate == "entry" else 1), c.attention_bias
        )
        self.o_proj = self.linear(c.hidden_size, c.output_bias)
        if c.attention_gate == "head":
            self.g_proj = self.linear(c.num_attention_heads, False)
        if c.qk_norm is not None:
            self.q_norm = self.norm()
        if c.attention_sinks:
            init, shape = nn.initializers.normal(c.initializer_range), (c.num_attention_heads,)
            self.sinks = self.param("sinks", init, shape, self.param_dtype)
        if layer.source is not None:
            return
        self.k_proj = self.linear(kv_heads, c.attention_bias)
        if not layer.keys_are_values:
            self.v_proj = self.linear(kv_heads, c.attention_bias)
        if c.qk_norm is not None:
            self.k_norm = self.norm()
        if c.value_norm:
            self.v_norm = self.norm(has_scale=False)

    def __call__(self, x, context, state):
        q, gates = self._queries(x, context.angles)
        new = None if self.layer.source is not None else self._keys_values(x, context.angles)
        if context.positions is None:
            out, state = self._within_rows(q, new, state, context)
        else:
            out, state = self._to_cache(q, new, context, state)
        if gates is not None:
            gates = jax.nn.sigmoid(gates.astype(jnp.float32))
            heads = out.reshape(*gates.shape[:2], -1)
            out = (heads * gates).astype(self.dtype).reshape(out.shape)
        return self.o_proj(out), state

    @staticmethod
    def empty_state(config, layer, B, S, dtype):
        if layer.source is not None:
            return ()
        return kv_cache.empty_columns(B, layer.kv_heads, layer.head_dim, S, dtype)

    def _queries(self, x, angles):
        """`[M, D]` -> rotated q `[M, K, G, H]`, and gates `[M, N, H]` or `[M, N, 1]`, or None."""
        M, H, q, gates = x.shape[0], self.layer.head_dim, self.q_proj(x), None
        if self.config.attention_gate == "entry":  # beside the query of each head
            q, gates = jnp.split(q.reshape(M, -1, 2 * H), 2, axis=-1)
            q = q.reshape(M, -1)
        if self.config.attention_gate == "head":
            gates = self.g_proj(x)[:, :, None]
        return scale_queries(self._rotated(q, "q_norm", angles), angles), gates

    def _keys_values(self, x, angles):
        """`[M, D]` -> rotated k and v, `[M, K, H]`."""
        k = self.k_proj(x)
        v = k if self.layer.keys_are_values else self.v_proj(x)
        v = v.reshape(x.shape[0], -1, self.layer.head_dim)
        if self.config.value_norm:
            v = self.v_norm(v)
        return self._rotated(k, "k_norm", angles)[:, :, 0], v

    def _rotated(self, x, name: str, angles):
        """Queries or keys `[M, K * G * H]` -> normalised and rotated `[M, K, G, H]`."""
        c = self.config
        norm: Any = None if c.qk_norm is None else getattr(self, name)
        x = norm(x) if c.qk_norm == "all" else x
        x = x.reshape(x.shape[0], self.layer.kv_heads, -1, self.layer.head_dim)
        x = norm(x) if c.qk_norm == "head" else x
        x = rotate(x, angles, c.rope_interleaved)
        return norm(x) if c.qk_norm == "rotated" else x

    def _options(self):
        c, window = self.config, self.layer.window
        return {
            "window": window,
            "multiplier": c.attention_multiplier,
            "softcap": c.attn_logit_softcapping,
        }

    def _sinks(self):
        """`[K, G]`, or None."""
        return self.sinks.reshape(self.layer.kv_heads, -1) if self.config.attention_sinks else None

    def _within_rows(self, q, new, source, context: Context):
        """Attention to `new` keys and values, or to those of another layer."""
        assert context.mask is not None, "attention over whole rows needs a mask"
        B, T = context.real.shape
        segments, parents = context.segment_ids is not None, context.parent_ids is not None
        path, _ = kernels.choose_for_layer(
            self.attn_implementation, self.config, self.layer, self.dtype, T, segments, parents
        )
        q = q.reshape(B, T, *q.shape[1:])
        state: tuple = ()
        if new is None:
            k, v = (x.swapaxes(1, 2) for x in source)
        else:
            k, v = (x.reshape(B, T, *x.shape[1:]) for x in new)
            state = k.swapaxes(1, 2), v.swapaxes(1, 2)
        options = self._options() | {"path": path, "sinks": self._sinks()}
        out = kernels.attend_rows(q, k, v, context.mask, context.segment_ids, **options)
        return out.reshape(B * T, -1), state

    def _to_cache(self, q, new, context: Context, state):
        """Attention of new tokens to the columns of a cache, their own included."""
        assert context.positions is not None, "tokens behind a cache need positions"
        B, T = context.real.shape
        if T > 1:
            return self._several_to_cache(q, new, context, state)

        def part(q, new, columns, positions, sinks):
            keys, values = columns
            if new is not None:
                keys = kv_cache.write(keys, new[0], positions)
                values = kv_cache.write(values, new[1], positions)
            options = self._options() | {"sinks": sinks}
            out = kv_cache.attend_cached(q, keys, values, positions, **options)
            return out, () if new is None else (keys, values)

        heads = ("batch", "heads")
        written: tuple = () if new is None else (heads, heads)
        run = parallel.per_device(
            part, (heads, heads, heads, ("batch",), ("heads",)), (heads, written)
        )
        out, state = run(q, new, state, context.positions[:, 0], self._sinks())
        return out.reshape(B, -1), state

    def _several_to_cache(self, q, new, context: Context, state):
        """The same for several tokens per slot; padding writes no column."""
        B, T = context.real.shape

        def part(q, new, columns, positions, real, sinks):
            keys, values = columns
            if new is not None:
                keys = kv_cache.write_several(keys, new[0], positions, real)
                values = kv_cache.write_several(values, new[1], positions, real)
            options = self._options() | {"sinks": sinks}
            out = kv_cache.attend_columns(q, keys, values, positions, **options)
            return out, () if new is None else (keys, values)

        rows, heads, batch = ("batch", None, "heads"), ("batch", "heads"), ("batch",)
        written: tuple = () if new is None else (heads, heads)
        inputs = (rows, rows, heads, batch, batch, ("heads",))
        run = parallel.per_device(part, inputs, (rows, written))
        q, new = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), (q, new))
        out, state = run(q, new, state, context.positions, context.real, self._sinks())
        return out.reshape(B * T, -1), state
