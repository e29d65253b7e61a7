"""Multi-head latent attention: keys and values are products of one small latent vector.

DeepSeek-V2 (arXiv 2405.04434, section 2.1) and DeepSeek-V3 (arXiv 2412.19437, equations
1 to 11). `kv_up` maps a token's latent c, of `kv_rank` numbers, to the key and value of
every head; all heads share one rotated key of `rope_dim` numbers. Only the latent and
this key are cached. In decoding, `kv_up` is applied to the query and to the output,

  q . (W_k c) = (W_k^T q) . c   and   sum_s w_s (W_v c_s) = W_v sum_s w_s c_s,

so that keys and values of past tokens are never computed.

Legend: B batch, T sequence, S cache slots, D embed, N heads, Z kv rank, H head dim of
queries and keys, of which P are rotated and C = H - P are not, V head dim of values.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.kernels.attention import attention
from mtp_jax.kernels.dense import dense
from mtp_jax.model.cache_slots import (
  Positions,
  move_slots,
  positions_of,
  slot_weights,
  write_slots,
)
from mtp_jax.model.layers import RMSNorm, compute_dtype, fan_in_normal, partitioned
from mtp_jax.model.rotary import rotate, softmax_gain
from mtp_jax.sharding import constrain

_NORM_EPS = 1e-6  # The released code uses this value, not `trunk.norm_eps`.


class LatentCache(NamedTuple):
  """Normed latent and rotated key of one sequence per row; slot s holds position s."""

  latent_BSZ: jax.Array
  rope_key_BSP: jax.Array

  @classmethod
  def zeros(cls, trunk: TrunkConfig, rows: int, slots: int) -> "LatentCache":
    """Returns the cache of one layer before any token, in the compute dtype."""
    sizes, dtype = trunk.latent, compute_dtype(trunk)
    return cls(
      jnp.zeros((rows, slots, sizes.kv_rank), dtype),
      jnp.zeros((rows, slots, sizes.rope_dim), dtype),
    )

  def move(self, source_BT: jax.Array, slot_BT: jax.Array) -> "LatentCache":
    """Returns the cache with some slots moved, see `move_slots`."""
    return LatentCache(
      move_slots(self.latent_BSZ, source_BT, slot_BT, slot_axis=1),
      move_slots(self.rope_key_BSP, source_BT, slot_BT, slot_axis=1),
    )


class LatentAttention(nn.Module):
  """Causal self-attention within documents, with the call of `Attention`.

  With `query_rank` queries are computed from a compressed vector, too. This saves
  activations and parameters; the vector is not cached.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: Positions,
    segment_ids_BT: jax.Array,
    cache: LatentCache | None = None,
  ) -> tuple[jax.Array, LatentCache | None]:
    c, sizes, dtype = self.trunk, self.trunk.latent, compute_dtype(self.trunk)
    D, N, Z, C = c.embed_dim, c.num_heads, sizes.kv_rank, sizes.nope_dim
    P, V = sizes.rope_dim, sizes.value_dim
    B, T = x_BTD.shape[:2]

    def kernel(name: str, shape: tuple[int, ...], *axes: str) -> jax.Array:
      init = partitioned(fan_in_normal(shape[0]), *axes)
      return self.param(name, init, shape).astype(dtype)

    # Only the last P dimensions of queries and keys are rotated: rotation does not
    # commute with `kv_up`, which decoding applies to the query.
    source, rank, axis = x_BTD, D, "embed"
    if sizes.query_rank:
      rank, axis = sizes.query_rank, "rank_in"
      source = dense(x_BTD, kernel("query_down", (D, rank), "embed", "rank"))
      source = RMSNorm(_NORM_EPS, name="query_norm")(source)
    query = kernel("query", (rank, N, C + P), axis, "heads", "head_dim")
    query_BTNC, query_BTNP = jnp.split(dense(source, query), [C], axis=-1)
    query_BTNP = rotate(query_BTNP, positions_of(positions_BT), c)

    down_BTF = dense(x_BTD, kernel("kv_down", (D, Z + P), "embed", "rank"))
    latent_BTZ, rope_key_BTP = jnp.split(down_BTF, [Z], axis=-1)
    latent_BTZ = RMSNorm(_NORM_EPS, name="kv_norm")(latent_BTZ)
    rope_key_BT1P = rotate(rope_key_BTP[:, :, None], positions_of(positions_BT), c)
    kv_up = kernel("kv_up", (Z, N, C + V), "rank_in", "heads", "head_dim")
    scale = softmax_gain(c) ** 2 * (C + P) ** -0.5

    # In training the keys are computed: with T queries that is the smaller product.
    if cache is None:
      key_BTNC, value_BTNV = jnp.split(dense(latent_BTZ, kv_up), [C], axis=-1)
      shared_BTNP = jnp.broadcast_to(rope_key_BT1P, (B, T, N, P))
      query_BTNH = jnp.concatenate([query_BTNC, query_BTNP], axis=-1)
      key_BTNH = jnp.concatenate([key_BTNC, shared_BTNP], axis=-1)
      query_BTNH = constrain(query_BTNH, "batch", "seq", "heads", "head_dim")
      key_BTNH = constrain(key_BTNH, "batch", "kv_seq", "kv_heads", "head_dim")
      value_BTNV = constrain(value_BTNV, "batch", "kv_seq", "kv_heads", "head_dim")
      out_BTNV = attention(
        checkpoint_name(query_BTNH, "query"),
        checkpoint_name(key_BTNH, "key"),
        checkpoint_name(value_BTNV, "value"),
        segment_ids_BT,
        implementation=c.attention,
        scale=scale,
      )
    else:
      cache = LatentCache(
        write_slots(cache.latent_BSZ, latent_BTZ, positions_BT, slot_axis=1),
        write_slots(cache.rope_key_BSP, rope_key_BT1P[:, :, 0], positions_BT, 1),
      )
      key_up_ZNC, value_up_ZNV = jnp.split(kv_up, [C], axis=-1)
      query_BTNZ = jnp.einsum("BTNC,ZNC->BTNZ", query_BTNC, key_up_ZNC)
      mixed_BTNZ = _attend_to_cache(query_BTNZ, query_BTNP, cache, positions_BT, scale)
      out_BTNV = jnp.einsum("BTNZ,ZNV->BTNV", mixed_BTNZ, value_up_ZNV)

    gain = (2 * c.num_layers) ** -0.5  # Keeps the residual stream's size (GPT-2).
    out = self.param(
      "out",
      partitioned(fan_in_normal(N * V, gain), "heads", "head_dim", "embed"),
      (N, V, D),
    )
    flat_BTF = out_BTNV.reshape(B, T, N * V)
    return dense(flat_BTF, out.reshape(N * V, D).astype(dtype)), cache


