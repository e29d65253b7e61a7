"""EAGLE in decoding: the layer of `drafters.eagle` with a cache of its own.

Its row i reads the feature of position i and token i + 1; what the layer says there is
the state that the next row goes on from where there is no feature yet.

Legend: B batch, S slots, W rows, D embed, X feature of the target, V vocab.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtp_jax.config import Config, TrunkConfig
from mtp_jax.decode import network
from mtp_jax.decode.interface import Recursion, Window, take_rows, take_tokens
from mtp_jax.decode.network import Weights
from mtp_jax.model.layers import make_norm
from mtp_jax.predictors import predictor_trunk
from mtp_jax.predictors.eagle import Eagle3Layer, EagleLayer, Fusion

# (weights, array) -> array.
Map = Callable[[Weights, jax.Array], jax.Array]


def recursion(config: Config) -> Recursion:
  """Returns the drafter of a model whose `mtp.kind` is eagle or eagle3."""
  trunk = predictor_trunk(config.trunk, config.mtp)
  return {"eagle": _eagle, "eagle3": _eagle3}[config.mtp.kind](trunk)


@functools.cache
def _eagle(trunk: TrunkConfig) -> Recursion:
  """The state is a normed output of the trunk as the drafter predicts it."""
  return _recursion(
    trunk,
    EagleLayer(trunk),
    begin=functools.partial(network.final_norm, trunk),
    end=lambda weights, state: state,
  )


@functools.cache
def _eagle3(trunk: TrunkConfig) -> Recursion:
  """The state has no norm; the unembedding reads it after one."""

  def begin(weights: Weights, streams_BWX: jax.Array) -> jax.Array:
    (params,) = weights.predictors
    return Fusion(trunk).apply({"params": params["fusion"]}, streams_BWX)

  def end(weights: Weights, state: jax.Array) -> jax.Array:
    (params,) = weights.predictors
    return make_norm(trunk).apply({"params": params["out_norm"]}, state)

  return _recursion(trunk, Eagle3Layer(trunk), begin, end)


def _recursion(
  trunk: TrunkConfig, layer: EagleLayer | Eagle3Layer, begin: Map, end: Map
) -> Recursion:
  """`begin`: a feature of the target -> a state. `end`: a state -> what is read out."""

  def init(rows: int, slots: int):
    (cache,) = network.empty_caches(trunk, 1, rows, slots)
    return cache

  def step(weights: Weights, cache, state_BWD, token_BW, places):
    (params,) = weights.predictors
    state_BWD, cache = layer.apply(
      {"params": params["layer"]},
      state_BWD,
      network.embed(weights, token_BW),
      places,
      jnp.zeros(token_BW.shape, jnp.int32),  # A cache holds one document per row.
      cache,
    )
    return cache, state_BWD

  def catch_up(weights: Weights, cache, window: Window):
    token_BW = take_tokens(window.tokens_BS, window.position_BW + 1)
    state_BWD = begin(weights, window.feature_BWD)
    cache, state_BWD = step(weights, cache, state_BWD, token_BW, window.position_BW)
    return cache, take_rows(state_BWD, window.last_B)

  def logits(weights: Weights, state: jax.Array) -> jax.Array:
    return network.unembed(weights, end(weights, state), depth=1)

  return Recursion(init, catch_up, step, logits)
