"""Drafters: the extra predictors of a trained model, nothing, and given tokens.

At the newest position whose feature is known, `length - 2`, predictor k says what comes
k + 1 places on, which is draft k.

Legend: B batch, S slots, W rows of the window, D embed, K drafts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import Config, TrunkConfig
from mtp_jax.decode import eagle, network
from mtp_jax.decode.interface import (
  Choose,
  Drafter,
  Recursion,
  Window,
  chain,
  take_rows,
  take_tokens,
)
from mtp_jax.decode.network import Weights
from mtp_jax.model.layers import compute_dtype
from mtp_jax.predictors import predictor_trunk
from mtp_jax.predictors.medusa import medusa_head
from mtp_jax.predictors.sequential import SequentialModule


def own_predictors(
  config: Config, num_drafts: int | None = None, recurse: bool = False
) -> Drafter:
  """Returns the drafter that a model was trained with.

  Args:
    config: of the model.
    num_drafts: K; None takes all D predictors.
    recurse: let the last sequential module go on from its own output where K > D, as
      EAGLE drafters do in any case.

  Raises:
    ValueError: more drafts than there are predictors.
  """
  depth, kind = config.mtp.depth, config.mtp.kind
  num_drafts = depth if num_drafts is None else num_drafts
  if num_drafts < 0:
    raise ValueError(f"num_drafts must be at least 0, got {num_drafts}.")
  is_recursive = kind in ("eagle", "eagle3") or (
    recurse and kind == "sequential" and depth
  )
  if num_drafts > depth and not is_recursive:
    hint = "; or set recurse=True" if kind == "sequential" and depth else ""
    raise ValueError(
      f"num_drafts must be at most the model's {depth} extra predictor(s) "
      f"(mtp.kind {kind!r}){hint}; got {num_drafts}."
    )
  if num_drafts == 0:
    return given(0)  # Plain decoding; nothing of a drafter is called then.
  if kind in ("eagle", "eagle3"):
    return chain(eagle.recursion(config), num_drafts)
  trunk = predictor_trunk(config.trunk, config.mtp)
  if kind == "parallel":
    return _parallel_heads(trunk, num_drafts)
  if kind == "linear":
    return _heads_on_one_state(trunk, num_drafts, _linear_head)
  if kind == "medusa":
    return _heads_on_one_state(trunk, num_drafts, _medusa_head)
  mtp = config.mtp
  module = SequentialModule(trunk, mtp.out_norm, mtp.norm)
  return _sequential_modules(
    module, depth, num_drafts, mtp.hidden, mtp.hidden_norm, mtp.fed
  )


def own_recursion(config: Config) -> Recursion:
  """Returns the predictor that a model was trained with, to go on from its own output.

  Raises:
    ValueError: the model has none that could.
  """
  mtp = config.mtp
  if mtp.kind in ("eagle", "eagle3"):
    return eagle.recursion(config)
  is_one = mtp.depth == 1 or (mtp.depth > 1 and mtp.share_modules)
  if mtp.kind != "sequential" or not is_one:
    raise ValueError(
      "drafts that go on from the drafter's own output need EAGLE or one sequential "
      "module (mtp.kind 'sequential' with mtp.depth 1 or mtp.share_modules), got "
      f"mtp.kind {mtp.kind!r} with mtp.depth {mtp.depth}."
    )
  trunk = predictor_trunk(config.trunk, mtp)
  module = SequentialModule(trunk, mtp.out_norm, mtp.norm)
  return _module_recursion(module, mtp.hidden_norm, mtp.fed)


@functools.cache
def given(num_drafts: int) -> Drafter:
  """Returns a drafter of known tokens; its weights are drafts_BS by position.

  With the tokens that the target will choose it is an oracle, with others it is always
  wrong: both ends of what a drafter can be.
  """

  def propose(drafts_BS, cache, carry, window: Window, choose: Choose):
    del carry, choose
    ahead_BK = window.length_B[:, None] + jnp.arange(num_drafts)
    return cache, take_tokens(drafts_BS, ahead_BK)

  return Drafter(
    num_drafts,
    has_distribution=False,
    init=lambda rows, slots: (),
    catch_up=lambda weights, cache, window: (cache, ()),
    propose=propose,
  )


@functools.cache
def _heads_on_one_state(
  trunk: TrunkConfig, num_drafts: int, head: Callable[[Any, jax.Array], jax.Array]
) -> Drafter:
  """One head per draft, (its parameters, normed feature) -> state; no cache."""

  def catch_up(weights: Weights, cache, window: Window):
    feature_BD = take_rows(window.feature_BWD, window.last_B)
    return cache, network.final_norm(trunk, weights, feature_BD)

  def propose(weights: Weights, cache, hidden_BD, window: Window, choose: Choose):
    del window
    drafts = [
      choose(network.unembed(weights, head(params, hidden_BD), depth=k), k)
      for k, params in enumerate(weights.predictors[:num_drafts], start=1)
    ]
    return cache, jnp.stack(drafts, axis=1)

  return Drafter(
    num_drafts, True, lambda rows, slots: (), catch_up, propose, feeds_choices=False
  )


def _linear_head(map_DD: jax.Array, hidden_BD: jax.Array) -> jax.Array:
  return hidden_BD @ map_DD


def _medusa_head(params: dict[str, jax.Array], hidden_BD: jax.Array) -> jax.Array:
  return medusa_head(hidden_BD, params["kernels"], params["biases"])


@functools.cache
def _parallel_heads(trunk: TrunkConfig, num_drafts: int) -> Drafter:
  """One layer per draft on the trunk's features; its cache never holds a draft."""

  def init(rows: int, slots: int):
    return network.empty_caches(trunk, num_drafts, rows, slots)

  def catch_up(weights: Weights, caches, window: Window):
    written, last = [], []
    for head, cache in zip(weights.predictors, caches, strict=False):
      x_BWD, cache = network.run_block(
        trunk, head, window.feature_BWD, window.position_BW, cache
      )
      written.append(cache)
      last.append(take_rows(x_BWD, window.last_B))
    return tuple(written), last

  def propose(weights: Weights, caches, last, window: Window, choose: Choose):
    del window
    drafts = []
    for k, x_BD in enumerate(last, start=1):
      hidden_BD = network.final_norm(trunk, weights, x_BD)
      drafts.append(choose(network.unembed(weights, hidden_BD), k))
    return caches, jnp.stack(drafts, axis=1)

  return Drafter(num_drafts, True, init, catch_up, propose, feeds_choices=False)


