"""P-EAGLE: the drafter of EAGLE-3, which drafts all its tokens in one pass.

arXiv 2602.01469, and the code of speculators. The first step is that of EAGLE-3. Step
k > 1 reads no state and no token: a learnt vector of the width of the three streams,
through the same fusion, and a learnt embedding stand in their places, at position
i + k - 1. It sees the first step's keys of the rows up to its own, and those of the
earlier steps of its own row (the mask of `peagle/attention.py`), which is `Unrolled`.
So no step waits for another: in decoding, K - 1 such rows run side by side after the
newest one.

Chosen where we differ: the embedding is a parameter of its own (the code embeds a token
that no text has; bytes leave none), and every position trains at every depth: COD, the
sampling of fewer positions at deeper steps, which saves memory there, is left out. The
paper's drafter has four layers, this one has one.

Legend: B batch, T sequence, D embed, K drafts, X three streams side by side.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import MtpConfig, TrunkConfig
from mtp_jax.model.layers import compute_dtype, partitioned
from mtp_jax.predictors.drafting import Choose, Drafter, Window
from mtp_jax.predictors.eagle import (
  FUSED,
  Eagle3,
  Eagle3Layer,
  Fusion,
  eagle3_recursion,
)
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.weights import Weights


class PEagle(Eagle3):
  """EAGLE-3 with `mask_streams` [X] and `mask_embedding` [D] for all later steps."""

  def _masked(
    self, fusion: Fusion, given: Given
  ) -> tuple[jax.Array, jax.Array] | None:
    dim, dtype = self.trunk.embed_dim, compute_dtype(self.trunk)
    normal = partitioned(nn.initializers.normal(1.0), "norm")
    streams_X = self.param("mask_streams", normal, (3 * dim,)).astype(dtype)
    embedding_D = self.param("mask_embedding", normal, (dim,)).astype(dtype)
    shape = given.residual_BTD.shape
    return tuple(
      jnp.broadcast_to(x_D, shape) for x_D in (fusion(streams_X), embedding_D)
    )


@functools.cache
def _drafter(trunk: TrunkConfig, mtp: MtpConfig, num_drafts: int) -> Drafter:
  """Catches up as EAGLE-3 does, then runs all masked rows at once."""
  recursion = eagle3_recursion(trunk, mtp)

  def propose(weights: Weights, cache, state_BD, window: Window, choose: Choose):
    (params,) = weights.predictors
    states_BKD = state_BD[:, None]
    if num_drafts > 1:
      rows = len(window.length_B), num_drafts - 1
      mask_D = Fusion(trunk).apply(
        {"params": params["fusion"]}, params["mask_streams"]
      )
      mask_BWD, embedding_BWD = (
        jnp.broadcast_to(x_D, (*rows, trunk.embed_dim))
        for x_D in (mask_D, params["mask_embedding"])
      )
      # The newest row is length - 2. The masked rows are overwritten in the next round.
      places_BW = window.length_B[:, None] - 1 + jnp.arange(num_drafts - 1)
      one_document_BW = jnp.zeros(rows, jnp.int32)
      masked_BWD, cache = Eagle3Layer(trunk).apply(
        {"params": params["layer"]}, mask_BWD, embedding_BWD, places_BW,
        one_document_BW, cache,
      )
      states_BKD = jnp.concatenate([states_BKD, masked_BWD], axis=1)
    logits_BKV = recursion.logits(weights, states_BKD)
    return cache, [choose(logits_BKV[:, k - 1], k) for k in range(1, 1 + num_drafts)]

  return Drafter(
    num_drafts, True, recursion.init, recursion.catch_up, propose, feeds_choices=False
  )


def _contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  del mtp
  streams = f"the trunk residual streams after layers {', '.join(map(str, tapped))}"
  return {
    "hidden_source": f"depth 1: a linear map of {streams}; depth k: of mask_streams",
    "embedding_source": "depth 1: token i + 1; depth k: mask_embedding",
    "output_norm": "own norm",
    "concat_order": ["hidden", "embedding"],
  }


PEAGLE = Kind(
  **FUSED,
  module=PEagle,
  reads_ahead=lambda mtp, m: 1,
  drafter=_drafter,
  contract=_contract,
)
