"""The shared trunk: a stack of blocks on embedded tokens. It does not know MTP.

Legend: B batch, T sequence, D embed, L layers.
"""

import flax.linen as nn
import jax

from mtp_jax.config import TrunkConfig
from mtp_jax.model.block import Block, rematted


class Trunk(nn.Module):
  """Embedded tokens -> the un-normed residual stream after `num_layers` blocks.

  The parameters of the blocks are stacked along a leading `layers` axis, whether the
  blocks run as a loop (`scan_layers`) or unrolled.
  """

  trunk: TrunkConfig
  num_layers: int

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
  ) -> jax.Array:
    blocks = nn.scan(
      rematted(Block, self.trunk),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.num_layers,
      unroll=1 if self.trunk.scan_layers else self.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return blocks(self.trunk, name="blocks")(x_BTD, positions_BT, segment_ids_BT)[0]
