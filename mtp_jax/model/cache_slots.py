"""Slots of a decoding cache: where new tokens are written, and what each token sees.

Legend: B batch, T new tokens, S slots of the cache, K kv heads, Q rows of a product
(the T tokens of one query head after the other).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
  """Where the new tokens of a cached pass are, if they are not one after the other.

  position_BT: of each, for what depends on positions. slot_BT: that it is written to; a
  slot that the cache does not have is none. visible_BTS: the slots that it sees, once
  all are written.
  """

  position_BT: jax.Array
  slot_BT: jax.Array
  visible_BTS: jax.Array


# Positions alone are the slots too, and a token sees all up to its own.
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
  """Returns `cache` with new tokens in their slots; no slot, no write.

  The cache has its rows first and its slots on `slot_axis`; `new_BT` has rows and
  tokens first, then the other axes of the cache in their order.
  """
  slot_BT = slots_of(places)
  if slot_BT.size == 1:
    # XLA makes a slice update of a write to one slot, for which it copies the cache; a
    # second write that is dropped keeps it a scatter in place.
    new_BT = jnp.pad(new_BT, ((0, 0), (0, 1), *[(0, 0)] * (new_BT.ndim - 2)))
    slot_BT = jnp.pad(
      slot_BT, ((0, 0), (0, 1)), constant_values=cache.shape[slot_axis]
    )
  index = _at_slots(slot_BT, slot_axis)
  return cache.at[index].set(new_BT.astype(cache.dtype), mode="drop")


def move_slots(
  cache: jax.Array, source_BT: jax.Array, slot_BT: jax.Array, slot_axis: int
) -> jax.Array:
  """Returns `cache` with what was in `source_BT` in `slot_BT`; no slot, no write.

  All is read before any is written, so that the two may overlap.
  """
  moved_BT = cache.at[_at_slots(source_BT, slot_axis)].get(mode="clip")
  return write_slots(cache, moved_BT, slot_BT, slot_axis)


def _at_slots(slot_BT: jax.Array, slot_axis: int) -> tuple:
  rows_B1 = jnp.arange(slot_BT.shape[0])[:, None]
  return (rows_B1, *[slice(None)] * (slot_axis - 1), slot_BT)


def slot_weights(scores_BKQS: jax.Array, places: Positions) -> jax.Array:
  """Returns the softmax of scaled scores over the slots that each token sees.

  The rows Q are the tokens of one query head after the other; taken apart into two axes
  they would cost XLA on CPU a copy of all scores.
  """
  rows, slots = scores_BKQS.shape[2:]
  if isinstance(places, Places):
    visible_BTS = places.visible_BTS
  else:
    visible_BTS = jnp.arange(slots) <= places[:, :, None]
  visible_BQS = jnp.tile(visible_BTS, (1, rows // visible_BTS.shape[1], 1))
  floor = jnp.finfo(scores_BKQS.dtype).min / 2
  return jax.nn.softmax(jnp.where(visible_BQS[:, None], scores_BKQS, floor), axis=-1)
