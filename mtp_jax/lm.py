"""The language model: embedding, trunk, predictors, unembedding.

Legend: B batch, T sequence, D embed, V vocab, M = 1 + depth.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import Config, next_token_only
from mtp_jax.kernels.argmax import argmax
from mtp_jax.model.layers import (
  Embedding,
  compute_dtype,
  look_up,
  make_norm,
  partitioned,
)
from mtp_jax.model.moe import Routing
from mtp_jax.model.trunk import Trunk
from mtp_jax.predictors import (
  kind_of,
  num_trunk_layers,
  predictor_trunk,
  tapped_layers,
  tokens_after_row,
  vocabulary,
)
from mtp_jax.predictors.interface import Given
from mtp_jax.sharding import (
  constrain,
  fewest_rows,
  map_over_tokens,
  tokens_per_block,
)
from mtp_jax.targets import shifted_tokens


class MtpLm(nn.Module):
  """Tokens to the normed hidden state of every depth; logits are left to the loss."""

  config: Config

  def setup(self):
    trunk = self.config.trunk
    dtype = compute_dtype(trunk)
    vocab = self.config.tokenizer.vocab_size
    # Tied tables also serve as the output matrix, so they start small (GPT-2: 0.02).
    stddev = 0.02 if trunk.tie_embeddings else 1.0
    self.embed = Embedding(vocab, trunk.embed_dim, "vocab", stddev, dtype)
    if trunk.kind == "gpt2":
      length = self.config.data.seq_len
      self.position_embed = Embedding(
        length, trunk.embed_dim, "position", stddev, dtype
      )
    layers, taps = num_trunk_layers(self.config), tapped_layers(self.config)
    self.trunk = Trunk(trunk, layers, taps)
    self.final_norm = make_norm(trunk)
    mtp = self.config.mtp
    self.mtp = kind_of(mtp).module(predictor_trunk(trunk, mtp), mtp)
    if not trunk.tie_embeddings:
      self.unembed = Unembed(vocab, trunk.embed_dim)

  def __call__(self, batch: Batch) -> jax.Array:
    """Returns hidden_MBTD; depth m at position i predicts token i + 1 + m.

    Where the matrices of `unembeddings` differ in their rows, a state is as wide as the
    largest has, and each reads as many of its entries as it has rows.
    """
    return self.with_routing(batch)[0]

  def with_routing(self, batch: Batch) -> tuple[jax.Array, dict[str, Routing]]:
    """Returns `(hidden_MBTD, routing)`: how the experts of `trunk` and `mtp` were used.

    `predictors.routed_layers` has the parts and the length of their stacks.
    """
    x_BTD = self.embed(batch.tokens)
    if self.config.trunk.kind == "gpt2":
      x_BTD += self.position_embed(batch.positions)
    if self.config.trunk.tie_embeddings:
      unembed_DV = self.embed.embedding.T
    else:
      unembed_DV = self.unembed()  # Creates it; the loss reads it from the tree.
    residual_BTD, tapped, in_trunk = self.trunk(
      x_BTD, batch.positions, batch.segment_ids
    )
    given = Given(
      residual_BTD,
      self.final_norm,
      lambda k: shifted_tokens(batch, k)[0],
      lambda k: self.embed(shifted_tokens(batch, k)[0]),
      lambda hidden_BTD: self._embed_own(hidden_BTD, unembed_DV),
      unembed_DV,
      batch.positions,
      batch.segment_ids,
      tapped,
    )
    detach = self.config.mtp.detach
    hidden_MBTD, in_mtp = self.mtp(given.detached() if detach else given)
    if detach:  # Depth 0 alone trains the trunk.
      main_BTD = self.final_norm(residual_BTD)
      hidden_MBTD = jnp.concatenate([main_BTD[None], hidden_MBTD[1:]])
    routing = {
      part: found
      for part, found in (("trunk", in_trunk), ("mtp", in_mtp))
      if found is not None
    }
    return constrain(hidden_MBTD, None, "batch", "seq", "act_embed"), routing

  def _embed_own(self, hidden_BTD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    """Returns embedding_BTD of the most likely tokens; the choice has no gradient."""
    dtype = compute_dtype(self.config.trunk)
    likeliest_BT = likeliest_tokens(
      hidden_BTD, unembed_DV.astype(dtype), self.config.loss.block_tokens
    )
    # No call of the embedding: this runs inside the loop over the modules.
    return look_up(self.embed.embedding.astype(dtype), likeliest_BT, "vocab")


class Unembed(nn.Module):
  """The untied output matrix; holds the parameter, the loss multiplies by it."""

  vocab_size: int
  dim: int

  @nn.compact
  def __call__(self) -> jax.Array:
    # Variance 1 / fan_in^2: the readout of muP (Yang et al. 2022, table 3).
    init = partitioned(nn.initializers.normal(1 / self.dim), "embed", "vocab")
    return self.param("kernel", init, (self.dim, self.vocab_size))


def likeliest_tokens(
  hidden_BTD: jax.Array, unembed_DV: jax.Array, block_tokens: int
) -> jax.Array:
  """Returns argmax_BT of the logits, with `block_tokens` rows a device alive."""

  def likeliest(hidden_BTD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    argmax_N = jax.lax.map(
      lambda h_D: argmax(jnp.dot(h_D, unembed_DV, preferred_element_type=wide)),
      hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
      batch_size=tokens_per_block(block_tokens, unembed_DV.shape[1]),
    )
    return argmax_N.reshape(hidden_BTD.shape[:-1])

  tokens = ("batch", "seq")
  mapped = map_over_tokens(
    likeliest, ((*tokens, "act_embed"), ("act_embed", None)), tokens
  )
  return mapped(*jax.lax.stop_gradient((hidden_BTD, unembed_DV)))


def unembed_matrix(params: dict, config: Config, depth: int = 0) -> jax.Array:
  """Returns the output matrix unembed_DV of a depth, in the compute dtype."""
  matrix_DV = _unembed_param(params, config)
  if depth and config.mtp.unembed == "own":
    matrix_DV = params["mtp"]["unembed"]
    if kind_of(config.mtp).stacks_unembed:
      matrix_DV = matrix_DV[depth - 1]
  if depth and config.mtp.markov_rank:
    matrix_DV = jnp.concatenate([matrix_DV, params["mtp"]["markov_next"]])
  return matrix_DV.astype(compute_dtype(config.trunk))


def _unembed_param(params: dict, config: Config) -> jax.Array:
  """Returns the trunk's: the embedding transposed where the two are tied."""
  if config.trunk.tie_embeddings:
    return params["embed"]["embedding"].T
  return params["unembed"]["kernel"]


