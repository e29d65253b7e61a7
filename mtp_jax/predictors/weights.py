"""The trained network in the form that decoding wants: per-layer weights and caches.

Training stacks the parameters of equal layers and loops over them. A decoding step is
bound by reading weights, and taking a layer out of a stack would copy it every time;
`decode.target.unstack` does that once.

Legend: D embed, V vocab, C draft vocabulary, P learned positions.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import TrunkConfig
from mtp_jax.model.block import Block, Cache, empty_cache
from mtp_jax.model.cache_slots import Positions
from mtp_jax.model.layers import make_norm
from mtp_jax.predictors.vocabulary import scatter
from mtp_jax.sharding import platform


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


def layers(stack: Any, count: int) -> list[Any]:
  """Returns the trees of single layers from one of stacked parameters."""
  return [jax.tree.map(operator.itemgetter(i), stack) for i in range(count)]


def embed(weights: Weights, tokens: jax.Array) -> jax.Array:
  return jnp.take(weights.embedding_VD, tokens, axis=0)


def unembed(weights: Weights, hidden: jax.Array, depth: int = 0) -> jax.Array:
  """Returns the logits of a depth in at least float32; 0 is the next token."""
  if hidden.size == hidden.shape[-1] and prefers_two_rows():
    return unembed(weights, jnp.concatenate([hidden, hidden]), depth)[:1]
  own, tokens_C = weights.draft_unembeds_DV, weights.draft_tokens_C
  logits = jnp.einsum(
    "...D,DV->...V",
    hidden,
    own[min(depth, len(own)) - 1] if depth and own else weights.unembed_DV,
    preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
  )
  if depth == 0 or tokens_C is None:
    return logits
  return scatter(logits, tokens_C, len(weights.embedding_VD))


def prefers_two_rows() -> bool:
  """Returns whether products and norms of one row are slower than those of two.

  XLA on a GPU multiplies a single row elementwise, and writes what it then sums.
  """
  return platform() in ("gpu", "cuda")


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
