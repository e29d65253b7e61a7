"""Per-depth losses from hidden states, with one block of logits in memory at a time.

The losses receive hidden states and the unembedding matrix, never logits: they walk
over depths and blocks of positions. The total loss is linear in every token's loss, so
the gradient of a block is computed while its logits are in memory: three matrix
products per block (logits, d hidden, d unembedding), none repeated, and peak memory
that does not grow with the number of depths. Results are sums and counts; the only
division, by global counts, is in the caller's coefficients.

Legend: B batch, T sequence, D embed, V vocab, M = 1 + depth, N = tokens of a block.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtp_jax.kernels.argmax import argmax
from mtp_jax.sharding import map_over_tokens, platform, psum_tokens, tokens_per_block

_TOKENS = (None, "batch", "seq")
_MATRIX = ("act_embed", None)


class LossSums(NamedTuple):
  """Losses of all depths, as sums over tokens.

  total:      the sum of `weighted_M`.
  weighted_M: coefficient times sum of the objective.
  nll_M:      sum of the cross-entropies, for any objective.
  correct_M:  tokens whose target is the most likely one.
  """

  total: jax.Array
  weighted_M: jax.Array
  nll_M: jax.Array
  correct_M: jax.Array


class Teacher(NamedTuple):
  """The trunk's own distributions, as targets in place of the data.

  hidden_MBTD: the trunk's normed states from which it predicts the same tokens.
  unembed_DV: the trunk's output matrix.
  """

  hidden_MBTD: jax.Array
  unembed_DV: jax.Array

  @property
  def per_token(self) -> tuple[jax.Array, ...]:
    """The arrays [M, B, T, ...] of which `loss` gets a block."""
    return (self.hidden_MBTD,)

  @staticmethod
  def axes() -> "Teacher":
    """Returns the logical axes of the arrays."""
    return Teacher._make([(*_TOKENS, "act_embed"), _MATRIX])

  def loss(self, objective: str, logits_NV: jax.Array, h_ND: jax.Array) -> jax.Array:
    """Returns loss_N of a block of tokens."""
    return OBJECTIVES[objective](logits_NV, _logits(h_ND, self.unembed_DV))


class TokenStats(NamedTuple):
  """Loss of every token in nats, and the most likely token in its place."""

  nll_MBT: jax.Array
  argmax_MBT: jax.Array


def loss_coefficients(weights_M: jax.Array, mask_MBT: jax.Array) -> jax.Array:
  """Returns `weights_M / counts_M`: each depth is averaged over its own valid tokens.

  `mask_MBT` covers the whole optimizer step (microbatches may have an axis of their own
  after M), so that this is the only division. A depth without any valid token
  contributes 0.
  """
  axes = tuple(range(1, mask_MBT.ndim))
  counts_M = jnp.sum(mask_MBT, axis=axes, dtype=weights_M.dtype)
  return weights_M / jnp.maximum(counts_M, 1)


def kl(logits_NV: jax.Array, teacher_NV: jax.Array) -> jax.Array:
  """Returns KL(p || q) in nats, p being the teacher's distribution."""
  log_p_NV, log_q_NV = map(jax.nn.log_softmax, (teacher_NV, logits_NV))
  return jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_q_NV), axis=-1)


def tv(logits_NV: jax.Array, teacher_NV: jax.Array) -> jax.Array:
  """Returns 1 - sum min(p, q): how often a sampled draft is rejected.

  It is the total variation distance (Leviathan et al. 2023, arXiv 2211.17192).
  """
  return -jnp.expm1(_log_overlap(logits_NV, teacher_NV))


def log_acceptance(logits_NV: jax.Array, teacher_NV: jax.Array) -> jax.Array:
  """Returns -log sum min(p, q) in nats, one of the LK losses (arXiv 2602.23881).

  Its gradient is the gradient of `tv` divided by the overlap, so it does not vanish
  where the two distributions barely overlap.
  """
  return -_log_overlap(logits_NV, teacher_NV)


def _log_overlap(logits_NV: jax.Array, teacher_NV: jax.Array) -> jax.Array:
  """Returns log sum min(p, q), finite where all products of probabilities underflow."""
  log_p_NV, log_q_NV = map(jax.nn.log_softmax, (teacher_NV, logits_NV))
  return jax.nn.logsumexp(jnp.minimum(log_p_NV, log_q_NV), axis=-1)


