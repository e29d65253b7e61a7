"""The trunk (backbone): a stack of blocks on embedded tokens, independent of MTP.

Legend: B batch, T sequence, D embed, L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import TrunkConfig
from mtp_jax.model.block import Block, rematted
from mtp_jax.model.moe import Routing

# The residual stream, and the copies of it that were tapped so far.
Streams = tuple[jax.Array, tuple[jax.Array, ...]]


class Trunk(nn.Module):
  """Maps embedded tokens to the un-normed residual stream after `num_layers` blocks.

  `taps`: block numbers, counted from 1; the stream after each is returned as well.

  Parameters of equal blocks are stacked along a leading `layers` axis, whether the
  blocks run as a loop (`scan_layers`) or unrolled. `blocks` has them all, except that
  the first layers of a trunk with experts may be dense: those are `dense_blocks`.
  """

  trunk: TrunkConfig
  num_layers: int
  taps: tuple[int, ...] = ()

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...], Routing | None]:
    """Returns `(residual_BTD, tapped, routing)`.

    `tapped` has one stream [B, T, D] per entry of `taps`; `routing` is stacked over the
    layers with experts.
    """

    def run(trunk: TrunkConfig, first: int, length: int, name: str, streams: Streams):
      def layer(block: nn.Module, streams: Streams, number: jax.Array | None):
        x_BTD, tapped = streams
        x_BTD, _, routing = block(x_BTD, positions_BT, segment_ids_BT)
        # A scan has one body for all blocks, so each one selects whether it is tapped.
        tapped = tuple(
          jnp.where(number == tap, x_BTD, before_BTD)
          for tap, before_BTD in zip(self.taps, tapped, strict=True)
        )
        return (x_BTD, tapped), routing

      numbers = first + jnp.arange(length) if self.taps else None
      return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        unroll=1 if trunk.loops else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(rematted(Block, trunk)(trunk, name=name), streams, numbers)

    num_dense = self.trunk.dense_prefix
    streams: Streams = (x_BTD, (jnp.zeros_like(x_BTD),) * len(self.taps))
    if num_dense:
      streams, _ = run(self.trunk.dense(), 1, num_dense, "dense_blocks", streams)
    rest = self.num_layers - num_dense
    (x_BTD, tapped), routing = run(self.trunk, 1 + num_dense, rest, "blocks", streams)
    return x_BTD, tapped, routing
