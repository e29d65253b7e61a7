"""EAGLE drafters: one layer on the features of the trunk that goes on from its output.

Step k reads, in row i, the state of step k - 1 there and the embedding of token i + k,
at position i + k - 1, and its state is that of depth k: it predicts token i + k + 1.
Step 1 starts from the feature of the trunk. A row's later steps see the first step's
keys of the rows up to it and their own since then, which is what drafting computes: the
layer runs on the features that are known and then on its own output. Training so
computes at every row what drafting from there would with the true tokens. EAGLE-3 calls
that training-time test; EAGLE-1 was trained for one step (D = 1), without the later
ones.

A drafter for a trained trunk is trained with `train.freeze_trunk`; otherwise trunk and
drafter learn together. All depths share the trunk's embedding, and its output matrix
unless EAGLE-3 has its own. The feature noise of EAGLE-1's training is left out.

Legend: B batch, T sequence, D embed, M = 1 + depth, X three streams side by side.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import MtpConfig, TrunkConfig, predictor_trunk
from mtp_jax.kernels.dense import dense
from mtp_jax.model.attention import KVCache, Unrolled
from mtp_jax.model.block import add_layers, rematted
from mtp_jax.model.layers import compute_dtype, fan_in_normal, make_norm, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.model.mtp import Given

LayerCache = KVCache | Unrolled


class EagleLayer(nn.Module):
  """`fc([h; e]) + b`, then a decoder layer without its first norm: the next feature.

  EAGLE-1 (Li et al. 2024, arXiv 2401.15077) and its code. There is no norm behind it:
  the state is the trunk's normed output as the drafter predicts it.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    state_BTD: jax.Array,
    embedding_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    cache: LayerCache,
  ) -> tuple[jax.Array, LayerCache]:
    """Returns `(state_BTD, cache)` of this step from the state before it."""
    dim, dtype = self.trunk.embed_dim, compute_dtype(self.trunk)
    projection = self.param(
      "projection",
      partitioned(fan_in_normal(2 * dim), "concat", "embed"),
      (2 * dim, dim),
    )
    zeros = partitioned(nn.initializers.zeros, "norm")
    bias_D = self.param("projection_bias", zeros, (dim,))
    joined = jnp.concatenate([state_BTD, embedding_BTD], axis=-1)
    x_BTD = dense(joined, projection.astype(dtype)) + bias_D.astype(dtype)
    x_BTD, cache, _ = add_layers(
      self.trunk, x_BTD, x_BTD, positions_BT, segment_ids_BT, cache
    )
    return x_BTD, cache


class Eagle3Layer(nn.Module):
  """A decoder layer whose attention reads `[norm(h); norm(e)]`, twice as wide.

  EAGLE-3 (Li et al. 2025, arXiv 2503.01840) and its code. The residual stream is h as
  it is, and what comes out is the next h; only the unembedding reads a normed state.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    state_BTD: jax.Array,
    embedding_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    cache: LayerCache,
  ) -> tuple[jax.Array, LayerCache]:
    """Returns `(state_BTD, cache)`, as `EagleLayer` does."""
    normed_BTD = make_norm(self.trunk, "hidden_norm")(state_BTD)
    embedded_BTD = make_norm(self.trunk, "embed_norm")(embedding_BTD)
    joined = jnp.concatenate([normed_BTD, embedded_BTD], axis=-1)
    state_BTD, cache, _ = add_layers(
      self.trunk, state_BTD, joined, positions_BT, segment_ids_BT, cache
    )
    return state_BTD, cache


class Fusion(nn.Module):
  """One linear map of three of the trunk's streams: the feature of EAGLE-3."""

  trunk: TrunkConfig

  @nn.compact
  def __call__(self, streams_BTX: jax.Array) -> jax.Array:
    """Returns feature_BTD."""
    width, dim = streams_BTX.shape[-1], self.trunk.embed_dim
    init = partitioned(fan_in_normal(width), "concat", "embed")
    kernel = self.param("kernel", init, (width, dim))
    return dense(streams_BTX, kernel.astype(compute_dtype(self.trunk)))


class Eagle(nn.Module):
  """EAGLE-1: the feature is the trunk's output after its final norm; see the module."""

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    feature_BTD = given.final_norm(given.residual_BTD)
    layer = _unrollable(EagleLayer, self.trunk, self.mtp)
    states = _unroll(layer, feature_BTD, given, self.mtp.depth)
    return jnp.stack([feature_BTD, *states]), None


class Eagle3(nn.Module):
  """EAGLE-3: the feature is made of three streams of the trunk (`tapped_layers`).

  Later steps start from the un-normed state of the one before them. An output matrix of
  its own, `unembed` [D, V], is read by the loss, see `model.lm.unembeddings`; with
  `draft_tokens` it has columns for these alone, see `drafters.vocabulary`.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    streams_BTX = jnp.concatenate(given.tapped, axis=-1)
    feature_BTD = Fusion(self.trunk, name="fusion")(streams_BTX)
    layer = _unrollable(Eagle3Layer, self.trunk, self.mtp)
    states = _unroll(layer, feature_BTD, given, self.mtp.depth)
    out_norm = make_norm(self.trunk, "out_norm")
    if self.mtp.unembed == "own":
      num_tokens = self.mtp.draft_vocab or given.unembed_DV.shape[1]
      self.param(
        "unembed",
        partitioned(given.copied_unembed, "embed", "vocab"),
        (self.trunk.embed_dim, num_tokens),
      )
    if self.mtp.draft_vocab:  # Which tokens they are, the run says when it begins.
      first = lambda key, shape: jnp.arange(*shape, dtype=jnp.float32)  # noqa: E731
      self.param("draft_tokens", partitioned(first, "norm"), (num_tokens,))
    normed_BTD = given.final_norm(given.residual_BTD)
    return jnp.stack([normed_BTD, *map(out_norm, states)]), None


def _unrollable(
  kind: type[nn.Module], trunk: TrunkConfig, mtp: MtpConfig
) -> nn.Module:
  """Returns the layer, rematerialised as one that runs in no scan."""
  trunk = dataclasses.replace(predictor_trunk(trunk, mtp), scan_layers=False)
  return rematted(kind, trunk)(trunk, name="layer")


def _unroll(
  layer: nn.Module, feature_BTD: jax.Array, given: Given, depth: int
) -> list[jax.Array]:
  """Returns the states of depths 1 to D, each [B, T, D]."""
  states, cache = [feature_BTD], Unrolled()
  for k in range(1, 1 + depth):
    state_BTD, cache = layer(
      states[-1],
      given.embed_ahead(k),
      given.positions_BT + (k - 1),
      given.segment_ids_BT,
      cache,
    )
    states.append(state_BTD)
  return states[1:]
