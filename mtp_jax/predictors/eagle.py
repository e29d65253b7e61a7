"""EAGLE drafters: one layer, which reads the trunk's features, then its own output.

Step k reads, in row i, the state of step k - 1 there and the embedding of token i + k,
at position i + k - 1, and its state, of depth k, predicts token i + k + 1.
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
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Config, MtpConfig, TrunkConfig
from mtp_jax.kernels.dense import dense
from mtp_jax.model.attention import KVCache, Unrolled
from mtp_jax.model.block import add_layers, rematted
from mtp_jax.model.layers import compute_dtype, fan_in_normal, make_norm, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.drafting import (
  Recursion,
  Window,
  chain,
  take_rows,
  take_tokens,
)
from mtp_jax.predictors.interface import Given, Kind, Norm
from mtp_jax.predictors.weights import (
  Weights,
  embed,
  empty_caches,
  final_norm,
  unembed,
)

LayerCache = KVCache | Unrolled


def _as_it_is(x: jax.Array) -> jax.Array:
  return x


class EagleLayer(nn.Module):
  """`fc([h; e]) + b`, then a decoder layer without its first norm: the next feature.

  EAGLE-1 (Li et al. 2024, arXiv 2401.15077) and its code. There is no norm behind it:
  the state is the trunk's normed output as the drafter predicts it.
  `has_bias`: whether there is a b.
  """

  trunk: TrunkConfig
  has_bias: bool

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
    joined = jnp.concatenate([state_BTD, embedding_BTD], axis=-1)
    x_BTD = dense(joined, projection.astype(dtype))
    if self.has_bias:
      zeros = partitioned(nn.initializers.zeros, "norm")
      x_BTD += self.param("projection_bias", zeros, (dim,)).astype(dtype)
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
  """One linear map of three of the trunk's streams: the feature of EAGLE-3.

  has_norms: each stream has a norm of its own first, `fc_norm` of EAGLE-3.1.
  """

  trunk: TrunkConfig
  has_norms: bool = False

  @nn.compact
  def __call__(self, streams_BTX: jax.Array) -> jax.Array:
    """Returns feature_BTD."""
    if self.has_norms:
      streams = jnp.split(streams_BTX, 3, axis=-1)
      norms = [make_norm(self.trunk, f"norm_{i}") for i in range(3)]
      normed = [norm(x) for norm, x in zip(norms, streams, strict=True)]
      streams_BTX = jnp.concatenate(normed, axis=-1)
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
    layer = unrollable(EagleLayer, self.trunk, self.mtp.fc_bias, name="layer")
    states = _unroll(layer, feature_BTD, given, self.mtp.depth)
    return jnp.stack([feature_BTD, *states]), None


class Eagle3(nn.Module):
  """EAGLE-3: the feature is made of three streams of the trunk (`tapped_layers`).

  Later steps start from the un-normed state of the one before them; with the norms of
  EAGLE-3.1 (arXiv 2605.09992, `mtp.fc_norm` and `mtp.norm_output`) from what the output
  matrix reads, and every stream has a norm before they are joined. An output matrix of
  its own, `unembed` [D, V], is read by the loss, see `lm.unembeddings`; with
  `draft_tokens` it has columns for these alone, see `vocabulary`.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    out_norm = make_norm(self.trunk, "out_norm")
    if self.mtp.norm_output:
      states = self._states(given, out_norm)
    else:
      states = list(map(out_norm, self._states(given)))
    if self.mtp.unembed == "own":
      num_tokens = self.mtp.draft_vocab or given.unembed_DV.shape[1]
      self.param(
        "unembed",
        partitioned(given.copied_unembed, "embed", "vocab"),
        (self.trunk.embed_dim, num_tokens),
      )
    if self.mtp.draft_vocab:  # The run sets the ids when it begins.
      first = lambda key, shape: jnp.arange(*shape, dtype=jnp.float32)  # noqa: E731
      self.param("draft_tokens", partitioned(first, "norm"), (num_tokens,))
    normed_BTD = given.final_norm(given.residual_BTD)
    return jnp.stack([normed_BTD, *states]), None

  def _states(self, given: Given, after: Norm = _as_it_is) -> list[jax.Array]:
    """Returns the states of depths 1 to D, each [B, T, D] and `after` a norm."""
    streams_BTX = jnp.concatenate(given.tapped, axis=-1)
    fusion = Fusion(self.trunk, self.mtp.fc_norm, name="fusion")
    layer = unrollable(Eagle3Layer, self.trunk, name="layer")
    return _unroll(
      layer, fusion(streams_BTX), given, self.mtp.depth, self._masked(fusion, given),
      after,
    )

  def _masked(
    self, fusion: Fusion, given: Given
  ) -> tuple[jax.Array, jax.Array] | None:
    """Returns what later steps read instead of state and embedding, if anything."""
    del fusion, given
    return None


