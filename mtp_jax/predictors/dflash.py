"""DFlash: a block drafter, which reads the trunk's features as keys and values.

arXiv 2602.06036, and the code of speculators (0.9.0, `models/dflash`). At position i
the newest token is the anchor t = token i + 1, and a block of 1 + D rows stands for
tokens i + 1 to i + 1 + D: row 0 is the embedding of the anchor, rows 1 to D are masks.
Three streams of the trunk make the context of every position j, as in EAGLE-3,

  c_j = norm(W [streams_j]),

and layer l computes, with K_l, V_l the same maps for context and rows,

  x' = x + attention(Q_l norm(x); K_l, V_l of [c_1 .. c_i; norm(x_0) .. norm(x_D)]),
  x  = x' + mlp(norm(x')).

A row sees the whole block, the rows after it too. Keys are at the positions of their
tokens. Row m after a last norm has the state of depth m, which predicts token i + 1 + m
by the trunk's output matrix or one of its own. So all D tokens come from one pass, and
a row of text that is packed needs no mask but the one of its documents: row m of a
block counts in the loss where token i + 1 + m belongs to the document of token i.

Chosen where we differ: every position is an anchor (the paper samples some for each
text). Three streams are read (the paper: five), and `mtp.draft_layers` is 2 (five). The
mask is a vector for each row, not the embedding of one token: bytes leave no token, and
on a trunk with learned positions equal masks would be equal rows. With `mtp.one_mask`
all rows have one vector, which files can hold as the embedding of a token. The weights
of the paper are `mtp.depth_weights` exp(-(m - 1) / gamma), gamma 4 for 7 drafts. Fewer
drafts than D are the first rows of the whole block.

Legend: B batch, T sequence, D embed, M = 1 + depth, R = 1 + depth rows of a block, Q
rows of all blocks, C rows of the context, N heads, G kv heads, K drafts.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config, MtpConfig, TrunkConfig
from mtp_jax.kernels.attention import unrolled_attention
from mtp_jax.model.attention import Attention, KVCache, attend_to_cache
from mtp_jax.model.layers import compute_dtype, make_norm, partitioned
from mtp_jax.model.mlp import Mlp
from mtp_jax.predictors.drafting import Choose, Drafter, Window, take_rows
from mtp_jax.predictors.eagle import FUSED, Eagle3, Fusion, unrollable
from mtp_jax.predictors.interface import Given, Kind, Norm
from mtp_jax.predictors.weights import Weights, embed, empty_caches, unembed
from mtp_jax.sharding import constrain


class Context(NamedTuple):
  """What rows of blocks see besides their block: x_BCD at position_BC.

  In training C = T, and segment_ids_BC are those of the text; the cache has one
  document.
  """

  x_BCD: jax.Array
  position_BC: jax.Array
  segment_ids_BC: jax.Array | None = None


class BlockAttention(Attention):
  """The rows of a block see one another, and the context up to their anchor."""

  @nn.compact
  def __call__(
    self, x_BQD: jax.Array, position_BQ: jax.Array, context: Context,
    cache: KVCache | None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Returns `(out_BQD, cache)`; without a cache Q = T R, token by token."""
    read_BXD = jnp.concatenate([context.x_BCD, x_BQD], axis=1)
    position_BX = jnp.concatenate([context.position_BC, position_BQ], axis=1)
    (query_BQNH,) = self.heads(x_BQD, position_BQ, ("query",))
    key_BXGH, value_BXGH = self.heads(read_BXD, position_BX, ("key", "value"))
    if cache is not None:
      cache = cache.write(key_BXGH, value_BXGH, position_BX)
      last_BQ = jnp.broadcast_to(position_BQ[:, -1:], position_BQ.shape)
      return self.joined(attend_to_cache(query_BQNH, cache, last_BQ)), cache

    T = context.x_BCD.shape[1]

    def seen(x_BXGH: jax.Array) -> tuple[jax.Array, ...]:
      """Returns the context's, and those of every row of the blocks, [B, T, G, H]."""
      of_context = constrain(x_BXGH[:, :T], "batch", "kv_seq", "kv_heads", "head_dim")
      return of_context, *jnp.moveaxis(_by_token(x_BXGH[:, T:], T), 2, 0)

    attend = jax.vmap(unrolled_attention, (2, None, None, None), 2)
    out_BTRNH = attend(
      _by_token(query_BQNH, T), seen(key_BXGH), seen(value_BXGH), context.segment_ids_BC
    )
    return self.joined(out_BTRNH.reshape(query_BQNH.shape)), None


def _by_token(x_BQ___: jax.Array, length: int) -> jax.Array:
  """Returns x_BTR___."""
  return x_BQ___.reshape(len(x_BQ___), length, -1, *x_BQ___.shape[2:])


