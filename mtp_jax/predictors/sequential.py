"""Sequential modules (DeepSeek-V3, section 2.2): the complete causal chain.

Legend: B batch, T sequence, D embed, M = 1 + depth.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import PUBLISHED_MODULES, Config, MtpConfig, TrunkConfig
from mtp_jax.model.attention_ops import Positions
from mtp_jax.model.block import Block, Cache, rematted
from mtp_jax.model.dense_ops import dense
from mtp_jax.model.layers import compute_dtype, fan_in_normal, make_norm, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.sharding import constrain

# What sequential modules pass on: the next one's state, and the last one's output where
# own tokens are chosen from it.
Carry = tuple[jax.Array, jax.Array | None]


class SequentialModule(nn.Module):
  """One module of the causal chain, DeepSeek-V3 equations 21 and 22.

  `out_norm` and `norm` are those of `config.MtpConfig`.
  """

  trunk: TrunkConfig
  out_norm: str
  norm: str

  @nn.compact
  def __call__(
    self,
    hidden_BTD: jax.Array,
    embedding_BTD: jax.Array | None,
    positions_BT: Positions,
    segment_ids_BT: jax.Array,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None, Routing | None]:
    """Returns this depth's state from the one given, cache and routing.

    Without an embedding there are zeros in the place of its normed form.
    """
    dim, dtype = self.trunk.embed_dim, compute_dtype(self.trunk)
    hidden_BTD = make_norm(self.trunk, "hidden_norm", self.norm)(hidden_BTD)
    no_embedding_BTD = jnp.zeros_like(hidden_BTD)
    # The norm has parameters in any case, and a layer norm makes its bias of zeros.
    embedded_BTD = make_norm(self.trunk, "embed_norm", self.norm)(
      no_embedding_BTD if embedding_BTD is None else embedding_BTD
    )
    if embedding_BTD is None:
      embedded_BTD = no_embedding_BTD
    joined = jnp.concatenate([hidden_BTD, embedded_BTD], axis=-1)
    projection = self.param(
      "projection",
      partitioned(fan_in_normal(2 * dim), "concat", "embed"),
      (2 * dim, dim),
    )
    x_BTD = dense(joined, projection.astype(dtype))
    block = Block(self.trunk, name="block")
    x_BTD, cache, routing = block(x_BTD, positions_BT, segment_ids_BT, cache)
    if self.out_norm == "own":
      x_BTD = make_norm(self.trunk, "out_norm", self.norm)(x_BTD)
    return x_BTD, cache, routing


class SequentialModules(nn.Module):
  """The complete causal chain of D modules (DeepSeek-V3, section 2.2), and relatives.

  `h_k = out_norm(Block_k(W_k [norm(h_{k-1}); norm(Emb(t_{i+k}))]))` with h_0 the
  trunk's normed state. Gradients flow through the whole chain. With `share_modules` one
  module serves every depth.

  Other inputs than the published ones, by key of `mtp`:

  - `hidden`: what stands for h_{k-1} at position i. `trunk` is h_0[i] for every k.
    `trunk_shifted` is h_0[i + k - 1], which has seen all that t_{i+k} follows, as the
    teacher-forced features of EAGLE (Li et al. 2024, arXiv 2401.15077) have. The row
    ends at T - 1, and j places after its end h_j[T - 1] stands in, which fed with true
    tokens has seen as many. So at the end of a row, and there alone, training computes
    what drafting always does: the trunk has not run on what is drafted. A state of the
    next document is met by positions whose target lies there too, and by no other.
  - `hidden_norm`: h_0 as the modules get it; depth 0 is always the normed state.
  - `fed`: `own` embeds the arg max of depth k - 1 at i instead of t_{i+k}, and `none`
    has zeros for its normed embedding.

  And other norms: with `out_norm` `none` h_k is the output of the block, and with
  `norm` `rms` the norms in the equation are RMSNorm on a trunk with layer norms too.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    mtp, depth = self.mtp, self.mtp.depth
    normed_BTD = given.final_norm(given.residual_BTD)
    if depth == 0:
      return normed_BTD[None], None
    ahead_kBTD = None
    if mtp.fed == "true":
      ahead_kBTD = jnp.stack([given.embed_ahead(k) for k in range(1, 1 + depth)])

    def step(module: nn.Module, carry: Carry, embedding_BTD: jax.Array | None):
      from_BTD, last_BTD = carry
      if mtp.fed == "own":
        embedding_BTD = given.embed_own(last_BTD)
      if embedding_BTD is not None:
        embedding_BTD = constrain(embedding_BTD, "batch", "seq", "act_embed")
      h_BTD, _, routing = module(
        from_BTD, embedding_BTD, given.positions_BT, given.segment_ids_BT
      )
      return following(from_BTD, h_BTD), (h_BTD, routing)

    def following(from_BTD: jax.Array, h_BTD: jax.Array) -> Carry:
      last_BTD = h_BTD if mtp.fed == "own" else None
      if mtp.hidden == "chained":
        return h_BTD, last_BTD
      if mtp.hidden == "trunk":
        return from_BTD, last_BTD
      shifted_BTD = jnp.concatenate([from_BTD[:, 1:], h_BTD[:, -1:]], axis=1)
      return constrain(shifted_BTD, "batch", "seq", "act_embed"), last_BTD

    first_BTD = normed_BTD if mtp.hidden_norm == "after" else given.residual_BTD
    shared, trunk = mtp.share_modules, self.trunk
    _, (chain, routing) = nn.scan(
      step,
      variable_broadcast="params" if shared else False,
      variable_axes={} if shared else {"params": 0},
      split_rngs={"params": not shared},
      length=depth,
      unroll=1 if self.trunk.scan_layers else depth,
      metadata_params={nn.PARTITION_NAME: "depths"},
    )(
      rematted(SequentialModule, trunk)(
        trunk, mtp.out_norm, mtp.norm, name="modules"
      ),
      (first_BTD, normed_BTD if mtp.fed == "own" else None),
      ahead_kBTD,
    )
    return jnp.concatenate([normed_BTD[None], chain]), routing


def _flops(config: Config) -> float:
  """The projections of the modules, from twice the width."""
  return 2.0 * config.mtp.depth * 2 * config.trunk.embed_dim**2


def _contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  del tapped
  has_norm = mtp.out_norm == "own"
  further = {
    "chained": f"the {'normed ' if has_norm else ''}output of module k - 1",
    "trunk": "the same",
    "trunk_shifted": "the same, k - 1 positions on",
  }[mtp.hidden]
  return {
    "hidden_source": f"depth 1: trunk output {mtp.hidden_norm} its final norm; depth "
    f"k: {further}",
    "embedding_source": {
      "true": "token i + k", "none": None, "own": "arg max of depth k - 1"
    }[mtp.fed],
    "output_norm": "own norm per module" if has_norm else None,
    "module_norms": {"rms": "RMSNorm", "trunk": "as in the trunk"}[mtp.norm],
    "concat_order": ["hidden", "embedding"],
  }


SEQUENTIAL = Kind(
  module=SequentialModules,
  reads=("share_modules", "dense_blocks", "mlp_dim", *PUBLISHED_MODULES),
  is_autoregressive=True,
  blocks=lambda mtp: mtp.depth,
  added_layers=lambda mtp: 1 if mtp.share_modules else mtp.depth,
  flops=_flops,
  contract=_contract,
)
