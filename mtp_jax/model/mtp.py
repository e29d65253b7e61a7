"""The predictors of more than one token, behind one call signature.

Each takes what the trunk gives (`Given`) and returns the hidden state of every depth,
[M, B, T, D], as its unembedding reads it, and the routing of its blocks where they have
experts. Depth m predicts token i + 1 + m at position i. All run on all T positions; a
position whose target lies in another document is masked in the loss, and because
attention is causal within documents no valid position ever sees it.

Legend: B batch, T sequence, D embed, M = 1 + depth.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import MtpConfig, TrunkConfig, predictor_trunk
from mtp_jax.kernels.dense import dense
from mtp_jax.model.block import Block, Cache, rematted
from mtp_jax.model.cache_slots import Positions
from mtp_jax.model.layers import compute_dtype, fan_in_normal, make_norm, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.sharding import constrain

Norm = Callable[[jax.Array], jax.Array]
# k -> embedding_BTD of the token k places after each position.
EmbedAhead = Callable[[int], jax.Array]
# normed hidden_BTD -> embedding_BTD of the most likely tokens, chosen without gradient.
EmbedOwn = Callable[[jax.Array], jax.Array]


class Given(NamedTuple):
  """What every predictor starts from.

  residual_BTD: the trunk's un-normed residual stream. final_norm: its final norm.
  unembed_DV: its output matrix. positions_BT, segment_ids_BT: as in `Batch`.
  tapped: the streams after `config.tapped_layers`, each [B, T, D].
  """

  residual_BTD: jax.Array
  final_norm: Norm
  embed_ahead: EmbedAhead
  embed_own: EmbedOwn
  unembed_DV: jax.Array
  positions_BT: jax.Array
  segment_ids_BT: jax.Array
  tapped: tuple[jax.Array, ...]

  def copied_unembed(
    self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
  ) -> jax.Array:
    """Initialises matrices of extra depths as copies of the trunk's.

    They may be stacked, and have the first columns alone.
    """
    del key
    return jnp.broadcast_to(self.unembed_DV[:, : shape[-1]], shape).astype(dtype)


# What sequential modules pass on: the next one's state, and the last one's output where
# own tokens are chosen from it.
Carry = tuple[jax.Array, jax.Array | None]


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
    shared, trunk = mtp.share_modules, predictor_trunk(self.trunk, mtp)
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
