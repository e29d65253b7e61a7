"""One pre-norm transformer block, its cache, and its rematerialisation.

Legend: B batch, T sequence, D embed.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import TrunkConfig
from mtp_jax.kernels.attention import REMAT_NAMES
from mtp_jax.model.attention import Attention, KVCache, Unrolled
from mtp_jax.model.cache_slots import Positions
from mtp_jax.model.latent_attention import LatentAttention, LatentCache
from mtp_jax.model.layers import make_norm
from mtp_jax.model.mlp import Mlp
from mtp_jax.model.moe import Moe, Routing
from mtp_jax.sharding import constrain

# Activations that `remat="names"` keeps; all others are cheap to compute again.
SAVED_NAMES = (
  "query", "key", "value", "mlp_gate", "mlp_up", "expert_rows", "residual",
  *REMAT_NAMES,
)


Cache = KVCache | LatentCache


def empty_cache(trunk: TrunkConfig, rows: int, slots: int) -> Cache:
  """Returns the cache of one block before any token, in the compute dtype."""
  kind = LatentCache if trunk.attention_kind == "latent" else KVCache
  return kind.zeros(trunk, rows, slots)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), which may be a mixture of experts.

  Returns `(x_BTD, cache, routing)`; a dense block has no routing.
  """

  trunk: TrunkConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: Positions,
    segment_ids_BT: jax.Array,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None, Routing | None]:
    x_BTD = constrain(x_BTD, "batch", "seq", "act_embed")
    normed_BTD = make_norm(self.trunk, "attention_norm")(x_BTD)
    return add_layers(
      self.trunk, x_BTD, normed_BTD, positions_BT, segment_ids_BT, cache
    )


def add_layers(
  trunk: TrunkConfig,
  x_BTD: jax.Array,
  read_BTX: jax.Array,
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array,
  cache: Cache | Unrolled | None,
) -> tuple[jax.Array, Cache | Unrolled | None, Routing | None]:
  """Returns x + attention(read), then x + mlp(norm(x)), with cache and routing.

  Call it in a module's `__call__`: the layers become that module's. `read_BTX` may be
  wider than the residual stream x_BTD.
  """
  is_latent = trunk.attention_kind == "latent"
  attention = LatentAttention if is_latent else Attention
  attended_BTD, cache = attention(trunk, name="attention")(
    read_BTX, positions_BT, segment_ids_BT, cache
  )
  x_BTD = checkpoint_name(x_BTD + attended_BTD, "residual")
  normed_BTD = make_norm(trunk, "mlp_norm")(x_BTD)
  if trunk.moe.num_experts:
    added_BTD, routing = Moe(trunk, name="moe")(normed_BTD, segment_ids_BT)
  else:
    added_BTD, routing = Mlp(trunk, name="mlp")(normed_BTD), None
  return constrain(x_BTD + added_BTD, "batch", "seq", "act_embed"), cache, routing


def rematted(module: type[nn.Module], trunk: TrunkConfig) -> type[nn.Module]:
  """Returns `module` with the rematerialisation of `trunk.remat`; auto is names."""
  if trunk.remat == "none":
    return module
  policy = None if trunk.remat == "full" else _keeps
  # Inside scan XLA cannot merge the recomputation away, so the barrier is not needed.
  return nn.remat(module, prevent_cse=not trunk.loops, policy=policy)


def _keeps(primitive: Any, *args: Any, **params: Any) -> bool:
  """Keeps `SAVED_NAMES`, and the outputs of cuDNN's attention, which have no names.

  To compute attention again is the one expensive thing that names would leave out.
  """
  names = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
  is_attention = primitive.name.startswith("dot_product_attention_fwd")
  return is_attention or names(primitive, *args, **params)
