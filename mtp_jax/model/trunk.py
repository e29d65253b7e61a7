"""The shared trunk: a stack of blocks on embedded tokens. It does not know MTP.

Legend: B batch, T sequence, D embed, L layers.
"""

import flax.linen as nn
import jax

from mtp_jax.config import TrunkConfig
from mtp_jax.model.block import Block, rematted
from mtp_jax.model.moe import Routing


class Trunk(nn.Module):
  """Embedded tokens -> the un-normed residual stream after `num_layers` blocks.

  The parameters of equal blocks are stacked along a leading `layers` axis, whether they
  run as a loop (`scan_layers`) or unrolled: `blocks`, and before them `dense_blocks`
  where the first layers of a trunk with experts have none.
  """

  trunk: TrunkConfig
  num_layers: int

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
  ) -> tuple[jax.Array, Routing | None]:
    """Returns `(residual_BTD, routing)`, stacked over the layers with experts."""

    def run(trunk: TrunkConfig, length: int, name: str, x_BTD: jax.Array):
      def layer(block: nn.Module, x_BTD: jax.Array, _: None):
        x_BTD, _, routing = block(x_BTD, positions_BT, segment_ids_BT)
        return x_BTD, routing

      return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        unroll=1 if trunk.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(rematted(Block, trunk)(trunk, name=name), x_BTD, None)

    num_dense = self.trunk.dense_prefix
    if num_dense:
      x_BTD, _ = run(self.trunk.dense(), num_dense, "dense_blocks", x_BTD)
    return run(self.trunk, self.num_layers - num_dense, "blocks", x_BTD)
