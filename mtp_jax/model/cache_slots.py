"""Slots of a decoding cache: where new tokens are written, and what each token sees.

Legend: B batch, T new tokens, S slots of the cache, G kv heads, Q rows of a product
(the T tokens of one query head after the other).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.sharding import platform


class Places(NamedTuple):
  """Positions and slots of new tokens that are not consecutive, such as a tree's nodes.

  position_BT: the position of each token, for rotary or learned positions.
  slot_BT:     the slot that each token is written to; S or more: not written.
  visible_BTS: the slots that each token sees, after all tokens are written.
  """

  position_BT: jax.Array
  slot_BT: jax.Array
  visible_BTS: jax.Array


# Without `Places`, positions are slots, and a token sees all slots up to its own.
Positions = jax.Array | Places


def positions_of(places: Positions) -> jax.Array:
  """Returns position_BT."""
  return places.position_BT if isinstance(places, Places) else places


def slots_of(places: Positions) -> jax.Array:
  """Returns slot_BT."""
  return places.slot_BT if isinstance(places, Places) else places


def write_slots(
  cache: jax.Array, new_BT: jax.Array, places: Positions, slot_axis: int
) -> jax.Array:
  """Returns `cache` with new tokens in their slots; slots it lacks are skipped.

  The cache has rows on axis 0 and slots on `slot_axis`; `new_BT` has rows and tokens
  first, then the other axes of the cache in their order.
  """
  slot_BT = slots_of(places)
  if slot_BT.size == 1 and platform() != "cpu":
    new = jnp.moveaxis(new_BT, 1, slot_axis).astype(cache.dtype)
    start = [jnp.int32(0)] * cache.ndim
    start[slot_axis] = slot_BT[0, 0]
    old = jax.lax.dynamic_slice(cache, start, new.shape)
    is_there = slot_BT[0, 0] < cache.shape[slot_axis]
    return jax.lax.dynamic_update_slice(cache, jnp.where(is_there, new, old), start)
  if slot_BT.size == 1:
    # XLA on CPU makes a slice update of a write to one slot, and copies the cache. A
    # second, dropped write keeps the operation a scatter in place.
    new_BT = jnp.pad(new_BT, ((0, 0), (0, 1), *[(0, 0)] * (new_BT.ndim - 2)))
    slot_BT = jnp.pad(
      slot_BT, ((0, 0), (0, 1)), constant_values=cache.shape[slot_axis]
    )
  index = _at_slots(slot_BT, slot_axis)
  return cache.at[index].set(new_BT.astype(cache.dtype), mode="drop")


def move_slots(
  cache: jax.Array, source_BT: jax.Array, slot_BT: jax.Array, slot_axis: int
) -> jax.Array:
  """Returns `cache` with the entries of `source_BT` copied to `slot_BT`.

  Slots that the cache lacks are skipped. All entries are read before any is written, so
  that sources and targets may overlap.
  """
  moved_BT = cache.at[_at_slots(source_BT, slot_axis)].get(mode="clip")
  return write_slots(cache, moved_BT, slot_BT, slot_axis)


def _at_slots(slot_BT: jax.Array, slot_axis: int) -> tuple:
  rows_B1 = jnp.arange(slot_BT.shape[0])[:, None]
  return (rows_B1, *[slice(None)] * (slot_axis - 1), slot_BT)


def slot_weights(scores_BGQS: jax.Array, places: Positions) -> jax.Array:
  """Returns the softmax of scaled scores over the slots that each token sees.

  Heads and tokens stay joined in the axis Q: splitting it would cost XLA on CPU a copy
  of all scores.
  """
  rows, slots = scores_BGQS.shape[2:]
  if isinstance(places, Places):
    visible_BTS = places.visible_BTS
  else:
    visible_BTS = jnp.arange(slots) <= places[:, :, None]
  visible_BQS = jnp.tile(visible_BTS, (1, rows // visible_BTS.shape[1], 1))
  floor = jnp.finfo(scores_BGQS.dtype).min / 2
  return jax.nn.softmax(jnp.where(visible_BQS[:, None], scores_BGQS, floor), axis=-1)