@functools.cache
def _sequential_modules(
  module: SequentialModule,
  depth: int,
  num_drafts: int,
  hidden: str,
  hidden_norm: str,
  fed: str,
) -> Drafter:
  """The causal chain, module k fed with the token k places on: committed or drafted.

  Row i of module k depends on token i + k, so that its last k - 1 rows hold drafts and
  are run again in the next round, with the tokens that were committed. The rows of
  module k so begin one before those of module k - 1; the state that module k is given
  there is final, and kept (`edges`): what module k - 1 said, or the trunk's own. Past
  the last module, the last one goes on at the next position from a state that has seen
  as many tokens as what it was trained on; those rows are rewritten too.

  `hidden`, `hidden_norm` and `fed` are those of `config.MtpConfig`, and each module is
  given at the newest position what training gives it at the end of a row. With
  `trunk_shifted` the window's own features are what module k is given k - 1 positions
  before them, and drafts stand in for the features that do not exist yet.

  With `fed` "own" the tokens are the committed and drafted ones too. In the newest row
  of a greedy generation these are the modules' own choices, as in training: the newest
  committed token is the arg max of the main head, and draft k - 1 that of module k - 1.
  The rows before it differ from training where a committed token, of the prompt or in
  the place of a rejected draft, is not what was predicted; so does the newest row where
  tokens are sampled. The drafts are then worse, and the text no other.
  """
  chained, trunk = min(num_drafts, depth), module.trunk

  def init(rows: int, slots: int):
    edge_BD = jnp.zeros((rows, trunk.embed_dim), compute_dtype(trunk))
    caches = network.empty_caches(trunk, chained, rows, slots)
    return caches, (edge_BD,) * (0 if hidden == "trunk_shifted" else chained - 1)

  def run(weights: Weights, k: int, cache, given_BWD, position_BW, tokens_BS):
    """Module k (from 1) at the given positions."""
    which = min(k, len(weights.predictors)) - 1  # One serves all depths if shared.
    embedding_BWD = None
    if fed != "none":
      ahead_BW = position_BW + k
      embedding_BWD = network.embed(weights, take_tokens(tokens_BS, ahead_BW))
    hidden_BWD, cache, _ = module.apply(
      {"params": weights.predictors[which]},
      given_BWD,
      embedding_BWD,
      position_BW,
      jnp.zeros_like(position_BW),
      cache,
    )
    return hidden_BWD, cache

  def catch_up(weights: Weights, cache, window: Window):
    (first, *caches), edges = cache
    given_BWD = window.feature_BWD
    if hidden_norm == "after":
      given_BWD = network.final_norm(trunk, weights, given_BWD)
    hidden_BWD, first = run(
      weights, 1, first, given_BWD, window.position_BW, window.tokens_BS
    )
    return ((first, *caches), edges), (given_BWD, hidden_BWD)

  def propose(weights: Weights, cache, carry, window: Window, choose: Choose):
    caches, edges = map(list, cache)
    given_BWD, hidden_BWD = carry
    tokens_BS, slots = window.tokens_BS, window.tokens_BS.shape[1]
    position_BW, last_B = window.position_BW, window.last_B
    states, drafts = [], []  # Of the drafts so far: the state that each was read from.
    rows_B = jnp.arange(tokens_BS.shape[0])
    has_new_B1 = (window.last_B >= 0)[:, None]
    newest_B1 = window.length_B[:, None] - 2
    for k in range(1, 1 + num_drafts):
      if k > depth:
        # Depth D at that position is given what has seen this many tokens.
        seen = k - depth if hidden == "trunk" else k - 1
        given_BWD = states[seen - 1][:, None]
        position_BW, last_B = newest_B1 + k - depth, jnp.zeros_like(last_B)
      elif k > 1 and hidden == "trunk_shifted":
        before_BW = jnp.where(position_BW < slots, position_BW - 1, slots)
        before_BW = jnp.where(before_BW >= 0, before_BW, slots)
        position_BW = jnp.concatenate([before_BW, newest_B1], axis=1)
        given_BWD = jnp.concatenate([given_BWD, states[-1][:, None]], axis=1)
        last_B = jnp.full_like(last_B, given_BWD.shape[1] - 1)
      elif k > 1:
        source_BWD = hidden_BWD if hidden == "chained" else given_BWD
        edge_BD = edges[k - 2]
        # In the next round module k begins where this state is final now.
        final_BD = take_rows(source_BWD, window.last_B)
        edges[k - 2] = jnp.where(has_new_B1, final_BD, edge_BD)
        before_B = window.start_B - (k - 1)
        before_B = jnp.where(before_B >= 0, before_B, slots)
        position_BW = jnp.concatenate([before_B[:, None], position_BW], axis=1)
        given_BWD = jnp.concatenate([edge_BD[:, None], source_BWD], axis=1)
        last_B = last_B + 1
      if k > 1:
        number = min(k, depth)
        hidden_BWD, caches[number - 1] = run(
          weights, number, caches[number - 1], given_BWD, position_BW, tokens_BS
        )
      states.append(take_rows(hidden_BWD, last_B))
      drafts.append(choose(network.unembed(weights, states[-1]), k))
      slot_B = window.length_B + k - 1
      tokens_BS = tokens_BS.at[rows_B, slot_B].set(drafts[-1], mode="drop")
    return (tuple(caches), tuple(edges)), jnp.stack(drafts, axis=1)

  return Drafter(num_drafts, True, init, catch_up, propose, feeds_choices=fed != "none")


