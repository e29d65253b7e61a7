"""Acceptance rules: how many drafts a round keeps, and which token follows them.

A round verifies K drafts with R = K + 1 rows of the trunk: row i is the distribution of
the token after i drafts. Every rule keeps the first `accepted` drafts and adds one more
token, and what a round adds has the law that the trunk alone would have given it.

  greedy     most likely tokens. Stern et al. 2018, arXiv 1811.03115.
  match      the trunk samples a token at every row, drafts are kept while they are
             equal to it: exact for any draft, needs no draft distribution.
  leviathan  accept a draft d with probability min(1, p(d) / q(d)). Leviathan et al.
             2023, arXiv 2211.17192, and Chen et al. 2023, arXiv 2302.01318.
  block      accept the longest prefix that passes a test of its own; in expectation
             never fewer than leviathan. Sun et al. 2024, arXiv 2403.10444.

The first two choose tokens, then compare them (`match_tokens`); the others compare
probabilities (`verify_sampled`). All are pure: randomness is an argument.

Legend: B batch, K drafts, R = K + 1 rows, V vocab.
"""

import jax
import jax.numpy as jnp

from mtp_jax.kernels.argmax import argmax

RULES = ("greedy", "match", "leviathan", "block")


def match_tokens(
  target_BR: jax.Array, drafts_BK: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `(accepted_B, next_B)` of the rules greedy and match, int32.

  Args:
    target_BR: the trunk's token of every row, its arg max or its sample.
    drafts_BK: drafted tokens.
  """
  accepted_B = _num_leading(drafts_BK == target_BR[:, :-1])
  next_B1 = jnp.take_along_axis(target_BR, accepted_B[:, None], axis=1)
  return accepted_B, next_B1[:, 0].astype(jnp.int32)


def sample_tokens(log_weights: jax.Array, gumbel: jax.Array) -> jax.Array:
  """Returns token ids [...], int32, sampled by the Gumbel-max trick.

  Args:
    log_weights: [..., V], need not be normalised; -inf is never sampled.
    gumbel: standard Gumbel noise of the same shape, finite (`jax.random.gumbel`).
  """
  return argmax(log_weights + gumbel)


def verify_sampled(
  rule: str,
  log_p_BRV: jax.Array,
  log_q_BKV: jax.Array | None,
  drafts_BK: jax.Array,
  uniform_BK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns `(accepted_B, log_weights_BV)` of the rules leviathan and block.

  The next token is to be sampled from the unnormalised log weights: the residual
  distribution at the first token that is not kept, or the trunk's own after the last.

  Args:
    rule, log_p_BRV, log_q_BKV, drafts_BK: see `acceptance_thresholds`.
    uniform_BK: noise in [0, 1).
  """
  thresholds_BK, log_weights_BRV = acceptance_thresholds(
    rule, log_p_BRV, log_q_BKV, drafts_BK
  )
  # Strictly below: a uniform may be 0, and a token of probability 0 must not pass.
  passed_BK = uniform_BK < thresholds_BK
  accepted_B = _last(passed_BK) if rule == "block" else _num_leading(passed_BK)
  log_weights_B1V = jnp.take_along_axis(
    log_weights_BRV, accepted_B[:, None, None], axis=1
  )
  return accepted_B, log_weights_B1V[:, 0]


def acceptance_thresholds(
  rule: str,
  log_p_BRV: jax.Array,
  log_q_BKV: jax.Array | None,
  drafts_BK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns `(thresholds_BK, log_weights_BRV)`.

  The thresholds are what uniforms are compared with, in [0, 1]; row i of the weights is
  for the next token if i drafts are kept. With r_0 = 1, and q = 0 after the last draft:

    leviathan  threshold_i = min(1, p(d_i) / q(d_i)), weights max(p - q, 0)
    block      r_i = min(1, r_{i-1} p(d_i) / q(d_i)), weights max(r_i p - q, 0),
               Z_i their sum, threshold_i = Z_i / (Z_i + 1 - r_i), which is r_K at K

  Weights that are all 0 (p equal to q up to rounding) are replaced by p.

  Args:
    rule: leviathan or block.
    log_p_BRV: log-probabilities of the trunk, from `warp`.
    log_q_BKV: log-probabilities from which the drafts were sampled, by the same `warp`.
      None: drafts were chosen, not sampled, so q is one-hot.
    drafts_BK: drafted tokens, in [0, V).

  Raises:
    ValueError: another rule, or block without `log_q_BKV`.
  """
  if rule not in ("leviathan", "block"):
    raise ValueError(f"rule must be 'leviathan' or 'block', got {rule!r}.")
  if log_q_BKV is None:
    if rule == "block":
      raise ValueError(
        "rule 'block' needs the log-probabilities of sampled drafts, got log_q_BKV "
        "None. With chosen drafts it would accept as many as rule 'leviathan'."
      )
    hot_BKV = drafts_BK[:, :, None] == jnp.arange(log_p_BRV.shape[-1])
    log_q_BKV = jnp.where(hot_BKV, 0.0, -jnp.inf).astype(log_p_BRV.dtype)

  log_p_BK = _pick(log_p_BRV[:, :-1], drafts_BK)
  log_q_BK = _pick(log_q_BKV, drafts_BK)
  # p = 0 gives -inf whatever q is; the bound keeps -inf + inf out of the sums below.
  log_ratio_BK = log_p_BK - jnp.where(log_p_BK == -jnp.inf, 0.0, log_q_BK)
  log_ratio_BK = jnp.minimum(log_ratio_BK, jnp.finfo(log_ratio_BK.dtype).max)
  log_q_BRV = jnp.pad(log_q_BKV, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf)

  if rule == "leviathan":
    log_weights_BRV, _ = _residual(log_p_BRV, log_q_BRV)
    thresholds_BK = jnp.exp(jnp.minimum(log_ratio_BK, 0.0))
  else:
    log_r = [jnp.zeros_like(log_p_BRV[:, 0, 0])]
    for k in range(drafts_BK.shape[1]):
      log_r.append(jnp.minimum(log_r[-1] + log_ratio_BK[:, k], 0.0))
    log_r_BR = jnp.stack(log_r, axis=1)
    log_weights_BRV, mass_BR = _residual(log_r_BR[:, :, None] + log_p_BRV, log_q_BRV)
    total_BR = mass_BR - jnp.expm1(log_r_BR)
    # 0 / 0 where r is 1 and p equals q: then a longer prefix passes in any case.
    ratio_BR = jnp.where(total_BR > 0, mass_BR / total_BR, 1.0)
    thresholds_BK = ratio_BR[:, 1:]
  empty_BR1 = jnp.all(log_weights_BRV == -jnp.inf, axis=-1, keepdims=True)
  return thresholds_BK, jnp.where(empty_BR1, log_p_BRV, log_weights_BRV)


def _residual(log_a_BRV, log_b_BRV):
  """Returns `(log max(a - b, 0), sum of max(a - b, 0) over V)`."""
  gap_BRV = jnp.where(log_a_BRV > log_b_BRV, log_b_BRV - log_a_BRV, 0.0)
  log_rest_BRV = log_a_BRV + jnp.log(-jnp.expm1(gap_BRV))
  return log_rest_BRV, jnp.sum(jnp.exp(log_rest_BRV), axis=-1)


def _pick(x_BKV, ids_BK):
  return jnp.take_along_axis(x_BKV, ids_BK[:, :, None], axis=-1)[:, :, 0]


def _num_leading(passed_BK):
  """Returns how many pass before the first that does not."""
  is_kept_BK = jnp.cumprod(passed_BK.astype(jnp.int32), axis=1)
  return jnp.sum(is_kept_BK, axis=1, dtype=jnp.int32)


def _last(passed_BK):
  """Returns the number, from 1, of the last that passes, 0 if none does."""
  numbers_K = jnp.arange(1, 1 + passed_BK.shape[1], dtype=jnp.int32)
  return jnp.max(jnp.where(passed_BK, numbers_K, 0), axis=1, initial=0)