def unrollable(
  layer: type[nn.Module], trunk: TrunkConfig, *more: bool, name: str
) -> nn.Module:
  """Returns the layer, rematerialised as one that runs in no scan."""
  trunk = dataclasses.replace(trunk, scan_layers="off")
  return rematted(layer, trunk)(trunk, *more, name=name)


def _unroll(
  layer: nn.Module,
  feature_BTD: jax.Array,
  given: Given,
  depth: int,
  masked: tuple[jax.Array, jax.Array] | None = None,
  after: Norm = _as_it_is,
) -> list[jax.Array]:
  """Returns the states of depths 1 to D, each [B, T, D].

  masked: state and embedding that all steps but the first read, if they are given none.
  after: norm of a state, which the next step then reads.
  """
  states, cache = [feature_BTD], Unrolled()
  for k in range(1, 1 + depth):
    is_masked = masked is not None and k > 1
    state_BTD, embedding_BTD = masked if is_masked else (
      states[-1], given.embed_ahead(k)
    )
    state_BTD, cache = layer(
      state_BTD,
      embedding_BTD,
      given.positions_BT + (k - 1),
      given.segment_ids_BT,
      cache,
    )
    states.append(after(state_BTD))
  return states[1:]


# (weights, array) -> array.
Map = Callable[[Weights, jax.Array], jax.Array]


def _unchanged(weights: Weights, state: jax.Array) -> jax.Array:
  del weights
  return state


@functools.cache
def _eagle_recursion(trunk: TrunkConfig, mtp: MtpConfig) -> Recursion:
  """The state is a normed output of the trunk as the drafter predicts it."""
  return _recursion(
    trunk,
    EagleLayer(trunk, mtp.fc_bias),
    begin=functools.partial(final_norm, trunk),
    after=_unchanged,
    end=_unchanged,
  )


@functools.cache
def eagle3_recursion(trunk: TrunkConfig, mtp: MtpConfig) -> Recursion:
  """The unembedding reads the state after a norm; with `norm_output` steps do too."""

  def begin(weights: Weights, streams_BWX: jax.Array) -> jax.Array:
    (params,) = weights.predictors
    fusion = Fusion(trunk, mtp.fc_norm)
    return fusion.apply({"params": params["fusion"]}, streams_BWX)

  def normed(weights: Weights, state: jax.Array) -> jax.Array:
    (params,) = weights.predictors
    return make_norm(trunk).apply({"params": params["out_norm"]}, state)

  ends = (normed, _unchanged) if mtp.norm_output else (_unchanged, normed)
  return _recursion(trunk, Eagle3Layer(trunk), begin, *ends)


def _recursion(
  trunk: TrunkConfig, layer: EagleLayer | Eagle3Layer, begin: Map, after: Map, end: Map
) -> Recursion:
  """Returns the drafter of a layer, given three maps.

  begin: a feature of the target -> a state. after: what the layer returns -> a state.
  end: a state -> what is read out.
  """

  def init(rows: int, slots: int):
    (cache,) = empty_caches(trunk, 1, rows, slots)
    return cache

  def step(weights: Weights, cache, state_BWD, token_BW, places):
    (params,) = weights.predictors
    state_BWD, cache = layer.apply(
      {"params": params["layer"]},
      state_BWD,
      embed(weights, token_BW),
      places,
      jnp.zeros(token_BW.shape, jnp.int32),  # A cache holds one document per row.
      cache,
    )
    return cache, after(weights, state_BWD)

  def catch_up(weights: Weights, cache, window: Window):
    token_BW = take_tokens(window.tokens_BS, window.position_BW + 1)
    state_BWD = begin(weights, window.feature_BWD)
    cache, state_BWD = step(weights, cache, state_BWD, token_BW, window.position_BW)
    return cache, take_rows(state_BWD, window.last_B)

  def logits(weights: Weights, state: jax.Array) -> jax.Array:
    return unembed(weights, end(weights, state), depth=1)

  return Recursion(init, catch_up, step, logits)


