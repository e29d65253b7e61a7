"""The interface of drafters: pure functions that propose tokens from features.

The decoding loop (`decode.loop`) has a target model, which turns tokens into next-token
logits and a *feature* of every position, and a `Drafter`, which proposes K tokens from
the features. Each is a tuple of pure functions over pytrees, so that any predictor (or
a table, in the tests) plugs in and one compiled program runs the whole generation.

Legend: B batch, S slots of a sequence, W rows of a window or of a step, D feature or
state, K drafts, N nodes of a tree, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
  """Consecutive positions whose features have just become known.

  tokens_BS: all tokens; the first `length_B` are committed.
  feature_BWD, position_BW: the rows, from `start_B` on. A position of S marks an
    absent row: its draft was rejected, or it is padding.
  last_B: the last present row, of position `length - 2`; -1 in a sequence that is done,
    which has none.
  """

  tokens_BS: jax.Array
  length_B: jax.Array
  feature_BWD: jax.Array
  position_BW: jax.Array
  start_B: jax.Array
  last_B: jax.Array


class Choice(NamedTuple):
  """One draft of every sequence.

  note: what else the caller of `propose` needs, such as the distribution from which the
    draft was drawn.
  """

  token_B: jax.Array
  note: Any = None


# (logits_BV, k) -> draft number k = 1..K.
Choose = Callable[[jax.Array, int], Choice]


class Nodes(NamedTuple):
  """A tree of drafts; siblings differ, and parents come before their children.

  token_BN: of each node. parent_BN: the row of its parent in a verification, in which
    row 0 is the newest committed token and row 1 + i is node i.
  """

  token_BN: jax.Array
  parent_BN: jax.Array


class Drafter(NamedTuple):
  """What proposes tokens. Hashable: it keys compiled programs.

  num_drafts: K, the depth of a tree; 0 is plain decoding.
  has_distribution: whether tokens come from logits, through `choose`, or are given.
  init(rows, slots) -> cache.
  catch_up(weights, cache, window) -> (cache, carry): caches the new features.
  propose(weights, cache, carry, window, choose) -> (cache, drafts): a list of K
    `Choice`, or the `Nodes` of a tree.
  num_nodes: N of a tree; None: the drafts are a chain.
  feeds_choices: whether logits depend on the drafts that were chosen before.
  """

  num_drafts: int
  has_distribution: bool
  init: Callable[..., Any]
  catch_up: Callable[..., Any]
  propose: Callable[..., Any]
  num_nodes: int | None = None
  feeds_choices: bool = True

  @property
  def num_drafted(self) -> int:
    """The tokens that are verified with the newest one: N of a tree, K of a chain."""
    return self.num_drafts if self.num_nodes is None else self.num_nodes


class Recursion(NamedTuple):
  """A drafter that reads its own output. Hashable.

  init(rows, slots) -> cache.
  catch_up(weights, cache, window) -> (cache, state_BD): caches the new features, and
    returns the state of the newest row.
  step(weights, cache, state_BWD, token_BW, places) -> (cache, state_BWD): W rows at
    once, each from the state of its parent and its own token; `places` are positions or
    `cache_slots.Places`.
  logits(weights, state_...D) -> logits_...V: of the token after the one that the state
    has read last.
  """

  init: Callable[..., Any]
  catch_up: Callable[..., Any]
  step: Callable[..., Any]
  logits: Callable[..., Any]


@functools.cache
def chain(recursion: Recursion, num_drafts: int) -> Drafter:
  """Returns the drafter of K >= 1 tokens, each from the state that read the last."""

  def propose(weights, cache, state_BD, window: Window, choose: Choose):
    drafts = [choose(recursion.logits(weights, state_BD), 1)]
    for k in range(2, 1 + num_drafts):
      # Row p has read token p + 1; the newest row is length - 2.
      position_B1 = window.length_B[:, None] + k - 3
      cache, state_B1D = recursion.step(
        weights, cache, state_BD[:, None], drafts[-1].token_B[:, None], position_B1
      )
      state_BD = state_B1D[:, 0]
      drafts.append(choose(recursion.logits(weights, state_BD), k))
    return cache, drafts

  return Drafter(num_drafts, True, recursion.init, recursion.catch_up, propose)


def take_rows(x_BT___: jax.Array, index_B___: jax.Array) -> jax.Array:
  """Returns x[b, index[b]] for every b, or x[b, index[b, i]]; -1 takes row 0."""
  rows_B___ = jnp.arange(x_BT___.shape[0]).reshape(-1, *[1] * (index_B___.ndim - 1))
  return x_BT___[rows_B___, jnp.maximum(index_B___, 0)]


def take_tokens(tokens_BS: jax.Array, position_BX: jax.Array) -> jax.Array:
  """Returns token_BX at the given positions; past the end, the last one."""
  rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
  return tokens_BS.at[rows_B1, position_BX].get(mode="clip")


def tokens_of(drafts: list[Choice]) -> jax.Array:
  """Returns the tokens of a chain, token_BK."""
  return jnp.stack([draft.token_B for draft in drafts], axis=1)
