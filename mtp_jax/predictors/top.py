"""Token-order prediction (TOP): one more output matrix ranks the upcoming tokens.

Zuhri et al. 2025, arXiv 2508.19228, and its code. At position i the token v that occurs
next in token i + d, d = 1..W, has the proximity score W - d (tokens that do not occur
within the window: -inf), and the ranking z = U_top h of the trunk's normed state learns
the ListNet loss (Cao et al. 2007)

  L_TOP = - sum_v softmax(score)_v log softmax(z)_v,    L = L_NTP + lambda L_TOP.

The paper has lambda = 1 (`mtp.weight`), and the whole row as its window: a token d
places on weighs exp(1 - d) times the nearest one, so that more than the default 32 are
less than rounding. Here a window ends with its document, unscored tokens are left out
of it, and U_top begins as a copy of the trunk's matrix (`mtp.unembed` is "own"; the
paper leaves open how it begins). TOP drafts nothing, and is deployed as plain
next-token prediction: the matrix goes.

Records of depth 1: the loss is the cross-entropy of softmax(z) with the next token, the
weighted loss has L_TOP, and accuracy is how often the next token is ranked first.

Legend: B batch, T sequence, D embed, V vocab, M = 2, W window, N tokens of a block.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import MtpConfig, TrunkConfig
from mtp_jax.model.layers import partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.targets import future_targets


class Upcoming(NamedTuple):
  """What the ranking learns; stands in for `losses.Teacher`.

  tokens_1BTW: the next W tokens. share_1BTW: softmax(score) of each, at its nearest
    occurrence; 0 elsewhere and where there is nothing to be ranked.
  """

  tokens_1BTW: jax.Array
  share_1BTW: jax.Array

  @property
  def per_token(self) -> tuple[jax.Array, ...]:
    return tuple(self)

  @staticmethod
  def axes() -> "Upcoming":
    axes = None, "batch", "seq", None
    return Upcoming(axes, axes)

  @staticmethod
  def loss(
    objective: str, logits_NV: jax.Array, tokens_NW: jax.Array, share_NW: jax.Array
  ) -> jax.Array:
    """Returns L_TOP of every token; a share is 0 off W tokens, so nothing is [V]."""
    del objective
    log_q_NV = jax.nn.log_softmax(logits_NV)
    return -jnp.sum(share_NW * jnp.take_along_axis(log_q_NV, tokens_NW, axis=1), axis=1)


def upcoming(mtp: MtpConfig, batch: Batch) -> Upcoming:
  """Returns the tokens that are ranked at every position, and their shares."""
  tokens_WBT, there_WBT = future_targets(batch, mtp.window - 1, mtp.score_from)
  nearest = [
    there_WBT[d] & ~jnp.any((tokens_WBT[:d] == tokens_WBT[d]) & there_WBT[:d], axis=0)
    for d in range(mtp.window)
  ]
  decay_W111 = jnp.exp(-jnp.arange(float(mtp.window)))[:, None, None]
  weight_WBT = jnp.where(jnp.stack(nearest), decay_W111, 0.0)
  total_BT = jnp.sum(weight_WBT, axis=0)
  share_WBT = weight_WBT / jnp.where(total_BT > 0, total_BT, 1.0)
  last = lambda x_WBT: jnp.moveaxis(x_WBT, 0, -1)[None]  # noqa: E731
  return Upcoming(last(tokens_WBT), last(share_WBT))


class TokenOrder(nn.Module):
  """The ranking reads the trunk's normed state, by the matrix `unembed` [D, V]."""

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    hidden_BTD = given.final_norm(given.residual_BTD)
    if self.mtp.depth == 0:
      return hidden_BTD[None], None
    init = partitioned(given.copied_unembed, "embed", "vocab")
    self.param("unembed", init, given.unembed_DV.shape)  # The loss reads it.
    return jnp.stack([hidden_BTD, hidden_BTD]), None


def _on_trunk(
  mtp: MtpConfig, unembed_DV: jax.Array, tokens_C: np.ndarray | None
) -> dict[str, jax.Array]:
  del tokens_C
  return {"unembed": unembed_DV} if mtp.depth else {}


def _rules(rule) -> None:
  mtp = rule.config.mtp
  rule(mtp.depth <= 1, "mtp.depth", "at most 1 for mtp.kind 'top': one matrix ranks")
  if mtp.depth:
    rule(mtp.unembed == "own", "mtp.unembed", "'own' for mtp.kind 'top'")
  for key, default in (("objective", "cross_entropy"), ("feature_weight", 0.0)):
    rule(
      getattr(mtp, key) == default, f"mtp.{key}",
      f"{default!r} for mtp.kind 'top', which learns from data alone",
    )


TOP = Kind(
  module=TokenOrder,
  reads=("unembed", "window"),
  upcoming=upcoming,
  on_trunk=_on_trunk,
  rules=_rules,
  contract=lambda mtp, tapped: {
    "depth_m_predicts": "m = 0 the next token at position i; m = 1 ranks the tokens "
    "after i, the next one first",
  },
)
