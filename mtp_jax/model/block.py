"""One pre-norm transformer block, and a stack of them with stacked parameters.

Legend: B batch, T sequence, D embed.
"""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.model.attention import Attention, KVCache
from mtp_jax.model.attention_ops import REMAT_NAMES
from mtp_jax.model.layers import make_norm
from mtp_jax.model.mlp import Mlp
from mtp_jax.sharding import constrain

# What `remat="names"` keeps from the forward pass; the rest is cheap to recompute.
SAVED_NAMES = (
  "query", "key", "value", "mlp_gate", "mlp_up", "residual", *REMAT_NAMES,
)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    cache: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    x_BTD = constrain(x_BTD, "batch", "seq", "act_embed")
    attended_BTD, cache = Attention(self.trunk, name="attention")(
      make_norm(self.trunk, "attention_norm")(x_BTD),
      positions_BT,
      segment_ids_BT,
      cache,
    )
    x_BTD = checkpoint_name(x_BTD + attended_BTD, "residual")
    x_BTD = x_BTD + Mlp(self.trunk, name="mlp")(
      make_norm(self.trunk, "mlp_norm")(x_BTD)
    )
    return constrain(x_BTD, "batch", "seq", "act_embed"), cache


def rematted(module: type[nn.Module], trunk: TrunkConfig) -> type[nn.Module]:
  """Returns `module` with rematerialisation as `trunk.remat` says."""
  if trunk.remat == "none":
    return module
  policy = None
  if trunk.remat == "names":
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
  # Inside scan XLA cannot merge the recomputation away, so the barrier is not needed.
  return nn.remat(module, prevent_cse=not trunk.scan_layers, policy=policy)
