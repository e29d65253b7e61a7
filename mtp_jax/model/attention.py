"""Grouped-query attention, document-causal in training, cached in decoding.

Legend: B batch, T sequence, S cache slots, D embed, N heads, G kv heads, H head dim,
P = N / G, Q = P T rows of a product.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.kernels.attention import attention, unrolled_attention
from mtp_jax.kernels.dense import dense
from mtp_jax.model.cache_slots import (
  Positions,
  move_slots,
  positions_of,
  slot_weights,
  slots_of,
  write_slots,
)
from mtp_jax.model.layers import RMSNorm, compute_dtype, fan_in_normal, partitioned
from mtp_jax.model.rotary import rotate
from mtp_jax.sharding import constrain, platform

# XLA on CPU spreads independent operations over its cores only if there are nine or
# more.
_PARTS = 16
# Smaller caches are not split: compiling the parts would take longer than they save.
_LEAST_BYTES = 1 << 22
_HEADS = ("query", "key", "value")


class KVCache(NamedTuple):
  """Keys and values of one sequence per row; slot s holds position s, see `Places`.

  Each is a tuple of one array [B, G, ...], or of `_num_parts` arrays [B G / parts, 1,
  ...], each with some of the pairs of row and kv head. Axes are in the order in which a
  query reads them: XLA on CPU would otherwise transpose the whole cache at every step.
  """

  keys_BGHS: tuple[jax.Array, ...]
  values_BGSH: tuple[jax.Array, ...]

  @classmethod
  def zeros(cls, trunk: TrunkConfig, rows: int, slots: int) -> "KVCache":
    """Returns the cache of one layer before any token, in the compute dtype."""
    G, H, dtype = trunk.num_kv_heads, trunk.head_dim, jnp.dtype(compute_dtype(trunk))
    parts = _num_parts(rows * G, slots * H * dtype.itemsize)
    shape = (rows, G) if parts == 1 else (rows * G // parts, 1)
    return cls(
      tuple(jnp.zeros((*shape, H, slots), dtype) for _ in range(parts)),
      tuple(jnp.zeros((*shape, slots, H), dtype) for _ in range(parts)),
    )

  def num_heads(self, rows: int) -> int:
    """Returns G, given B."""
    return sum(math.prod(key.shape[:2]) for key in self.keys_BGHS) // rows

  def write(
    self, key_BTGH: jax.Array, value_BTGH: jax.Array, places: Positions
  ) -> "KVCache":
    """Returns the cache with new tokens in their slots, see `write_slots`."""
    slots = self._for_parts(slots_of(places))

    def written(parts: tuple[jax.Array, ...], new_BTGH: jax.Array, slot_axis: int):
      new = [x.swapaxes(1, 2) for x in _split(new_BTGH.swapaxes(1, 2), len(parts))]
      return tuple(
        write_slots(*part, slot_axis) for part in zip(parts, new, slots, strict=True)
      )

    return KVCache(
      written(self.keys_BGHS, key_BTGH, 3), written(self.values_BGSH, value_BTGH, 2)
    )

  def move(self, source_BT: jax.Array, slot_BT: jax.Array) -> "KVCache":
    """Returns the cache with some slots moved, see `move_slots`."""
    sources, slots = self._for_parts(source_BT), self._for_parts(slot_BT)

    def moved(parts: tuple[jax.Array, ...], slot_axis: int):
      return tuple(
        move_slots(*part, slot_axis) for part in zip(parts, sources, slots, strict=True)
      )

    return KVCache(moved(self.keys_BGHS, 3), moved(self.values_BGSH, 2))

  def _for_parts(self, slot_BT: jax.Array) -> list[jax.Array]:
    """Returns, for every part, the slots of its rows."""
    parts = len(self.keys_BGHS)
    if parts == 1:
      return [slot_BT]
    heads = self.num_heads(slot_BT.shape[0])
    return jnp.split(jnp.repeat(slot_BT, heads, axis=0), parts)


def _num_parts(pairs: int, bytes_per_pair: int) -> int:
  """Returns the number of arrays over which a cache is split.

  `pairs`: of row and kv head. XLA on CPU multiplies a few queries by a cache on one
  core, which reads memory at half the rate of two cores. Products with separate arrays
  run in parallel. Products with slices of one array do not, because slices are copied
  first.
  """
  small = pairs * bytes_per_pair < _LEAST_BYTES or pairs % _PARTS
  one_device = jax.sharding.get_abstract_mesh().size <= 1
  return _PARTS if platform() == "cpu" and one_device and not small else 1


def _split(x_BG: jax.Array, parts: int) -> list[jax.Array]:
  """Returns the entries of [B, G, ...] that belong to each part of a cache."""
  if parts == 1:
    return [x_BG]
  return jnp.split(x_BG.reshape(-1, 1, *x_BG.shape[2:]), parts)


class Unrolled(NamedTuple):
  """Keys and values, [B, T, G, H] per step, of a layer applied to its own output.

  Token i of a later step sees the first step's keys up to i, and only key i of each
  later step: as a drafter at i does, which first reads the trunk's features and then
  its own output.
  """

  keys: tuple[jax.Array, ...] = ()
  values: tuple[jax.Array, ...] = ()


class Attention(nn.Module):
  """Causal self-attention within documents.

  - `cache` None (training): a token sees earlier tokens, and itself, that share its
    segment id.
  - `cache` a `KVCache`: the T new tokens are written to the slots of their positions
    and see every slot up to their own. `Places` instead of positions changes both.
    Segment ids are not used.
  - `cache` an `Unrolled`: the next step of a layer that is applied to its own output,
    within documents.

  The input may be wider than the output.
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
    query_BTNH, key_BTGH, value_BTGH = self.heads(x_BTD, positions_of(positions_BT))

    if cache is None or isinstance(cache, Unrolled):
      is_later = cache is not None and len(cache.keys) > 0
      # Keys of later steps are read by their own token alone: no gather over `seq`.
      seq = "seq" if is_later else "kv_seq"
      query_BTNH = constrain(query_BTNH, "batch", "seq", "heads", "head_dim")
      key_BTGH = constrain(key_BTGH, "batch", seq, "kv_heads", "head_dim")
      value_BTGH = constrain(value_BTGH, "batch", seq, "kv_heads", "head_dim")
      # Named, so that rematerialisation can keep them (`block.SAVED_NAMES`).
      query_BTNH = checkpoint_name(query_BTNH, "query")
      key_BTGH = checkpoint_name(key_BTGH, "key")
      value_BTGH = checkpoint_name(value_BTGH, "value")
      if cache is not None:
        cache = Unrolled((*cache.keys, key_BTGH), (*cache.values, value_BTGH))
      if is_later:
        out_BTNH = unrolled_attention(
          query_BTNH, cache.keys, cache.values, segment_ids_BT
        )
      else:
        out_BTNH = attention(
          query_BTNH, key_BTGH, value_BTGH, segment_ids_BT,
          implementation=self.trunk.attention,
        )
    else:
      cache = cache.write(key_BTGH, value_BTGH, positions_BT)
      out_BTNH = attend_to_cache(query_BTNH, cache, positions_BT)

    # Absent rows, see `heads`, equal the only other one.
    out_BTNH = jnp.broadcast_to(
      out_BTNH, (*x_BTD.shape[:2], *out_BTNH.shape[2:])
    )
    return self.joined(out_BTNH), cache

  def heads(
    self, x_BTX: jax.Array, position_BT: jax.Array, names: tuple[str, ...] = _HEADS
  ) -> list[jax.Array]:
    """Returns the heads of these of `_HEADS`, neighbours, normed and rotated."""
    c = self.trunk
    counts = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
    # Rows after the last position are absent.
    found = [
      self._projected(name, x_BTX, counts[name])[:, : position_BT.shape[1]]
      for name in names
    ]
    for i, name in enumerate(names):
      if name != "value" and c.qk_norm:
        found[i] = RMSNorm(c.norm_eps, name=f"{name}_head_norm")(found[i])
      if name != "value" and c.kind == "llama":
        found[i] = rotate(found[i], position_BT, c)
    return found

  def _projected(self, name: str, x_BTX: jax.Array, count: int) -> jax.Array:
    c, dtype, width = self.trunk, compute_dtype(self.trunk), x_BTX.shape[-1]
    axis = "heads" if name == "query" else "kv_heads"
    kernel = self.param(
      name,
      partitioned(fan_in_normal(width), "embed", axis, "head_dim"),
      (width, count, c.head_dim),
    )
    out_BTNH = dense(x_BTX, kernel.astype(dtype))
    if c.kind == "gpt2" or c.qkv_bias:
      zeros = partitioned(nn.initializers.zeros, axis, "head_dim")
      bias_NH = self.param(f"{name}_bias", zeros, (count, c.head_dim))
      out_BTNH += bias_NH.astype(dtype)
    return out_BTNH

  def joined(self, out_BTNH: jax.Array) -> jax.Array:
    """Returns out_BTD, the heads joined by the output matrix."""
    c, dtype = self.trunk, compute_dtype(self.trunk)
    D, N, H = c.embed_dim, c.num_heads, c.head_dim
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
    return out_BTD


