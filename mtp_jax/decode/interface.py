"""What the decoding loop asks of a target model and of a drafter: pure functions.

The loop in `loop.py` knows no network. A `Target` turns tokens into next-token logits
and a *feature* of every position; a `Drafter` proposes K tokens from features. Each is
a tuple of pure functions over pytrees, so that any predictor (or a table, in the tests)
plugs in and one compiled program runs the whole generation.

Legend: B batch, T new tokens, S slots of a sequence, W rows of a window, D feature,
K drafted tokens, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Target(NamedTuple):
  """The model whose output is to be reproduced. Hashable: it keys compiled programs.

  init(rows, slots) -> cache.
  forward(weights, tokens_BT, positions_BT, cache) -> (hidden_BTD, feature_BTD, cache):
    runs T new tokens and caches them at their positions. A position of `slots` or more
    marks a row that is not there: what is returned for it is not read.
  unembed(weights, hidden_...D) -> logits_...V of the next token, at least float32.
  """

  init: Callable[..., Any]
  forward: Callable[..., Any]
  unembed: Callable[..., Any]


class Window(NamedTuple):
  """Consecutive positions whose features have just become known.

  tokens_BS: all tokens; the first `length_B` are committed.
  feature_BWD, position_BW: the rows, from `start_B` on. A position of S marks a row
    that is not there: what was verified in it was rejected, or it is padding.
  last_B: the last row that is there, of position `length - 2`; -1 where there is none,
    in a sequence that is done.
  """

  tokens_BS: jax.Array
  length_B: jax.Array
  feature_BWD: jax.Array
  position_BW: jax.Array
  start_B: jax.Array
  last_B: jax.Array


# (logits_BV, k) -> token_B: chooses draft number k = 1..K, and notes its distribution.
Choose = Callable[[jax.Array, int], jax.Array]


class Drafter(NamedTuple):
  """What proposes tokens. Hashable: it keys compiled programs.

  num_drafts: K; 0 is plain decoding.
  has_distribution: whether tokens come from logits, through `choose`, or are given.
  init(rows, slots) -> cache.
  catch_up(weights, cache, window) -> (cache, carry): writes what the new features say.
  propose(weights, cache, carry, window, choose) -> (cache, drafts_BK).
  """

  num_drafts: int
  has_distribution: bool
  init: Callable[..., Any]
  catch_up: Callable[..., Any]
  propose: Callable[..., Any]


class Recursion(NamedTuple):
  """A drafter that goes on from its own output. Hashable.

  init(rows, slots) -> cache.
  catch_up(weights, cache, window) -> (cache, state_BD): writes what the new features
    say; the state of the newest row.
  step(weights, cache, state_BWD, token_BW, places) -> (cache, state_BWD): W rows at
    once, each from the state of its parent and its own token. `places` are positions
    [B, W], each of which is also the slot that the row is written to.
  logits(weights, state_...D) -> logits_...V: of the token after the one that the state
    has read last.
  """

  init: Callable[..., Any]
  catch_up: Callable[..., Any]
  step: Callable[..., Any]
  logits: Callable[..., Any]


@functools.cache
def chain(recursion: Recursion, num_drafts: int) -> Drafter:
  """Returns the drafter of K tokens, each from the state that has read those before it.

  The newest row is that of position `length - 2`; draft k - 1 is read in the row k - 1
  places on, which the features overwrite once they are known.
  """

  def propose(weights, cache, state_BD, window: Window, choose: Choose):
    newest_B1 = window.length_B[:, None] - 2
    drafts = [choose(recursion.logits(weights, state_BD), 1)]
    for k in range(2, 1 + num_drafts):
      cache, state_B1D = recursion.step(
        weights, cache, state_BD[:, None], drafts[-1][:, None], newest_B1 + k - 1
      )
      state_BD = state_B1D[:, 0]
      drafts.append(choose(recursion.logits(weights, state_BD), k))
    return cache, jnp.stack(drafts, axis=1)

  return Drafter(num_drafts, True, recursion.init, recursion.catch_up, propose)


def take_rows(x_BT___: jax.Array, index_B: jax.Array) -> jax.Array:
  """Returns x[b, index[b]] for every b; an index of -1 takes row 0."""
  return x_BT___[jnp.arange(x_BT___.shape[0]), jnp.maximum(index_B, 0)]


def take_tokens(tokens_BS: jax.Array, position_BX: jax.Array) -> jax.Array:
  """Returns token_BX at the given positions; past the end, the last one."""
  rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
  return tokens_BS.at[rows_B1, position_BX].get(mode="clip")
