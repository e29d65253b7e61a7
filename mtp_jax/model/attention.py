"""Grouped-query attention, document-causal in training, cached in decoding.

Legend: B batch, T sequence, S cache slots, D embed, N heads, K kv heads, H head dim.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.model.attention_ops import (
  Positions,
  attention,
  move_slots,
  positions_of,
  slot_weights,
  unrolled_attention,
  write_slots,
)
from mtp_jax.model.dense_ops import dense
from mtp_jax.model.layers import RMSNorm, compute_dtype, fan_in_normal, partitioned
from mtp_jax.model.rotary import rotate
from mtp_jax.sharding import constrain


class KVCache(NamedTuple):
  """Keys and values of one sequence per row; slot s holds position s, see `Places`.

  The axes are in the order in which a query reads them: XLA on CPU would otherwise
  transpose the whole cache at every step.
  """

  key_BKHS: jax.Array
  value_BKSH: jax.Array

  @classmethod
  def zeros(cls, trunk: TrunkConfig, rows: int, slots: int) -> "KVCache":
    """Returns the cache of one layer before any token, in the compute dtype."""
    shape, dtype = (rows, trunk.num_kv_heads), compute_dtype(trunk)
    return cls(
      jnp.zeros((*shape, trunk.head_dim, slots), dtype),
      jnp.zeros((*shape, slots, trunk.head_dim), dtype),
    )

  def move(self, source_BT: jax.Array, slot_BT: jax.Array) -> "KVCache":
    """Returns the cache with some slots moved, see `move_slots`."""
    return KVCache(
      move_slots(self.key_BKHS, source_BT, slot_BT, slot_axis=3),
      move_slots(self.value_BKSH, source_BT, slot_BT, slot_axis=2),
    )


class Unrolled(NamedTuple):
  """Keys and values of the steps so far of a layer that goes on from its own output.

  Each is [B, T, K, H], a key and a value of every row. A row of a later step sees the
  first step's up to itself and of the steps since then its own alone, as a drafter
  does that runs on the features up to that row and then on its own output.
  """

  keys: tuple[jax.Array, ...] = ()
  values: tuple[jax.Array, ...] = ()


class Attention(nn.Module):
  """Causal self-attention within documents.

  In training (`cache` is None) a token sees the tokens up to itself that share its
  segment id. With a cache, the T new tokens are written at their positions and see
  every slot up to their own, or as `Places` in their stead say; segment ids are not
  used then. With `Unrolled` this is the next step of a layer that is applied to its own
  output, within documents too. The input may be wider than the output.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: Positions,
    segment_ids_BT: jax.Array,
    cache: KVCache | Unrolled | None = None,
  ) -> tuple[jax.Array, KVCache | Unrolled | None]:
    c, dtype = self.trunk, compute_dtype(self.trunk)
    width = x_BTD.shape[-1]
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

    def project(name: str, num_heads: int, axis: str) -> jax.Array:
      kernel = self.param(
        name,
        partitioned(fan_in_normal(width), "embed", axis, "head_dim"),
        (width, num_heads, H),
      )
      out = dense(x_BTD, kernel.astype(dtype))
      if c.kind == "gpt2" or c.qkv_bias:
        zeros = partitioned(nn.initializers.zeros, axis, "head_dim")
        out += self.param(f"{name}_bias", zeros, (num_heads, H)).astype(dtype)
      return out

    query_BTNH = project("query", N, "heads")
    key_BTKH = project("key", K, "kv_heads")
    value_BTKH = project("value", K, "kv_heads")
    if c.qk_norm:
      query_BTNH = RMSNorm(c.norm_eps, name="query_head_norm")(query_BTNH)
      key_BTKH = RMSNorm(c.norm_eps, name="key_head_norm")(key_BTKH)
    if c.kind == "llama":
      query_BTNH = rotate(query_BTNH, positions_of(positions_BT), c)
      key_BTKH = rotate(key_BTKH, positions_of(positions_BT), c)

    if cache is None or isinstance(cache, Unrolled):
      is_later = cache is not None and len(cache.keys) > 0
      seq = "seq" if is_later else "kv_seq"  # Later keys are for their own rows.
      query_BTNH = constrain(query_BTNH, "batch", "seq", "heads", "head_dim")
      key_BTKH = constrain(key_BTKH, "batch", seq, "kv_heads", "head_dim")
      value_BTKH = constrain(value_BTKH, "batch", seq, "kv_heads", "head_dim")
      query_BTNH = checkpoint_name(query_BTNH, "query")
      key_BTKH = checkpoint_name(key_BTKH, "key")
      value_BTKH = checkpoint_name(value_BTKH, "value")
      if cache is not None:
        cache = Unrolled((*cache.keys, key_BTKH), (*cache.values, value_BTKH))
      if is_later:
        out_BTNH = unrolled_attention(
          query_BTNH, cache.keys, cache.values, segment_ids_BT
        )
      else:
        out_BTNH = attention(
          query_BTNH, key_BTKH, value_BTKH, segment_ids_BT, implementation=c.attention
        )
    else:
      cache = KVCache(
        write_slots(cache.key_BKHS, key_BTKH, positions_BT, slot_axis=3),
        write_slots(cache.value_BKSH, value_BTKH, positions_BT, slot_axis=2),
      )
      out_BTNH = _attend_to_cache(query_BTNH, cache, positions_BT)

    gain = (2 * c.num_layers) ** -0.5  # Keeps the residual stream's size (GPT-2).
    kernel = self.param(
      "out",
      partitioned(fan_in_normal(N * H, gain), "heads", "head_dim", "embed"),
      (N, H, D),
    )
    flat_BTF = out_BTNH.reshape(*out_BTNH.shape[:2], N * H)
    out_BTD = dense(flat_BTF, kernel.reshape(N * H, D).astype(dtype))
    if c.kind == "gpt2":
      zeros = partitioned(nn.initializers.zeros, "norm")
      out_BTD += self.param("out_bias", zeros, (D,)).astype(dtype)
    return out_BTD, cache


def _attend_to_cache(
  query_BTNH: jax.Array, cache: KVCache, positions_BT: Positions
) -> jax.Array:
  """Returns out_BTNH; softmax in float32, in float64 for float64 queries."""
  B, T, N, H = query_BTNH.shape
  K = cache.value_BKSH.shape[1]
  dtype = query_BTNH.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  # Queries that share a key head are rows of one product; its rows are (G, T).
  query_BKGTH = query_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  scores_BKQS = jnp.einsum(
    "BKQH,BKHS->BKQS",
    query_BKGTH.reshape(B, K, N // K * T, H),
    cache.key_BKHS.astype(dtype),
    preferred_element_type=wide,
  )
  weights_BKQS = slot_weights(scores_BKQS * H**-0.5, positions_BT)
  out_BKQH = jnp.einsum(
    "BKQS,BKSH->BKQH",
    weights_BKQS.astype(dtype),
    cache.value_BKSH.astype(dtype),
    preferred_element_type=wide,
  )
  out_BKGTH = out_BKQH.astype(dtype).reshape(B, K, N // K, T, H)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
