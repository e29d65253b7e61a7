"""The same language models in plain PyTorch, written from the published equations.

The peer of `mtp-jax bench` and the oracle of the parity test, which fills it with
our parameters. It shares no code with `mtp_jax.model`. Sources: Llama (Touvron et al.
2023, arXiv 2302.13971) with grouped-query attention (Ainslie et al. 2023, arXiv
2305.13245), GPT-2 (Radford et al. 2019), parallel heads (Gloeckle et al. 2024, arXiv
2404.19737), Medusa heads (Cai et al. 2024, arXiv 2401.10774, section 2.1.1, without
matrices of their own), sequential modules (DeepSeek-V3, arXiv 2412.19437, equations 21
to 25).

Legend: B batch, T sequence, S cache slots, D embed, F mlp, N query heads, K kv heads,
H head dim, V vocab, M = 1 + depth.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_jax.config import PUBLISHED_MODULES, Config, TrunkConfig
from mtp_jax.predictors import num_trunk_layers

# The kinds of predictors that are written here once more.
KINDS = "none", "parallel", "sequential", "linear", "medusa"


class Context(NamedTuple):
  """What attention needs besides x: positions, and who may see whom.

  `angles` are the cos and sin of the positions, None for learned positions. `mask` is
  [B, 1, T, T], None where every row is one document: plain causal attention then.
  With a cache it is [T, S], None where all that is cached or causal may be seen.
  """

  angles: tuple[Tensor, Tensor] | None
  mask: Tensor | None


class KVCache(NamedTuple):
  """Keys and values of every layer, written in place, and the angles of every slot.

  Slot s holds position s. The rows of a batch are in step: all have the same length.
  """

  keys_BKSH: list[Tensor]
  values_BKSH: list[Tensor]
  angles: tuple[Tensor, Tensor] | None


class Slots(NamedTuple):
  """One layer's cache, and the slot of the first new token."""

  key_BKSH: Tensor
  value_BKSH: Tensor
  start: int

  def extend(self, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the new tokens; returns the keys and values of all tokens so far."""
    end = self.start + key_BKTH.shape[2]
    self.key_BKSH[:, :, self.start : end] = key_BKTH
    self.value_BKSH[:, :, self.start : end] = value_BKTH
    return self.key_BKSH[:, :, :end], self.value_BKSH[:, :, :end]


class Attention(nn.Module):
  def __init__(self, trunk: TrunkConfig):
    super().__init__()
    self.trunk = trunk
    bias = trunk.kind == "gpt2"
    heads = trunk.num_heads + 2 * trunk.num_kv_heads
    self.qkv = nn.Linear(trunk.embed_dim, heads * trunk.head_dim, bias)
    self.out = nn.Linear(trunk.num_heads * trunk.head_dim, trunk.embed_dim, bias)

  def forward(
    self, x_BTD: Tensor, context: Context, slots: Slots | None = None
  ) -> Tensor:
    c = self.trunk
    heads_BTNH = self.qkv(x_BTD).unflatten(-1, (-1, c.head_dim))
    q, k, v = (
      part.transpose(1, 2)
      for part in heads_BTNH.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), 2)
    )
    if context.angles is not None:
      q, k = rotate(q, *context.angles), rotate(k, *context.angles)
    if slots is not None:
      k, v = slots.extend(k, v)
    out_BNTH = F.scaled_dot_product_attention(
      q, k, v,
      attn_mask=context.mask,
      # A single new token sees all that is cached, itself included.
      is_causal=context.mask is None and q.shape[2] > 1,
      enable_gqa=c.num_kv_heads != c.num_heads,
    )
    return self.out(out_BNTH.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
  def __init__(self, trunk: TrunkConfig):
    super().__init__()
    bias = trunk.kind == "gpt2"
    self.gate = None
    if trunk.kind == "llama":
      self.gate = nn.Linear(trunk.embed_dim, trunk.mlp_dim, False)
    self.up = nn.Linear(trunk.embed_dim, trunk.mlp_dim, bias)
    self.down = nn.Linear(trunk.mlp_dim, trunk.embed_dim, bias)

  def forward(self, x_BTD: Tensor) -> Tensor:
    if self.gate is None:
      return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
    return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
  def __init__(self, trunk: TrunkConfig):
    super().__init__()
    self.attention_norm = make_norm(trunk)
    self.attention = Attention(trunk)
    self.mlp_norm = make_norm(trunk)
    self.mlp = Mlp(trunk)

  def forward(
    self, x_BTD: Tensor, context: Context, slots: Slots | None = None
  ) -> Tensor:
    x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context, slots)
    return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class SequentialModule(nn.Module):
  """DeepSeek-V3 equations 21 and 22, and the norm before the shared output head."""

  def __init__(self, trunk: TrunkConfig):
    super().__init__()
    self.hidden_norm = make_norm(trunk)
    self.embed_norm = make_norm(trunk)
    self.projection = nn.Linear(2 * trunk.embed_dim, trunk.embed_dim, bias=False)
    self.block = Block(trunk)
    self.out_norm = make_norm(trunk)

  def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, context: Context) -> Tensor:
    joined = torch.cat([self.hidden_norm(hidden_BTD), self.embed_norm(ahead_BTD)], -1)
    return self.out_norm(self.block(self.projection(joined), context))


class Peer(nn.Module):
  """Trunk, predictors and losses of one config.

  Raises:
    ValueError: a kind of predictor that is not one of `KINDS`, or sequential modules
      with other inputs or norms than the published ones.
  """

  def __init__(self, config: Config):
    super().__init__()
    trunk, mtp = config.trunk, config.mtp
    if mtp.kind not in KINDS:
      raise ValueError(
        f"mtp.kind must be one of {', '.join(KINDS)} for PyTorch, got {mtp.kind!r}."
      )
    for key, published in PUBLISHED_MODULES.items():
      if getattr(mtp, key) != published:
        raise ValueError(
          f"mtp.{key} must be {published!r} for PyTorch, got {getattr(mtp, key)!r}."
        )
    vocab, dim = config.tokenizer.vocab_size, trunk.embed_dim
    self.config = config
    self.embed = nn.Embedding(vocab, dim)
    if trunk.kind == "gpt2":
      self.position_embed = nn.Embedding(config.data.seq_len, dim)
    self.blocks = nn.ModuleList(Block(trunk) for _ in range(num_trunk_layers(config)))
    self.final_norm = make_norm(trunk)
    if mtp.kind == "parallel":
      self.heads = nn.ModuleList(Block(trunk) for _ in range(1 + mtp.depth))
    elif mtp.kind == "sequential":
      count = 1 if mtp.share_modules else mtp.depth
      self.modules_ = nn.ModuleList(SequentialModule(trunk) for _ in range(count))
    elif mtp.kind == "linear":
      self.maps = nn.ModuleList(nn.Linear(dim, dim, False) for _ in range(mtp.depth))
    elif mtp.kind == "medusa":
      self.maps = nn.ModuleList(nn.Linear(dim, dim) for _ in range(mtp.depth))
    self.unembed = nn.Linear(dim, vocab, bias=False)
    if trunk.tie_embeddings:
      self.unembed.weight = self.embed.weight

  def forward(
    self,
    tokens: Tensor,
    segment_ids: Tensor,
    positions: Tensor,
    next_tokens: Tensor,
    next_segment_ids: Tensor,
    one_document: bool = False,
  ) -> Tensor:
    """Returns losses_M: each depth's mean cross-entropy over its own valid tokens.

    The tensors are the fields of `mtp_jax.batch.Batch`, as int64; `one_document` tells
    that every row is a single document, so that no mask is needed.
    """
    length, num_predictors = tokens.shape[1], 1 + self.config.mtp.depth
    stream = torch.cat([tokens, next_tokens], 1)
    documents = torch.cat([segment_ids, next_segment_ids], 1)
    mask_B1TT = None
    if not one_document:
      same_BTT = segment_ids[:, :, None] == segment_ids[:, None, :]
      mask_B1TT = same_BTT.tril()[:, None]
    angles = None
    if self.config.trunk.kind == "llama":
      angles = rope_angles(positions, self.config.trunk, self.embed.weight.dtype)
    context = Context(angles, mask_B1TT)
    states = self.hidden_states(tokens, stream, positions, context)
    losses = []
    for m, hidden_BTD in enumerate(states):
      ahead = slice(1 + m, 1 + m + length)
      valid_BT = (documents[:, ahead] == segment_ids) & (segment_ids != 0)
      targets_BT = stream[:, ahead].masked_fill(~valid_BT, -100)
      logits_BTV = self.unembed(hidden_BTD)
      # The loss is at least float32, whatever the compute dtype.
      logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
      nll = F.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"
      )
      losses.append(nll / valid_BT.sum().clamp(min=1))
    assert len(losses) == num_predictors
    return torch.stack(losses)

  def hidden_states(
    self, tokens: Tensor, stream: Tensor, positions: Tensor, context: Context
  ) -> list[Tensor]:
    """Returns the normed state of every depth, each [B, T, D]."""
    mtp = self.config.mtp
    x_BTD = self.embed(tokens)
    if self.config.trunk.kind == "gpt2":
      x_BTD = x_BTD + self.position_embed(positions)
    for block in self.blocks:
      x_BTD = block(x_BTD, context)
    if mtp.kind == "parallel":
      return [self.final_norm(head(x_BTD, context)) for head in self.heads]
    states = [self.final_norm(x_BTD)]
    if mtp.kind == "linear":
      return states + [linear(states[0]) for linear in self.maps]
    if mtp.kind == "medusa":
      return states + [states[0] + F.silu(layer(states[0])) for layer in self.maps]
    for k in range(1, 1 + mtp.depth):
      module = self.modules_[0 if mtp.share_modules else k - 1]
      ahead_BTD = self.embed(stream[:, k : k + tokens.shape[1]])
      states.append(module(states[-1], ahead_BTD, context))
    return states

  def empty_cache(self, rows: int, slots: int) -> KVCache:
    """Returns the cache with which `decode_step` starts."""
    trunk, like = self.config.trunk, self.embed.weight
    shape = (rows, trunk.num_kv_heads, slots, trunk.head_dim)
    zeros = lambda: [  # noqa: E731
      torch.zeros(shape, dtype=like.dtype, device=like.device)
      for _ in self._next_token_blocks()
    ]
    angles = None
    if trunk.kind == "llama":
      positions_1S = torch.arange(slots, device=like.device)[None]
      angles = rope_angles(positions_1S, trunk, like.dtype)
    return KVCache(zeros(), zeros(), angles)

  def decode_step(self, tokens_BT: Tensor, position: int, cache: KVCache) -> Tensor:
    """Returns logits_BTV of the token after each of T new ones, by the plain NTP model.

    The new tokens stand at `position`, `position` + 1, ... in every row. Parallel heads
    predict the next token by their first head; other predictors are left out.
    """
    new = slice(position, position + tokens_BT.shape[1])
    x_BTD = self.embed(tokens_BT)
    if self.config.trunk.kind == "gpt2":
      x_BTD = x_BTD + self.position_embed.weight[new]
    angles, mask_TS = cache.angles, None
    if angles is not None:
      angles = (angles[0][:, :, new], angles[1][:, :, new])
    if position and tokens_BT.shape[1] > 1:
      shape = (tokens_BT.shape[1], new.stop)
      ones_TS = torch.ones(shape, dtype=torch.bool, device=tokens_BT.device)
      mask_TS = ones_TS.tril(position)
    context = Context(angles, mask_TS)
    for block, key, value in zip(
      self._next_token_blocks(), cache.keys_BKSH, cache.values_BKSH, strict=True
    ):
      x_BTD = block(x_BTD, context, Slots(key, value, position))
    return self.unembed(self.final_norm(x_BTD))

  def _next_token_blocks(self) -> list[Block]:
    heads = self.heads[:1] if self.config.mtp.kind == "parallel" else []
    return [*self.blocks, *heads]


def make_norm(trunk: TrunkConfig) -> nn.Module:
  """Returns RMSNorm for Llama, LayerNorm for GPT-2."""
  kind = nn.RMSNorm if trunk.kind == "llama" else nn.LayerNorm
  return kind(trunk.embed_dim, eps=trunk.norm_eps)


def rope_angles(
  positions_BT: Tensor, trunk: TrunkConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
  """Returns cos and sin [B, 1, T, H / 2] of rotary embedding (arXiv 2104.09864)."""
  wide = torch.promote_types(dtype, torch.float32)
  half = trunk.head_dim // 2
  exponents = torch.arange(half, dtype=wide, device=positions_BT.device) / half
  angles = positions_BT[:, None, :, None].to(wide) / trunk.rope_theta**exponents
  return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Rotates the pairs (h, h + H / 2) of every head."""
  first, second = x_BNTH.chunk(2, -1)
  rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
  return rotated.to(x_BNTH.dtype)


def total_loss(losses_M: Tensor, mtp_weight: float) -> Tensor:
  """Returns `L_0 + lambda / D * sum_k L_k` (DeepSeek-V3, equation 25)."""
  if len(losses_M) == 1:
    return losses_M[0]
  return losses_M[0] + mtp_weight * losses_M[1:].mean()


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
  """Returns fused AdamW that decays matrices only, as in nanoGPT."""
  c = config.optimizer
  matrices = [p for p in model.parameters() if p.ndim > 1]
  vectors = [p for p in model.parameters() if p.ndim == 1]
  groups = [
    {"params": matrices, "weight_decay": c.weight_decay},
    {"params": vectors, "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(
    groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True
  )