def _attend_to_cache(
  query_BTNZ: jax.Array,
  query_BTNP: jax.Array,
  cache: LatentCache,
  positions_BT: Positions,
  scale: float,
) -> jax.Array:
  """Returns, for every head, the weighted sum of the latents of the visible slots."""
  B, T, N, Z = query_BTNZ.shape
  dtype = query_BTNZ.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  latent_BSZ = cache.latent_BSZ.astype(dtype)
  rope_key_BSP = cache.rope_key_BSP.astype(dtype)

  def against(query_BTNX: jax.Array, key_BSX: jax.Array) -> jax.Array:
    # Heads share their keys, so that heads and tokens are rows of one product.
    query_BQX = query_BTNX.swapaxes(1, 2).reshape(B, N * T, -1)
    return jnp.einsum(
      "BQX,BSX->BQS", query_BQX, key_BSX, preferred_element_type=wide
    )

  scores_BQS = against(query_BTNZ, latent_BSZ) + against(query_BTNP, rope_key_BSP)
  weights_B1QS = slot_weights(scale * scores_BQS[:, None], positions_BT)
  mixed_BQZ = jnp.einsum(
    "BQS,BSZ->BQZ",
    weights_B1QS[:, 0].astype(dtype),
    latent_BSZ,
    preferred_element_type=wide,
  )
  return mixed_BQZ.astype(dtype).reshape(B, N, T, Z).swapaxes(1, 2)
