"""Noise of decoding: a function of the sequence, the absolute position and the role.

So a sampled token does not depend on what else is in the batch. Under rule `match` it
does not depend on the drafter either. Rule `block` looks at later drafts when the rule
rejects an earlier one. If the next round reused the noise of a position, that rejection
would bias it, so `block` draws the noise of drafts and acceptance anew each round.

Legend: B batch, X positions, V vocab.
"""

import functools
from typing import NamedTuple

import jax

TARGET, DRAFT, ACCEPT = range(3)  # Roles.


class Noise(NamedTuple):
  """The noise of one round.

  key_B: of the sequences. length_B: committed tokens when the round began.
  is_of_round: whether the noise of drafts and acceptance depends on `length_B`.
  """

  key_B: jax.Array
  length_B: jax.Array
  is_of_round: bool

  def gumbel(self, position_BX: jax.Array, role: int, like: jax.Array) -> jax.Array:
    """Returns gumbel_BXV with the vocabulary and dtype of `like`."""
    draw = functools.partial(
      jax.random.gumbel, shape=like.shape[-1:], dtype=like.dtype
    )
    return jax.vmap(jax.vmap(draw))(self._keys(position_BX, role))

  def uniform(self, position_BX: jax.Array) -> jax.Array:
    """Returns uniform_BX for the acceptance of drafts at these positions."""
    return jax.vmap(jax.vmap(jax.random.uniform))(self._keys(position_BX, ACCEPT))

  def _keys(self, position_BX: jax.Array, role: int) -> jax.Array:
    """Returns one random key per sequence and position."""

    def fold(key: jax.Array, length: jax.Array, position_X: jax.Array) -> jax.Array:
      key = jax.random.fold_in(key, role)
      if self.is_of_round and role != TARGET:
        key = jax.random.fold_in(key, length)
      return jax.vmap(lambda position: jax.random.fold_in(key, position))(position_X)

    return jax.vmap(fold)(self.key_B, self.length_B, position_BX)