class BlockLayer(nn.Module):
  """A decoder layer of the block; the context is the same for all layers."""

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self, x_BQD: jax.Array, position_BQ: jax.Array, context: Context,
    cache: KVCache | None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Returns `(x_BQD, cache)`."""
    x_BQD = constrain(x_BQD, "batch", "seq", "act_embed")
    normed_BQD = make_norm(self.trunk, "attention_norm")(x_BQD)
    attended_BQD, cache = BlockAttention(self.trunk, name="attention")(
      normed_BQD, position_BQ, context, cache
    )
    x_BQD += attended_BQD
    normed_BQD = make_norm(self.trunk, "mlp_norm")(x_BQD)
    return x_BQD + Mlp(self.trunk, name="mlp")(normed_BQD), cache


class DFlash(Eagle3):
  """The layers `layer_0` ..., `masks` [depth or 1, D], and what is around EAGLE-3's.
  """

  def _states(self, given: Given, after: Norm | None = None) -> list[jax.Array]:
    del after
    depth, dim = self.mtp.depth, self.trunk.embed_dim
    normal = partitioned(nn.initializers.normal(1.0), "depths", "norm")
    own = self.param("masks", normal, (1 if self.mtp.one_mask else depth, dim))
    masks_KD = _masks(own, depth).astype(compute_dtype(self.trunk))
    fused_BTD = Fusion(self.trunk, name="fusion")(jnp.concatenate(given.tapped, -1))
    context = Context(
      make_norm(self.trunk, "context_norm")(fused_BTD),
      given.positions_BT, given.segment_ids_BT,
    )
    x_BTRD, position_BTR = _blocks(
      given.embed_ahead(1), 1 + given.positions_BT, masks_KD
    )
    x_BQD = x_BTRD.reshape(len(x_BTRD), -1, dim)
    position_BQ = position_BTR.reshape(len(x_BTRD), -1)
    for i in range(self.mtp.draft_layers):
      layer = unrollable(BlockLayer, self.trunk, name=f"layer_{i}")
      x_BQD, _ = layer(x_BQD, position_BQ, context, None)
    return [*jnp.moveaxis(_by_token(x_BQD, x_BTRD.shape[1]), 2, 0)][1:]


def _masks(own: jax.Array, depth: int) -> jax.Array:
  """Returns masks_KD of all rows after the anchor."""
  return jnp.broadcast_to(own, (depth, own.shape[1]))


def _blocks(
  anchor_X___D: jax.Array, position_X___: jax.Array, masks_KD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `(rows [..., R, D], positions [..., R])` of a block for every anchor."""
  shape = *anchor_X___D.shape[:-1], *masks_KD.shape
  masks = jnp.broadcast_to(masks_KD, shape)
  rows = jnp.concatenate([anchor_X___D[..., None, :], masks], axis=-2)
  return rows, position_X___[..., None] + jnp.arange(1 + len(masks_KD))


@functools.cache
def _drafter(trunk: TrunkConfig, mtp: MtpConfig, num_drafts: int) -> Drafter:
  """One pass over the new context and the block, whose slots the next round writes."""

  def init(rows: int, slots: int):
    # A whole block may run over the end of a sequence that fewer drafts would fill.
    slots += mtp.depth - num_drafts
    return empty_caches(trunk, mtp.draft_layers, rows, slots)

  def propose(weights: Weights, caches, carry, window: Window, choose: Choose):
    del carry
    (params,) = weights.predictors
    slots, newest_B = window.tokens_BS.shape[1], window.length_B - 1
    apply = lambda module, name, x: module.apply({"params": params[name]}, x)  # noqa: E731
    fused_BWD = apply(Fusion(trunk), "fusion", window.feature_BWD)
    # Absent rows are in no slot of the caches, which may have more than the tokens.
    absent = slots + mtp.depth
    is_absent_BW = window.position_BW >= slots
    context = Context(
      apply(make_norm(trunk), "context_norm", fused_BWD),
      jnp.where(is_absent_BW, absent, window.position_BW),
    )
    token_B = take_rows(window.tokens_BS, newest_B)
    masks_KD = _masks(params["masks"], mtp.depth)
    x_BRD, position_BR = _blocks(embed(weights, token_B), newest_B, masks_KD)
    written = []
    for i, cache in enumerate(caches):
      x_BRD, cache = BlockLayer(trunk).apply(
        {"params": params[f"layer_{i}"]}, x_BRD, position_BR, context, cache
      )
      written.append(cache)
    state_BRD = apply(make_norm(trunk), "out_norm", x_BRD)
    logits_BRV = unembed(weights, state_BRD, depth=1)
    drafts = [choose(logits_BRV[:, k], k) for k in range(1, 1 + num_drafts)]
    return tuple(written), drafts

  return Drafter(
    num_drafts, True, init, lambda weights, caches, window: (caches, ()), propose,
    feeds_choices=False,
  )


def _flops(config: Config) -> float:
  """Keys and values of the context, the keys of a block, and the fusion."""
  trunk, mtp = config.trunk, config.mtp
  width, rows = trunk.num_heads * trunk.head_dim, 1 + mtp.depth
  kv_width = trunk.num_kv_heads * trunk.head_dim
  a_layer = 2 * trunk.embed_dim * kv_width + 2 * width * rows**2
  return 2.0 * (mtp.draft_layers * a_layer + 3 * trunk.embed_dim**2)


def _contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  del mtp
  layers = ", ".join(map(str, tapped))
  return {
    "hidden_source": "keys and values of every layer: the norm of a linear map of the "
    f"trunk residual streams after layers {layers}",
    "embedding_source": "row 0 of a block: token i + 1; row m of depth m: masks[m - 1]",
    "output_norm": "own norm",
  }


DFLASH = Kind(
  **FUSED | {
    "reads": (*FUSED["reads"], "draft_layers", "one_mask"),
    "blocks": lambda mtp: mtp.draft_layers * (1 + mtp.depth),
    "added_layers": lambda mtp: mtp.draft_layers,
    "flops": _flops,
  },
  module=DFlash,
  reads_ahead=lambda mtp, m: 1,
  drafter=_drafter,
  contract=_contract,
)