@functools.cache
def _module_recursion(
  module: SequentialModule, hidden_norm: str, fed: str
) -> Recursion:
  """One sequential module, given the trunk's features first and then what it says.

  Row i has read token i + 1. This is what depth 1 is trained on, and the same as
  `_sequential_modules` with `recurse` at D = 1.
  """
  trunk = module.trunk

  def init(rows: int, slots: int):
    return network.empty_caches(trunk, 1, rows, slots)[0]

  def run(weights: Weights, cache, given_BWD, token_BW, places):
    embedding_BWD = None if fed == "none" else network.embed(weights, token_BW)
    no_segments = jnp.zeros(given_BWD.shape[:2], jnp.int32)
    hidden_BWD, cache, _ = module.apply(
      {"params": weights.predictors[0]},
      given_BWD, embedding_BWD, places, no_segments, cache,
    )
    return cache, hidden_BWD

  def catch_up(weights: Weights, cache, window: Window):
    given_BWD = window.feature_BWD
    if hidden_norm == "after":
      given_BWD = network.final_norm(trunk, weights, given_BWD)
    token_BW = take_tokens(window.tokens_BS, window.position_BW + 1)
    cache, hidden_BWD = run(weights, cache, given_BWD, token_BW, window.position_BW)
    return cache, take_rows(hidden_BWD, window.last_B)

  return Recursion(init, catch_up, run, network.unembed)