def _tapped_layers(num_layers: int) -> tuple[int, ...]:
  """Returns after which trunk layers the streams of EAGLE-3 are taken.

  The published ones are after 2, L/2 and L - 3 of L layers (Li et al. 2025, arXiv
  2503.01840, and its code); a trunk of less than 8 has them after the first, the middle
  and the last layer.
  """
  if num_layers < 8:
    return 1, (1 + num_layers) // 2, num_layers
  return 2, num_layers // 2, num_layers - 3


def _steps_flops(config: Config, weights: int) -> float:
  """Returns the forward FLOPs per token of steps besides a block each.

  weights: entries of the matrices that are no part of a block. Step k has k - 1 keys of
  its own beside the keys of the rows.
  """
  trunk, depth = config.trunk, config.mtp.depth
  own_keys = depth * (depth - 1) / 2
  return 2.0 * weights + 2.0 * 2 * trunk.num_heads * trunk.head_dim * own_keys


def _eagle_flops(config: Config) -> float:
  return _steps_flops(config, config.mtp.depth * 2 * config.trunk.embed_dim**2)


def _eagle3_flops(config: Config) -> float:
  """The other half of what queries, keys and values are made of, and the fusion."""
  trunk = config.trunk
  heads = (trunk.num_heads + 2 * trunk.num_kv_heads) * trunk.head_dim
  weights = config.mtp.depth * trunk.embed_dim * heads + 3 * trunk.embed_dim**2
  return _steps_flops(config, weights)


def _contract(first: str, further: str, output_norm: str | None) -> dict[str, Any]:
  return {
    "hidden_source": f"depth 1: {first}; depth k: the {further} of depth k - 1, by the "
    "same layer",
    "embedding_source": "token i + k",
    "output_norm": output_norm,
    "concat_order": ["hidden", "embedding"],
  }


def _eagle3_contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  streams = f"trunk residual streams after layers {', '.join(map(str, tapped))}"
  normed = "normed " if mtp.fc_norm else ""
  further = "normed output" if mtp.norm_output else "un-normed output"
  return _contract(f"a linear map of the {normed}{streams}", further, "own norm")


def _on_trunk(
  mtp: MtpConfig, unembed_DV: jax.Array, tokens_C: np.ndarray | None
) -> dict[str, jax.Array]:
  if mtp.unembed != "own":
    return {}
  if tokens_C is None:
    return {"unembed": unembed_DV}
  tokens = jnp.asarray(tokens_C, jnp.float32)
  return {"unembed": unembed_DV[:, tokens_C], "draft_tokens": tokens}


def _rules(rule) -> None:
  config = rule.config
  rule(
    config.mtp.depth >= 1, "mtp.depth", f"at least 1 for mtp.kind {config.mtp.kind!r}"
  )
  rule(
    config.trunk.attention_kind == "grouped", "trunk.attention_kind",
    f"'grouped' for mtp.kind {config.mtp.kind!r}",
  )


ONE_LAYER = {
  "is_dense": True,
  "blocks": lambda mtp: mtp.depth,
  "added_layers": lambda mtp: 1,
  "unstack": lambda params, mtp: [params],
  "rules": _rules,
}
# Of EAGLE-3 and its relative that drafts in one pass.
FUSED = ONE_LAYER | {
  "reads": ("mlp_dim", "unembed", "draft_vocab"),
  "tapped_layers": _tapped_layers,
  "flops": _eagle3_flops,
  "on_trunk": _on_trunk,
}


def _reads_itself(
  recursion: Callable[[TrunkConfig, MtpConfig], Recursion]
) -> dict[str, Any]:
  return {
    "is_autoregressive": True,
    "reads_ahead": lambda mtp, m: m,
    "recurses": True,
    "drafter": lambda trunk, mtp, num_drafts: chain(recursion(trunk, mtp), num_drafts),
    "recursion": recursion,
  }


EAGLE = Kind(
  **ONE_LAYER,
  **_reads_itself(_eagle_recursion),
  module=Eagle,
  reads=("mlp_dim", "fc_bias"),
  flops=_eagle_flops,
  contract=lambda mtp, tapped: _contract(
    "trunk output after its final norm", "output", None
  ),
)
EAGLE3 = Kind(
  **FUSED | {"reads": (*FUSED["reads"], "fc_norm", "norm_output")},
  **_reads_itself(eagle3_recursion),
  module=Eagle3,
  contract=_eagle3_contract,
)
