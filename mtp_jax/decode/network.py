"""The trained network in the form that decoding wants: per-layer weights and caches.

Training stacks the parameters of equal layers and loops over them. A decoding step is
bound by reading weights, and taking a layer out of a stack would copy it every time;
`unstack` does that once.

Legend: B batch, T new tokens, S slots, D embed, V vocab.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import (
  EAGLES,
  Config,
  TrunkConfig,
  num_trunk_layers,
  tapped_layers,
)
from mtp_jax.decode.interface import Target
from mtp_jax.drafters.vocabulary import scatter
from mtp_jax.model.block import Block, Cache, empty_cache
from mtp_jax.model.cache_slots import Positions, positions_of
from mtp_jax.model.layers import compute_dtype, make_norm
from mtp_jax.model.lm import draft_tokens, unembed_matrix, unembeddings


class Weights(NamedTuple):
  """Parameters of an `MtpLm`, matrices in the compute dtype.

  blocks: the trunk's layers, and the first head of parallel heads.
  predictors: what depth 1, 2, ... D adds: a head, a module or a linear map; one module
    where it is shared; all of an EAGLE drafter.
  draft_unembeds_DV: the output matrix of depth 1, 2, ... D, where they have their own;
    one where they share it.
  draft_tokens_C: the tokens that can be drafted; None: every one.
  """

  embedding_VD: jax.Array
  position_PD: jax.Array | None
  blocks: tuple[Any, ...]
  final_norm: Any
  unembed_DV: jax.Array
  predictors: tuple[Any, ...]
  draft_unembeds_DV: tuple[jax.Array, ...]
  draft_tokens_C: jax.Array | None


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
  layers = lambda stack, count: [  # noqa: E731
    jax.tree.map(operator.itemgetter(i), stack) for i in range(count)
  ]
  num_dense = config.trunk.dense_prefix
  blocks = layers(params["trunk"]["dense_blocks"], num_dense) if num_dense else []
  blocks += layers(params["trunk"]["blocks"], num_trunk_layers(config) - num_dense)
  depth, kind = config.mtp.depth, config.mtp.kind
  predictors = []
  if kind == "parallel":
    first, *predictors = layers(params["mtp"]["heads"], 1 + depth)
    blocks.append(first)
  elif kind == "linear" and depth:
    predictors = layers(params["mtp"]["maps"], depth)
  elif kind == "medusa" and depth:
    heads = ("kernels", "biases")
    predictors = layers({name: params["mtp"][name] for name in heads}, depth)
  elif kind == "sequential" and depth:
    stack = params["mtp"]["modules"]
    predictors = [stack] if config.mtp.share_modules else layers(stack, depth)
  elif kind in EAGLES:
    predictors = [params["mtp"]]
  is_learned = config.trunk.kind == "gpt2"
  return Weights(
    params["embed"]["embedding"],
    params["position_embed"]["embedding"] if is_learned else None,
    tuple(blocks),
    params["final_norm"],
    unembed_matrix(params, config),
    tuple(predictors),
    tuple(own_DV for _, own_DV in unembeddings(params, config)[1:]),
    draft_tokens(params, config),
  )


def target(config: Config) -> Target:
  """Returns the next-token model inside an MTP model as a decoding target.

  Its feature is the trunk's un-normed residual stream, which is what every kind of
  predictor starts from; that of EAGLE-3 is three such streams side by side. Parallel
  heads predict the next token by their first head.
  """
  layers = num_trunk_layers(config)
  taps = tapped_layers(config) or (layers,)
  return _target(config.trunk, taps, layers + (config.mtp.kind == "parallel"))


@functools.cache
def _target(trunk: TrunkConfig, taps: tuple[int, ...], num_blocks: int) -> Target:
  num_dense = trunk.dense_prefix

  def init(rows: int, slots: int) -> tuple[Cache, ...]:
    return empty_caches(trunk, num_blocks, rows, slots)

  def forward(weights: Weights, tokens_BT, positions_BT, caches):
    x_BTD = embed(weights, tokens_BT)
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
    return final_norm(trunk, weights, x_BTD), feature_BTD, tuple(caches)

  def move(caches, source_BT: jax.Array, slot_BT: jax.Array) -> tuple[Cache, ...]:
    return tuple(cache.move(source_BT, slot_BT) for cache in caches)

  return Target(init, forward, unembed, move)


def embed(weights: Weights, tokens: jax.Array) -> jax.Array:
  return jnp.take(weights.embedding_VD, tokens, axis=0)


def unembed(weights: Weights, hidden: jax.Array, depth: int = 0) -> jax.Array:
  """Returns the logits of a depth in at least float32; 0 is the next token."""
  own, tokens_C = weights.draft_unembeds_DV, weights.draft_tokens_C
  logits = jnp.einsum(
    "...D,DV->...V",
    hidden,
    own[depth - 1] if depth and own else weights.unembed_DV,
    preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
  )
  if depth == 0 or tokens_C is None:
    return logits
  return scatter(logits, tokens_C, len(weights.embedding_VD))


def final_norm(trunk: TrunkConfig, weights: Weights, x: jax.Array) -> jax.Array:
  return make_norm(trunk).apply({"params": weights.final_norm}, x)


def run_block(
  trunk: TrunkConfig, params: Any, x_BTD: jax.Array, positions_BT: Positions,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  # A cache holds one document per row.
  no_segments = jnp.zeros(x_BTD.shape[:2], jnp.int32)
  block = Block(trunk)
  return block.apply({"params": params}, x_BTD, positions_BT, no_segments, cache)[:2]


def empty_caches(
  trunk: TrunkConfig, count: int, rows: int, slots: int
) -> tuple[Cache, ...]:
  return tuple(empty_cache(trunk, rows, slots) for _ in range(count))