# mtp.objective -> (logits_NV, teacher_NV) -> loss_N; `cross_entropy` needs no teacher.
OBJECTIVES = {"kl": kl, "tv": tv, "log_acceptance": log_acceptance}


def trunk_states(hidden_MBTD: jax.Array) -> jax.Array:
  """Returns, at [m, b, i], the trunk's state that predicts token i + 1 + m.

  This is the trunk's state at i + m, `hidden_MBTD[0, b, i + m]`. Entries with
  i + m >= T are meaningless (mask them). No gradient passes.
  """
  trunk_BTD = jax.lax.stop_gradient(hidden_MBTD[0])
  depths = range(hidden_MBTD.shape[0])
  return jnp.stack([jnp.roll(trunk_BTD, -m, axis=1) for m in depths])


def feature_sums(
  hidden_MBTD: jax.Array, teacher_MBTD: jax.Array, mask_MBT: jax.Array
) -> jax.Array:
  """Returns sums_M over tokens of the smooth L1 distance, averaged over the features.

  EAGLE (Li et al. 2024, arXiv 2401.15077): the states that draft learn to resemble the
  trunk's. Computed in float32 (float64 for float64 input).
  """
  wide = jnp.promote_types(hidden_MBTD.dtype, jnp.float32)
  hidden_MBTD, teacher_MBTD = hidden_MBTD.astype(wide), teacher_MBTD.astype(wide)
  distance_MBT = jnp.mean(optax.losses.huber_loss(hidden_MBTD, teacher_MBTD), axis=-1)
  return jnp.sum(jnp.where(mask_MBT, distance_MBT, 0.0), axis=(1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def loss_sums(
  hidden_MBTD: jax.Array,
  unembed_DV: jax.Array,
  targets_MBT: jax.Array,
  mask_MBT: jax.Array,
  coefficients_M: jax.Array,
  block_tokens: int,
  objective: str = "cross_entropy",
  teacher: Teacher | None = None,
) -> LossSums:
  """Returns the weighted total loss and the per-depth sums.

  Only `total` is differentiable, in `hidden_MBTD` and `unembed_DV`; the other fields
  are for logs, and no gradient reaches the teacher. Logits, softmax and sums are
  float32 (float64 for float64 input).

  Args:
    hidden_MBTD: normed hidden states of every depth.
    unembed_DV: the output matrix of these depths, in the compute dtype.
    targets_MBT: token ids.
    mask_MBT: true where the target counts.
    coefficients_M: see `loss_coefficients`.
    block_tokens: positions per block of logits on each device; 0 lets
      `sharding.tokens_per_block` choose.
    objective: cross_entropy, or a key of `OBJECTIVES`, which needs a teacher.
    teacher: see `Teacher`; None with `cross_entropy`. What else has its three methods
      will do, such as `predictors.top.Upcoming`, which needs no objective.
  """
  return _over_devices(
    functools.partial(
      _local_sums, block_tokens=block_tokens, objective=objective, with_grads=False
    ),
    teacher,
  )(hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M, teacher)[0]


def _loss_sums_fwd(
  hidden, unembed, targets, mask, coefficients, block_tokens, objective, teacher
):
  sums, d_hidden, d_unembed = _over_devices(
    functools.partial(
      _local_sums, block_tokens=block_tokens, objective=objective, with_grads=True
    ),
    teacher,
    with_grads=True,
  )(hidden, unembed, targets, mask, coefficients, teacher)
  return sums, (d_hidden, d_unembed.astype(unembed.dtype))


def _loss_sums_bwd(block_tokens, objective, residuals, cotangents):
  del block_tokens, objective
  d_hidden, d_unembed = residuals
  scale = cotangents.total
  return (
    d_hidden * scale.astype(d_hidden.dtype),
    d_unembed * scale.astype(d_unembed.dtype),
    None,
    None,
    None,
    None,
  )


loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)


def token_stats(
  hidden_MBTD: jax.Array,
  unembeddings: Sequence[tuple[slice, jax.Array]],
  targets_MBT: jax.Array,
  block_tokens: int,
) -> TokenStats:
  """Returns every token's loss in nats and arg max, for evaluation (no gradient).

  `unembeddings`: pairs of a slice of depths and their output matrix, in order; each
  reads as many entries of a state as it has rows.
  """
  results = [
    _token_stats(
      hidden_MBTD[depths, ..., : len(unembed_DV)], unembed_DV, targets_MBT[depths],
      block_tokens,
    )
    for depths, unembed_DV in unembeddings
  ]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)


