"""The decoding target: the next-token model inside an MTP model, and its weights.

Legend: B batch, T new tokens, S slots, D embed, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config, TrunkConfig
from mtp_jax.lm import draft_tokens, unembed_matrix, unembeddings
from mtp_jax.model.block import Cache
from mtp_jax.model.cache_slots import positions_of
from mtp_jax.model.layers import compute_dtype
from mtp_jax.predictors import kind_of, num_trunk_layers, tapped_layers
from mtp_jax.predictors.weights import (
  Weights,
  embed,
  empty_caches,
  final_norm,
  layers,
  prefers_two_rows,
  run_block,
  unembed,
)


class Target(NamedTuple):
  """The model whose output is to be reproduced. Hashable: it keys compiled programs.

  init(rows, slots) -> cache.
  forward(weights, tokens_BT, positions_BT, cache) -> (hidden_BTD, feature_BTD, cache):
    runs T new tokens and caches them at their positions. A position of `slots` or more
    marks an absent row, whose result is not read. Nodes of a tree have
    `cache_slots.Places` instead of positions.
  unembed(weights, hidden_...D) -> logits_...V of the next token, at least float32.
  move(cache, source_BT, slot_BT) -> cache: copies entries from slot to slot, and skips
    a slot of S or more. Only trees need it.
  """

  init: Callable[..., Any]
  forward: Callable[..., Any]
  unembed: Callable[..., Any]
  move: Callable[..., Any]


@functools.partial(jax.jit, static_argnums=1)
def unstack(params: Any, config: Config) -> Weights:
  """Returns the `Weights` of a parameter tree; shardings are kept."""
  dtype = compute_dtype(config.trunk)
  # What norms and routers compute with in float32 stays as wide as in training.
  is_wide = lambda path: path[-1].key in (  # noqa: E731
    "scale", "bias", "router", "draft_tokens"
  )
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x if is_wide(path) else x.astype(dtype), params
  )
  num_dense = config.trunk.dense_prefix
  blocks = layers(params["trunk"]["dense_blocks"], num_dense) if num_dense else []
  blocks += layers(params["trunk"]["blocks"], num_trunk_layers(config) - num_dense)
  kind = kind_of(config.mtp)
  predictors = kind.unstack(params["mtp"], config.mtp) if "mtp" in params else []
  blocks += predictors[: kind.deployed_blocks]
  is_learned = config.trunk.kind == "gpt2"
  return Weights(
    params["embed"]["embedding"],
    params["position_embed"]["embedding"] if is_learned else None,
    tuple(blocks),
    params["final_norm"],
    unembed_matrix(params, config),
    tuple(predictors[kind.deployed_blocks :]),
    tuple(own_DV for _, own_DV in unembeddings(params, config)[1:]),
    draft_tokens(params, config),
  )


def make_target(config: Config) -> Target:
  """Returns the next-token model inside an MTP model as a decoding target.

  Its feature is the trunk's un-normed residual stream, which is what every kind of
  predictor starts from, or several such streams side by side (`tapped_layers`). Blocks
  of the predictors that are deployed come after the trunk's.
  """
  layers = num_trunk_layers(config)
  taps = tapped_layers(config) or (layers,)
  deployed = layers + kind_of(config.mtp).deployed_blocks
  return _target(config.trunk, taps, deployed)


@functools.cache
def _target(trunk: TrunkConfig, taps: tuple[int, ...], num_blocks: int) -> Target:
  num_dense = trunk.dense_prefix

  def init(rows: int, slots: int) -> tuple[Cache, ...]:
    return empty_caches(trunk, num_blocks, rows, slots)

  def forward(weights: Weights, tokens_BT, positions_BT, caches):
    x_BTD, T = embed(weights, tokens_BT), tokens_BT.shape[1]
    is_grouped = trunk.attention_kind == "grouped" and not trunk.moe.num_experts
    if tokens_BT.size == 1 and is_grouped and prefers_two_rows():
      x_BTD = jnp.pad(x_BTD, ((0, 0), (0, 1), (0, 0)))  # The second has no position.
    if weights.position_PD is not None:
      # Drafts may run over the end; they are never committed, but must stay finite.
      positions = positions_of(positions_BT)
      x_BTD += jnp.take(weights.position_PD, positions, axis=0, mode="clip")
    streams, caches = [], list(caches)
    for i, block in enumerate(weights.blocks):
      x_BTD, caches[i] = run_block(
        trunk.dense() if i < num_dense else trunk, block, x_BTD, positions_BT, caches[i]
      )
      streams.append(x_BTD)
    feature_BTD = jnp.concatenate([streams[number - 1] for number in taps], axis=-1)
    hidden_BTD = final_norm(trunk, weights, x_BTD)
    return hidden_BTD[:, :T], feature_BTD[:, :T], tuple(caches)

  def move(caches, source_BT: jax.Array, slot_BT: jax.Array) -> tuple[Cache, ...]:
    return tuple(cache.move(source_BT, slot_BT) for cache in caches)

  return Target(init, forward, unembed, move)
