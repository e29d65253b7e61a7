"""Parallel heads (Gloeckle et al. 2024): one transformer layer a token.

Legend: B batch, T sequence, D embed, M = 1 + depth.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import MtpConfig, TrunkConfig
from mtp_jax.model.block import Block, rematted
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.interface import Given, Kind


class ParallelHeads(nn.Module):
  """n = D + 1 heads, each one transformer layer on the same trunk state.

  Gloeckle et al. 2024, section 2. The next-token head is the first of the n and has its
  own layer. All share the final norm and the unembedding, so that with D = 0 trunk and
  head together are the plain model with one more trunk layer.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    def head(block: nn.Module, x_BTD: jax.Array, _: None):
      head_BTD, _, routing = block(x_BTD, given.positions_BT, given.segment_ids_BT)
      return x_BTD, (head_BTD, routing)

    num_heads = 1 + self.mtp.depth
    _, (heads_MBTD, routing) = nn.scan(
      head,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=num_heads,
      unroll=1 if self.trunk.scan_layers else num_heads,
      metadata_params={nn.PARTITION_NAME: "depths"},
    )(rematted(Block, self.trunk)(self.trunk, name="heads"), given.residual_BTD, None)
    # One head at a time: a leading axis of 1 would sum in another order at D = 0.
    return jnp.stack([given.final_norm(head_BTD) for head_BTD in heads_MBTD]), routing


PARALLEL = Kind(
  module=ParallelHeads,
  deployed_blocks=1,
  blocks=lambda mtp: 1 + mtp.depth,
  added_layers=lambda mtp: mtp.depth,
  contract=lambda mtp, tapped: {
    "hidden_source": "trunk residual stream before the final norm",
    "next_token_head": "first parallel head",
  },
)
