"""Grouped-query attention, document-causal in training, cached in decoding.

Legend: B batch, T sequence, S cache slots, D embed, N heads, K kv heads, H head dim.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.model.attention_ops import attention
from mtp_jax.model.dense_ops import dense
from mtp_jax.model.layers import compute_dtype, fan_in_normal, partitioned, rotate
from mtp_jax.sharding import constrain


class KVCache(NamedTuple):
  """Keys and values of one sequence per row; slot s holds position s."""

  key_BSKH: jax.Array
  value_BSKH: jax.Array


class Attention(nn.Module):
  """Causal self-attention within documents.

  In training (`cache` is None) a token sees the tokens up to itself that share its
  segment id. With a cache, the T new tokens are written at their positions and see
  every slot up to their own; segment ids are not used then.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    cache: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    c, dtype = self.trunk, compute_dtype(self.trunk)
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

    def project(name: str, num_heads: int, axis: str) -> jax.Array:
      kernel = self.param(
        name,
        partitioned(fan_in_normal(D), "embed", axis, "head_dim"),
        (D, num_heads, H),
      )
      out = dense(x_BTD, kernel.astype(dtype))
      if c.kind == "gpt2":
        zeros = partitioned(nn.initializers.zeros, axis, "head_dim")
        out += self.param(f"{name}_bias", zeros, (num_heads, H)).astype(dtype)
      return out

    query_BTNH = project("query", N, "heads")
    key_BTKH = project("key", K, "kv_heads")
    value_BTKH = project("value", K, "kv_heads")
    if c.kind == "llama":
      query_BTNH = rotate(query_BTNH, positions_BT, c.rope_theta)
      key_BTKH = rotate(key_BTKH, positions_BT, c.rope_theta)

    if cache is None:
      query_BTNH = constrain(query_BTNH, "batch", "seq", "heads", "head_dim")
      key_BTKH = constrain(key_BTKH, "batch", "kv_seq", "kv_heads", "head_dim")
      value_BTKH = constrain(value_BTKH, "batch", "kv_seq", "kv_heads", "head_dim")
      out_BTNH = attention(
        checkpoint_name(query_BTNH, "query"),
        checkpoint_name(key_BTKH, "key"),
        checkpoint_name(value_BTKH, "value"),
        segment_ids_BT,
        implementation=c.attention,
      )
    else:
      cache = _write(cache, key_BTKH, value_BTKH, positions_BT)
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


def _write(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, positions_BT: jax.Array
) -> KVCache:
  rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

  def put(old_BSKH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
    new_BTKH = new_BTKH.astype(old_BSKH.dtype)
    return old_BSKH.at[rows_B1, positions_BT].set(new_BTKH, mode="drop")

  return KVCache(put(cache.key_BSKH, key_BTKH), put(cache.value_BSKH, value_BTKH))


def _attend_to_cache(
  query_BTNH: jax.Array, cache: KVCache, positions_BT: jax.Array
) -> jax.Array:
  slots_S = jnp.arange(cache.key_BSKH.shape[1])
  mask_B1TS = (slots_S[None, None, :] <= positions_BT[:, :, None])[:, None]
  return jax.nn.dot_product_attention(
    query_BTNH,
    cache.key_BSKH.astype(query_BTNH.dtype),
    cache.value_BSKH.astype(query_BTNH.dtype),
    mask=mask_B1TS,
    implementation="xla",
  )