def attend_to_cache(
  query_BTNH: jax.Array, cache: KVCache, positions_BT: Positions
) -> jax.Array:
  """Returns out_BTNH; softmax in float32, in float64 for float64 queries."""
  B, T, N, H = query_BTNH.shape
  parts = len(cache.keys_BGHS)
  G = cache.num_heads(B)
  dtype = query_BTNH.dtype
  wide = jnp.promote_types(dtype, jnp.float32)

  def multiply(equation: str, rows_BGQ: jax.Array, cached: tuple[jax.Array, ...]):
    products = [
      jnp.einsum(equation, rows, part.astype(dtype), preferred_element_type=wide)
      for rows, part in zip(_split(rows_BGQ, parts), cached, strict=True)
    ]
    return jnp.concatenate(products).reshape(*rows_BGQ.shape[:3], -1)

  # Queries that share a key head are rows of one product; its rows are (P, T).
  query_BGPTH = query_BTNH.reshape(B, T, G, N // G, H).transpose(0, 2, 3, 1, 4)
  query_BGQH = query_BGPTH.reshape(B, G, N // G * T, H)
  scores_BGQS = multiply("BGQH,BGHS->BGQS", query_BGQH, cache.keys_BGHS)
  weights_BGQS = slot_weights(scores_BGQS * H**-0.5, positions_BT)
  out_BGQH = multiply("BGQS,BGSH->BGQH", weights_BGQS.astype(dtype), cache.values_BGSH)
  out_BGPTH = out_BGQH.astype(dtype).reshape(B, G, N // G, T, H)
  return out_BGPTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