def _token_stats(hidden_MBTD, unembed_DV, targets_MBT, block_tokens):
  def block(h_ND, t_N):
    logits_NV = _logits(h_ND, unembed_DV)
    nll_N = jax.nn.logsumexp(logits_NV, axis=-1) - _pick(logits_NV, t_N)
    return nll_N, argmax(logits_NV)

  tokens = tokens_per_block(block_tokens, unembed_DV.shape[1])
  return TokenStats(*_by_blocks(block, hidden_MBTD, targets_MBT, tokens))


def token_ranks(
  hidden_MBTD: jax.Array,
  unembed_DV: jax.Array,
  tokens_MBT: jax.Array,
  block_tokens: int,
) -> jax.Array:
  """Returns rank_MBT: how many tokens of the vocabulary precede each given token.

  Tokens are ordered by logit; at equal logits lower ids come first, as in
  `jax.lax.top_k`.
  """

  def block(h_ND, t_N):
    logits_NV = _logits(h_ND, unembed_DV)
    own_N1, t_N1 = _pick(logits_NV, t_N)[:, None], t_N[:, None]
    ids_NV = jax.lax.broadcasted_iota(t_N.dtype, logits_NV.shape, 1)
    is_before_NV = (logits_NV > own_N1) | ((logits_NV == own_N1) & (ids_NV < t_N1))
    return (jnp.sum(is_before_NV, axis=-1, dtype=jnp.int32),)

  tokens = tokens_per_block(block_tokens, unembed_DV.shape[1])
  return _by_blocks(block, hidden_MBTD, tokens_MBT, tokens)[0]


def _by_blocks(block, hidden_MBTD, tokens_MBT, block_tokens):
  """Returns the outputs of `block(h_ND, t_N)` for all tokens, each [M, B, T]."""
  shape = tokens_MBT.shape
  blocks, num_tokens = _split(
    block_tokens,
    hidden_MBTD.reshape(-1, hidden_MBTD.shape[-1]),
    tokens_MBT.reshape(-1),
  )
  results = jax.lax.map(lambda args: block(*args), blocks)
  return tuple(x.reshape(-1)[:num_tokens].reshape(shape) for x in results)


def _over_devices(function, teacher, with_grads=False):
  scalar, per_depth, hidden = (), (None,), (*_TOKENS, "act_embed")
  sums = LossSums(scalar, per_depth, per_depth, per_depth)
  of_teacher = None if teacher is None else teacher.axes()
  return map_over_tokens(
    function,
    in_axes=(hidden, _MATRIX, _TOKENS, _TOKENS, per_depth, of_teacher),
    out_axes=(sums, hidden, _MATRIX) if with_grads else (sums,),
  )


