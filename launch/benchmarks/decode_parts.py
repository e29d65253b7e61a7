"""What a round of decoding consists of, each part repeated in a program of its own.

A part runs many times within one compiled loop, on the same pure functions, caches and
shapes as in `mtp_jax.decode.loop`, so that what is measured is its work and not the
dispatch of programs. What it computes is carried into its next turn, as in decoding,
and so cannot be left out or taken out of the loop by the compiler.

Legend: B batch, S slots, R = K + 1 rows of a verification, X of that of a tree, W rows
of the window, D feature.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.argmax import argmax
from mtp_jax.decode import loop, trees
from mtp_jax.decode.interface import Drafter, Window, take_tokens

_MOST_TURNS = 1 << 14


class Part:
  """A piece of work that can be timed again and again."""

  def __init__(self, body: Callable[[Any, Any], Any], inputs: Any, carry: Any):
    """Args: `body(inputs, carry) -> carry` is one turn; the carry is used up."""

    def turns(inputs: Any, carry: Any, count: jax.Array) -> Any:
      return jax.lax.fori_loop(0, count, lambda _, c: body(inputs, c), carry)

    self._program = jax.jit(turns, donate_argnums=1)
    self._inputs, self._carry = inputs, carry
    self._count = 1

  def warm_up(self, least_seconds: float) -> None:
    """Compiles, and finds how many turns take `least_seconds`."""
    self.seconds()
    self._count = 4
    turn = min(self.seconds(), self.seconds())
    self._count = min(max(math.ceil(least_seconds / turn), 4), _MOST_TURNS)

  def seconds(self) -> float:
    """Returns the time of one turn, as a mean over the turns of one run."""
    start = time.perf_counter()
    self._carry = self._program(self._inputs, self._carry, self._count)
    jax.block_until_ready(self._carry)
    return (time.perf_counter() - start) / self._count


def forward_rows(
  plan: loop.Plan, inputs: loop.Inputs, state: loop.DecodeState, rows: int
) -> Part:
  """Runs the target on the next `rows` tokens of every sequence, up to its choices.

  With one row it is the least that decoding can do for a token; with R the
  verification.
  """
  target, slots = plan.target, state.tokens_BS.shape[1]

  def body(inputs: loop.Inputs, carry: Any) -> Any:
    tokens_BR, position_BR, cache = carry
    hidden_BRD, _, cache = target.forward(
      inputs.weights, tokens_BR, position_BR, cache
    )
    logits_BRV = target.unembed(inputs.weights, hidden_BRD)
    tokens_BR = argmax(logits_BRV)
    return tokens_BR, (position_BR + 1) % slots, cache

  position_BR = state.length_B[:, None] - 1 + jnp.arange(rows)
  cache = jax.tree.map(jnp.copy, state.cache)
  return Part(body, inputs, (jnp.zeros_like(position_BR), position_BR, cache))


def forward_nodes(
  plan: loop.Plan, inputs: loop.Inputs, state: loop.DecodeState
) -> Part:
  """Runs the target on the newest token and all nodes of a tree, up to its choices."""
  target, nodes = plan.target, state.nodes
  sees_BXX = trees.ancestors(nodes.parent_BN, plan.drafter.num_drafts)
  places = trees.places(sees_BXX, state.length_B, state.tokens_BS.shape[1])

  def body(fixed: Any, carry: Any) -> Any:
    inputs, places = fixed
    tokens_BX, cache = carry
    hidden_BXD, _, cache = target.forward(inputs.weights, tokens_BX, places, cache)
    logits_BXV = target.unembed(inputs.weights, hidden_BXD)
    return argmax(logits_BXV), cache

  cache = jax.tree.map(jnp.copy, state.cache)
  tokens_BX = jnp.zeros(sees_BXX.shape[:2], jnp.int32)
  return Part(body, (inputs, places), (tokens_BX, cache))


def draft(
  plan: loop.Plan, inputs: loop.Inputs, state: loop.DecodeState
) -> Part:
  """Catches up with a window that is all new, then proposes K drafts, greedily."""
  drafter = plan.drafter
  rows = 1 + drafter.num_drafts
  length_B = jnp.maximum(state.length_B, 1 + rows)
  start_B = length_B - 1 - rows
  position_BW = start_B[:, None] + jnp.arange(rows)
  last_B = jnp.full_like(length_B, rows - 1)
  like_BWD = jax.eval_shape(
    plan.target.forward, inputs.weights, position_BW, position_BW, state.cache
  )[1]
  feature_BWD = jax.random.normal(jax.random.key(0), like_BWD.shape, like_BWD.dtype)
  places = (position_BW, start_B, last_B)
  fixed = (inputs.draft_weights, state.tokens_BS, length_B, places)

  def body(fixed: Any, carry: Any) -> Any:
    weights, tokens_BS, length_B, places = fixed
    drafts, feature_BWD, cache = carry
    # Hardly a change, but one that depends on the turn before.
    token_B1 = jax.tree.leaves(drafts)[0][:, :1]
    drift = 1e-9 * token_B1[:, :, None].astype(feature_BWD.dtype)
    window = Window(tokens_BS, length_B, feature_BWD + drift, *places)
    cache, found = drafter.catch_up(weights, cache, window)
    cache, drafts = drafter.propose(weights, cache, found, window, most_likely)
    return drafts, window.feature_BWD, cache

  cache = jax.tree.map(jnp.copy, state.draft_cache)
  drafts = state.drafts_BK if state.nodes is None else state.nodes
  return Part(
    body, fixed, (jax.tree.map(jnp.zeros_like, drafts), feature_BWD, cache)
  )


def most_likely(logits_BV: jax.Array, k: int) -> jax.Array:
  """The `interface.Choose` of greedy decoding."""
  del k
  return argmax(logits_BV)


def whole_round(
  plan: loop.Plan, inputs: loop.Inputs, state: loop.DecodeState
) -> Part:
  """Runs `loop.run_round`; a round of sequences that are done is as much work."""

  def body(inputs: loop.Inputs, state: loop.DecodeState) -> loop.DecodeState:
    return loop.run_round(plan, inputs, state)

  return Part(body, inputs, jax.tree.map(jnp.copy, state))


def forced(drafter: Drafter) -> Drafter:
  """Returns a drafter that does the work of `drafter` and then gives known tokens.

  Its weights are `(weights of drafter, drafts_BS)`, the latter as in `drafters.given`.
  """

  def propose(weights, cache, carry, window: Window, choose):
    own, drafts_BS = weights
    cache, found_BK = drafter.propose(own, cache, carry, window, choose)
    ahead_BK = window.length_B[:, None] + jnp.arange(drafter.num_drafts)
    given_BK = take_tokens(drafts_BS, ahead_BK)
    # Tokens are never negative, which the compiler does not know.
    return cache, jnp.where(found_BK < 0, found_BK, given_BK)

  return drafter._replace(
    has_distribution=False,
    catch_up=lambda weights, cache, window: drafter.catch_up(weights[0], cache, window),
    propose=propose,
  )