def unembeddings(params: dict, config: Config) -> list[tuple[slice, jax.Array]]:
  """Returns `(depths, unembed_DV)` of every output matrix, depths in order."""
  mtp = config.mtp
  if mtp.unembed == "shared" and not mtp.markov_rank:
    return [(slice(0, None), unembed_matrix(params, config))]
  own = [(1, None)]  # One for all extra depths.
  if kind_of(mtp).stacks_unembed:
    own = [(m, 1 + m) for m in range(1, 1 + mtp.depth)]
  return [
    (slice(*ends), unembed_matrix(params, config, ends[0])) for ends in [(0, 1), *own]
  ]


def draft_tokens(params: dict, config: Config) -> jax.Array | None:
  """Returns the ids of the tokens that can be drafted, None where every one can."""
  if not config.mtp.draft_vocab:
    return None
  return params["mtp"]["draft_tokens"].astype(jnp.int32)


def columns(
  params: dict, config: Config, targets_MBT: jax.Array, mask_MBT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `(columns_MBT, mask_MBT)`: targets as columns of their output matrices.

  Where only some tokens can be drafted, the others are no targets of the extra depths.
  A depth that ranks upcoming tokens is scored by the next token.
  """
  if kind_of(config.mtp).upcoming is not None:
    main = jnp.zeros(len(targets_MBT), int)
    return targets_MBT[main], mask_MBT[main]
  tokens_C = draft_tokens(params, config)
  if tokens_C is None:
    return targets_MBT, mask_MBT
  vocab_size = config.tokenizer.vocab_size
  found, is_there = vocabulary.localize(targets_MBT[1:], tokens_C, vocab_size)
  return (
    targets_MBT.at[1:].set(found.astype(targets_MBT.dtype)),
    mask_MBT.at[1:].set(mask_MBT[1:] & is_there),
  )


def on_trunk(
  params: dict, config: Config, shardings: dict, tokens_C: np.ndarray | None = None
) -> dict:
  """Returns the parameters with new predictors made to fit the trunk beside them.

  Args:
    params, shardings: of the whole model.
    tokens_C: the tokens that can be drafted, None where every one can.
  """

  def fit(trunk: dict) -> dict[str, jax.Array]:
    trunk_DV = _unembed_param(trunk, config)
    return kind_of(config.mtp).on_trunk(config.mtp, trunk_DV, tokens_C)

  trunk = {name: tree for name, tree in params.items() if name != "mtp"}
  names = jax.eval_shape(fit, trunk).keys()
  if not names:
    return params
  of_own = {name: shardings["mtp"][name] for name in names}
  own = jax.jit(fit, out_shardings=of_own)(trunk)
  return params | {"mtp": params["mtp"] | own}


def deployed(params: dict, config: Config) -> tuple[dict, Config]:
  """Returns `(params, config)` of the plain NTP model: all extra predictors deleted.

  The first parallel head becomes the last trunk layer, which is the same function.
  """
  kept = {name: tree for name, tree in params.items() if name != "mtp"}
  count = kind_of(config.mtp).deployed_blocks
  if count:
    blocks = jax.tree.map(
      lambda trunk, heads: jnp.concatenate([trunk, heads[:count]]),
      params["trunk"]["blocks"],
      params["mtp"]["heads"],
    )
    kept["trunk"] = params["trunk"] | {"blocks": blocks}
  return kept, deployed_config(config)


def deployed_config(config: Config) -> Config:
  """Returns the config of what `deployed` leaves."""
  layers = num_trunk_layers(config) + kind_of(config.mtp).deployed_blocks
  trunk = dataclasses.replace(config.trunk, num_layers=layers)
  return dataclasses.replace(config, mtp=next_token_only(config.mtp), trunk=trunk)


def zeros_batch(
  config: Config, rows: int | None = None, has_unscored: bool = False
) -> Batch:
  """Returns an all-padding batch of the config's shape, to initialise with.

  Args:
    config: of the run.
    rows: None is the fewest that the mesh in use can spread.
    has_unscored: with the fields that say which tokens are scored.
  """
  rows = fewest_rows() if rows is None else rows
  shape, extra = (rows, config.data.seq_len), (rows, tokens_after_row(config.mtp))
  zeros = lambda s: jnp.zeros(s, jnp.int32)  # noqa: E731
  fields = [zeros(shape), zeros(shape), zeros(shape), zeros(extra), zeros(extra)]
  if has_unscored:
    fields += [jnp.zeros(shape, bool), jnp.zeros(extra, bool)]
  return Batch(*fields)
