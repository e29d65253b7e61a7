"""Next-token prediction alone, and bare linear heads.

Legend: B batch, T sequence, D embed, M = 1 + depth, K drafts.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config, MtpConfig, TrunkConfig
from mtp_jax.kernels.dense import dense
from mtp_jax.model.layers import fan_in_normal, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors import markov
from mtp_jax.predictors.drafting import Choose, Drafter, Window, take_rows
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.weights import Weights, final_norm, layers


class NextToken(nn.Module):
  """Plain next-token prediction: the trunk's state is the only one."""

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    return given.final_norm(given.residual_BTD)[None], None


class LinearHeads(nn.Module):
  """One bare linear map per extra depth on the trunk's normed state: the ablation."""

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    depth, dim = self.mtp.depth, self.trunk.embed_dim
    hidden_BTD = given.final_norm(given.residual_BTD)
    if depth == 0:
      return hidden_BTD[None], None
    maps = self.param(
      "maps",
      partitioned(fan_in_normal(dim), "depths", "embed", "embed_out"),
      (depth, dim, dim),
    ).astype(hidden_BTD.dtype)
    heads = [dense(hidden_BTD, maps[k]) for k in range(depth)]
    return jnp.stack([hidden_BTD, *heads]), None


@functools.cache
def heads_on_one_state(
  trunk: TrunkConfig,
  num_drafts: int,
  head: Callable[[Any, jax.Array], jax.Array],
  is_markov: bool = False,
) -> Drafter:
  """One head per draft, (its parameters, normed feature) -> state; no cache.

  is_markov: its parameters are a dict with the rows of the table, see `markov`.
  """

  def catch_up(weights: Weights, cache, window: Window):
    feature_BD = take_rows(window.feature_BWD, window.last_B)
    return cache, final_norm(trunk, weights, feature_BD)

  def propose(weights: Weights, cache, hidden_BD, window: Window, choose: Choose):
    heads = [
      (head(params, hidden_BD), params["markov_previous"] if is_markov else None)
      for params in weights.predictors[:num_drafts]
    ]
    return cache, markov.draft(weights, heads, window, choose)

  return Drafter(
    num_drafts, True, lambda rows, slots: (), catch_up, propose, feeds_choices=is_markov
  )


def _linear_head(map_DD: jax.Array, hidden_BD: jax.Array) -> jax.Array:
  return hidden_BD @ map_DD


def square_flops(config: Config) -> float:
  """Returns the forward FLOPs per token of one map of the state per extra depth."""
  return 2.0 * config.mtp.depth * config.trunk.embed_dim**2


def _check_no_depth(rule) -> None:
  mtp = rule.config.mtp
  rule(mtp.depth == 0, "mtp.depth", f"0 for mtp.kind {mtp.kind!r}")


NEXT_TOKEN = Kind(
  module=NextToken,
  has_depths=False,
  contract=lambda mtp, tapped: {"hidden_source": None},
  rules=_check_no_depth,
)
LINEAR = Kind(
  module=LinearHeads,
  flops=square_flops,
  unstack=lambda params, mtp: layers(params["maps"], mtp.depth),
  drafter=lambda trunk, mtp, num_drafts: heads_on_one_state(
    trunk, num_drafts, _linear_head
  ),
)
