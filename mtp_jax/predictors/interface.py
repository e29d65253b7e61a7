"""The interface of a kind of extra predictors: what it gets, and what it provides.

Legend: B batch, T sequence, D embed, V vocab, M = 1 + depth, C draft vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config, MtpConfig
from mtp_jax.predictors.drafting import Drafter, Recursion

Norm = Callable[[jax.Array], jax.Array]
# k -> token_BT k places after each position, or its embedding_BTD.
Ahead = Callable[[int], jax.Array]
# normed hidden_BTD -> embedding_BTD of the most likely tokens, chosen without gradient.
EmbedOwn = Callable[[jax.Array], jax.Array]


class Given(NamedTuple):
  """The trunk's outputs that every predictor starts from.

  residual_BTD: the trunk's un-normed residual stream. final_norm: its final norm.
  unembed_DV: its output matrix. positions_BT, segment_ids_BT: as in `Batch`.
  tapped: the streams after `predictors.tapped_layers`, each [B, T, D].
  """

  residual_BTD: jax.Array
  final_norm: Norm
  ahead: Ahead
  embed_ahead: Ahead
  embed_own: EmbedOwn
  unembed_DV: jax.Array
  positions_BT: jax.Array
  segment_ids_BT: jax.Array
  tapped: tuple[jax.Array, ...]

  def detached(self) -> "Given":
    """Returns the same without gradient: nothing that reads it moves the trunk."""
    stop = jax.lax.stop_gradient
    return self._replace(
      residual_BTD=stop(self.residual_BTD),
      final_norm=lambda x_BTD: stop(self.final_norm(x_BTD)),
      embed_ahead=lambda k: stop(self.embed_ahead(k)),
      embed_own=lambda hidden_BTD: stop(self.embed_own(hidden_BTD)),
      unembed_DV=stop(self.unembed_DV),
      tapped=stop(self.tapped),
    )

  def copied_unembed(
    self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
  ) -> jax.Array:
    """Initialises matrices of extra depths as copies of the trunk's.

    They may be stacked, and have the first columns alone.
    """
    del key
    return jnp.broadcast_to(self.unembed_DV[:, : shape[-1]], shape).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """One kind of extra predictors; the row of `predictors.KINDS`.

  The module, built from `(trunk, mtp)`, takes `Given` and returns the hidden state of
  every depth, hidden_MBTD, as its unembedding reads it, and the routing of its blocks
  where they have experts. Depth m predicts token i + 1 + m at position i. All depths
  run on all T positions: a position whose target lies in another document is masked in
  the loss, and because attention is causal within documents no valid position sees it.

  reads: the keys of `mtp` that this kind reads, of those that not every kind reads.
  has_depths: False has no extra predictors at all, and no drafter.
  is_autoregressive: depth k follows from depth k - 1 and the token before its target,
    so that the last depth can be applied again, to draft more tokens than depths.
  reads_ahead: `(mtp, m)` -> how many tokens after position i depth m >= 1 reads there.
  deployed_blocks: how many of its blocks, the first ones, are the last layers of the
    deployed next-token model. They are the stack `heads` of its parameters.
  is_dense: its blocks have no experts, whatever the trunk's have.
  blocks: `mtp` -> blocks that one forward pass runs; a shared one once per depth.
  added_layers: `mtp` -> layers that training has and the deployed model has not.
  tapped_layers: number of trunk layers -> after which of them the streams are taken
    that it starts from besides the last one.
  stacks_unembed: its own output matrices are [depth, embed, vocab], one a depth, and
    not one for all depths.
  flops: `config` -> forward FLOPs per token of all depths besides blocks and logits.
  contract: `(mtp, tapped layers)` -> entries of `predictors.contract` that differ
    from the entries of heads on the trunk's output.
  on_trunk: `(mtp, unembed_DV, tokens_C)` -> parameters of new predictors that depend on
    the trunk, by name; tokens_C are those that can be drafted, None: every one.
  unstack: `(parameters, mtp)` -> what each depth adds, the deployed blocks first; one
    entry where all depths share it. Becomes `Weights.predictors`.
  drafter: `(trunk, mtp, num_drafts)` -> the drafter of K >= 1 tokens; equal arguments
    give the same one, since drafters key compiled programs. None drafts nothing.
  recursion: `(trunk, mtp)` -> the drafter that reads its own output, or None.
  upcoming: `(mtp, batch)` -> what its one extra depth learns in place of a token, see
    `top.Upcoming`; its targets in records are depth 0's. None: a token each.
  recurses: drafts more tokens than it has depths even without `recurse`.
  rules: checks what no other rule of `config_rules` does; see `config_rules.Rules`.
  """

  module: type[nn.Module]
  reads: tuple[str, ...] = ()
  has_depths: bool = True
  is_autoregressive: bool = False
  reads_ahead: Callable[[MtpConfig, int], int] = lambda mtp, m: 0
  deployed_blocks: int = 0
  is_dense: bool = False
  blocks: Callable[[MtpConfig], int] = lambda mtp: 0
  added_layers: Callable[[MtpConfig], int] = lambda mtp: 0
  tapped_layers: Callable[[int], tuple[int, ...]] = lambda num_layers: ()
  upcoming: Callable[..., Any] | None = None
  recurses: bool = False
  stacks_unembed: bool = False
  flops: Callable[[Config], float] = lambda config: 0.0
  contract: Callable[..., dict[str, Any]] = lambda mtp, tapped: {}
  on_trunk: Callable[..., dict[str, jax.Array]] = lambda mtp, unembed_DV, tokens_C: {}
  unstack: Callable[..., list[Any]] = lambda params, mtp: []
  drafter: Callable[..., Drafter] | None = None
  recursion: Callable[..., Recursion | None] = lambda trunk, mtp: None
  rules: Callable[[Any], None] = lambda rule: None