def _local_sums(
  hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M, teacher, *,
  block_tokens, objective, with_grads,
):
  """Returns one device's sums and gradients; sums are added over all devices."""
  M, B, T, D = hidden_MBTD.shape
  block_tokens = tokens_per_block(block_tokens, unembed_DV.shape[1])
  accumulate = jnp.promote_types(hidden_MBTD.dtype, jnp.float32)

  def block(d_unembed, xs):
    h_ND, t_N, mask_N, *of_teacher, coefficient = xs
    # exp and its sum serve both the loss and, below, the gradient of the logits.
    logits_NV = _logits(h_ND, unembed_DV)
    top_N1, sum_N1 = _top_and_sum(logits_NV)
    exp_NV = jnp.exp(logits_NV - top_N1)
    picked_N = _pick(logits_NV, t_N)
    nll_N = jnp.log(sum_N1[:, 0]) + top_N1[:, 0] - picked_N
    value = nll = jnp.sum(jnp.where(mask_N, nll_N, 0.0))
    correct = jnp.sum((picked_N >= top_N1[:, 0]) & mask_N, dtype=accumulate)
    # Other objectives are differentiated by JAX: their logits are alive here anyway.
    if teacher is not None:
      value_N, pullback = jax.vjp(
        lambda x_NV: teacher.loss(objective, x_NV, *of_teacher), logits_NV
      )
      value = jnp.sum(jnp.where(mask_N, value_N, 0.0))
    if not with_grads:
      return d_unembed, (value, nll, correct)
    # The coefficient is applied here, once, so that the backward pass only scales.
    scale_N1 = jnp.where(mask_N, coefficient, 0.0)[:, None].astype(accumulate)
    if teacher is None:
      hot_NV = jax.lax.broadcasted_iota(t_N.dtype, logits_NV.shape, 1) == t_N[:, None]
      d_logits_NV = exp_NV * (scale_N1 / sum_N1) - jnp.where(hot_NV, scale_N1, 0.0)
    else:
      (d_logits_NV,) = pullback(scale_N1[:, 0])
    # Products run in the compute dtype; the matrix' gradient is summed over all blocks,
    # so its sum stays wide.
    d_logits_NV = d_logits_NV.astype(h_ND.dtype)
    d_h_ND = jnp.einsum("NV,DV->ND", d_logits_NV, unembed_DV)
    d_unembed = d_unembed + jnp.einsum(
      "ND,NV->DV", h_ND, d_logits_NV, preferred_element_type=accumulate
    )
    return d_unembed, (value, nll, correct, d_h_ND)

  # Blocks never cross a depth: tokens of one depth are padded to whole blocks.
  arrays = [hidden_MBTD, targets_MBT, mask_MBT]
  if teacher is not None:
    arrays += teacher.per_token
  per_depth = jax.vmap(lambda *depth: _split(block_tokens, *depth)[0])(
    *(x.reshape(M, B * T, *x.shape[3:]) for x in arrays)
  )
  num_blocks = per_depth[0].shape[1]
  xs = (
    *(x.reshape(M * num_blocks, *x.shape[2:]) for x in per_depth),
    jnp.repeat(coefficients_M, num_blocks),
  )
  d_unembed = jnp.zeros(unembed_DV.shape, accumulate) if with_grads else ()
  # One block needs no loop.
  if M * num_blocks == 1:
    d_unembed, ys = block(d_unembed, jax.tree.map(lambda x: x[0], xs))
    ys = jax.tree.map(lambda y: y[None], ys)
  else:
    d_unembed, ys = jax.lax.scan(block, d_unembed, xs)
  # Only now sums over devices: one all-reduce, not one per block.
  value_M, nll_M, correct_M = (
    psum_tokens(jnp.sum(y.reshape(M, num_blocks), axis=1)) for y in ys[:3]
  )
  weighted_M = coefficients_M * value_M
  sums = LossSums(jnp.sum(weighted_M), weighted_M, nll_M, correct_M)
  if not with_grads:
    return (sums,)
  d_hidden = ys[3].reshape(M, -1, D)[:, : B * T].reshape(M, B, T, D)
  return sums, d_hidden, psum_tokens(d_unembed)


def _logits(h_ND: jax.Array, unembed_DV: jax.Array) -> jax.Array:
  accumulate = jnp.promote_types(h_ND.dtype, jnp.float32)
  return jnp.einsum("ND,DV->NV", h_ND, unembed_DV, preferred_element_type=accumulate)


def _top_and_sum(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the largest logit, and the sum of exp(logit - largest), each [N, 1].

  On a GPU in one pass over the logits, which is bound by memory: a partial sum is
  scaled whenever the largest logit so far changes (Milakov and Gimelshein 2018, arXiv
  1805.02867).
  """
  if platform() != "gpu":
    top_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
    return top_N1, jnp.sum(jnp.exp(logits_NV - top_N1), axis=-1, keepdims=True)

  def join(a, b):
    top = jnp.maximum(a[0], b[0])
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

  # The lowest number, not -inf, whose difference from itself is no number.
  empty = jnp.finfo(logits_NV.dtype).min, jnp.zeros((), logits_NV.dtype)
  pair = logits_NV, jnp.ones_like(logits_NV)
  top_N, sum_N = jax.lax.reduce(pair, empty, join, dimensions=(1,))
  return top_N[:, None], sum_N[:, None]


def _pick(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]


def _split(block_tokens: int, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], int]:
  """Returns `(blocks, length)`: leading axes cut into equal blocks, the last padded."""
  num_tokens = arrays[0].shape[0]
  num_blocks = -(-num_tokens // block_tokens)
  size = -(-num_tokens // num_blocks)
  padding = num_blocks * size - num_tokens
  blocks = tuple(
    jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))).reshape(
      num_blocks, size, *a.shape[1:]
    )
    for a in arrays
  )
  return blocks, num_tokens
