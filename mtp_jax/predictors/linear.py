"""Next-token prediction alone, and bare linear heads.

Legend: B batch, T sequence, D embed, M = 1 + depth.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config, MtpConfig, TrunkConfig
from mtp_jax.model.dense_ops import dense
from mtp_jax.model.layers import fan_in_normal, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.interface import Given, Kind


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
LINEAR = Kind(module=LinearHeads, flops=square_flops)
