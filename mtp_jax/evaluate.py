"""Likelihood of held-out rows: losses, accuracy and agreement of every depth.

Other systems call four different measures "acceptance"; here each has its own name.
*Accuracy* compares depth m with the data. *Teacher-forced agreement* compares depth m
with the trunk's own arg max for the same token, on true prefixes. *Joint prefix
agreement* asks that depths 1..m all agree at once; one plus the sum of the joint prefix
agreements is the *simulated accepted length*. `generative_metrics` measures what is
accepted while decoding.

Every mean is a ratio of sums over documents, with the standard error of that ratio by
linearisation over documents (Cochran 1977, section 6.4).

Legend: B batch, T sequence, M = 1 + depth.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax.batch import Batch
from mtp_jax.config import Config
from mtp_jax.executables import awaited
from mtp_jax.lm import MtpLm, columns, draft_tokens, unembed_matrix, unembeddings
from mtp_jax.losses import token_ranks, token_stats
from mtp_jax.predictors import num_drafts
from mtp_jax.predictors.vocabulary import localize
from mtp_jax.program import ProgramConfig
from mtp_jax.sharding import compiler_options, put_batch
from mtp_jax.targets import future_targets


def row_sums(
  config: Config, params: Any, batch: Batch, token_bytes_V: jax.Array
) -> dict[str, jax.Array]:
  """Returns per-row sums; every entry has a leading B axis.

  nll, correct, count [B, M] are over valid targets of each depth, with `draft_vocab`
  over the targets that can be drafted; agree, prefix [B, D] and reachable [B] over
  the positions where all D drafts (none of a kind without a drafter) can be compared
  with the trunk's choice inside the row; bytes [B] counts the bytes of the next-token
  targets.
  """
  hidden_MBTD = MtpLm(config).apply({"params": params}, batch)
  depth, drafts = config.mtp.depth, num_drafts(config.mtp)
  tokens_MBT, valid_MBT = future_targets(batch, depth, config.mtp.score_from)
  targets_MBT, mask_MBT = columns(params, config, tokens_MBT, valid_MBT)
  stats = token_stats(
    hidden_MBTD, unembeddings(params, config), targets_MBT, config.loss.block_tokens
  )
  drafted_MBT, tokens_C = stats.argmax_MBT, draft_tokens(params, config)
  if tokens_C is not None:
    drafted_MBT = drafted_MBT.at[1:].set(tokens_C[drafted_MBT[1:]])
  sum_rows = lambda x: jnp.sum(x, axis=-1, dtype=jnp.float32)  # noqa: E731
  chosen, reachable_BT = _trunk_choices(drafted_MBT[0], valid_MBT[: 1 + drafts])
  agree, prefix, so_far_BT = [], [], reachable_BT
  for m, chosen_BT in enumerate(chosen, start=1):
    agree_BT = reachable_BT & (drafted_MBT[m] == chosen_BT)
    so_far_BT = so_far_BT & agree_BT
    agree.append(sum_rows(agree_BT))
    prefix.append(sum_rows(so_far_BT))
  no_depth = jnp.zeros((batch.tokens.shape[0], 0), jnp.float32)
  return {
    "nll": sum_rows(jnp.where(mask_MBT, stats.nll_MBT, 0.0)).T,
    "correct": sum_rows(mask_MBT & (stats.argmax_MBT == targets_MBT)).T,
    "count": sum_rows(mask_MBT).T,
    "agree": jnp.stack(agree, axis=1) if agree else no_depth,
    "prefix": jnp.stack(prefix, axis=1) if prefix else no_depth,
    "reachable": sum_rows(reachable_BT),
    "bytes": sum_rows(jnp.where(mask_MBT[0], token_bytes_V[targets_MBT[0]], 0)),
  }


def _trunk_choices(
  trunk_BT: jax.Array, mask_MBT: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """Returns the trunk's own choice of the token that each extra depth drafts.

  `(chosen, reachable_BT)`: chosen_BT per depth, to be read at the positions where all D
  drafts can be compared with the trunk's choice inside the row.

  Args:
    trunk_BT: the arg max of depth 0.
    mask_MBT: of valid targets.
  """
  depth, length = len(mask_MBT) - 1, trunk_BT.shape[1]
  # Position i + m holds the trunk's own choice of the token that depth m drafts at i;
  # the wrapped end is not reachable.
  chosen = [jnp.roll(trunk_BT, -m, axis=1) for m in range(1, 1 + depth)]
  return chosen, mask_MBT[depth] & (jnp.arange(length) < length - depth)


def hit_sums(
  config: Config, params: Any, batch: Batch, ranks: int
) -> dict[str, jax.Array]:
  """Returns per-row sums; every entry has a leading B axis.

  hits [B, D, R] counts the positions at which the token that a depth ranks r-th is the
  trunk's own choice: at rank 0 it is `agree` of `row_sums`. reachable [B]: see there.
  """
  hidden_MBTD = MtpLm(config).apply({"params": params}, batch)
  blocks, tokens_C = config.loss.block_tokens, draft_tokens(params, config)
  mtp = config.mtp
  targets_MBT, mask_MBT = future_targets(batch, mtp.depth, mtp.score_from)
  main = [(slice(0, 1), unembed_matrix(params, config))]
  trunk = token_stats(hidden_MBTD[:1], main, targets_MBT[:1], blocks)
  chosen, reachable_BT = _trunk_choices(trunk.argmax_MBT[0], mask_MBT)
  ranks_of_depths = []
  for m, column_BT in enumerate(chosen, start=1):
    is_there_BT = reachable_BT
    if tokens_C is not None:
      column_BT, is_there_BT = localize(
        column_BT, tokens_C, config.tokenizer.vocab_size
      )
    unembed_DV = unembed_matrix(params, config, m)
    (rank_BT,) = token_ranks(
      hidden_MBTD[m : m + 1], unembed_DV, column_BT[None], blocks
    )
    ranks_of_depths.append(jnp.where(reachable_BT & is_there_BT, rank_BT, -1))
  rank_DBT = jnp.stack(ranks_of_depths)
  is_hit_DBTR = rank_DBT[..., None] == jnp.arange(ranks)
  return {
    "hits": jnp.sum(is_hit_DBTR, axis=2, dtype=jnp.float32).swapaxes(0, 1),
    "reachable": jnp.sum(reachable_BT, axis=1, dtype=jnp.float32),
  }


def top_k_hits(
  config: Config,
  params: Any,
  batches: Iterable[tuple[Batch, np.ndarray]],
  ranks: int,
  mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, int]:
  """Returns `(hits_KR, num_positions)` of the extra predictors, for static trees.

  hits[k, r] is the share of positions at which the token that depth k + 1 ranks r-th
  is the trunk's own choice: teacher-forced, at the positions of `row_sums`.

  Args:
    config: of the trial, with at least one extra predictor.
    batches: see `document_sums`.
    ranks: R, from the most likely token on.

  Raises:
    ValueError: no position, or ranks not in [1, vocab].
  """
  most = config.mtp.draft_vocab or config.tokenizer.vocab_size
  if not 1 <= ranks <= most:
    raise ValueError(f"ranks must be 1 to {most}, the vocabulary, got {ranks}.")
  program = jax.jit(
    functools.partial(hit_sums, config, ranks=ranks),
    compiler_options=compiler_options(mesh),
  )
  hits_KR, count = np.zeros((config.mtp.depth, ranks)), 0.0
  for batch, document_B in batches:
    sums = program(params, put_batch(mesh, batch, is_whole=True))
    sums = multihost_utils.process_allgather(sums, tiled=True)
    hits_KR += np.sum(sums["hits"][document_B >= 0], axis=0, dtype=np.float64)
    count += float(np.sum(sums["reachable"][document_B >= 0], dtype=np.float64))
  if not count:
    raise ValueError(
      "held-out rows must have a position where every depth has a target, got none."
    )
  return hits_KR / count, int(count)


@functools.lru_cache(maxsize=32)
def row_sums_program(config: ProgramConfig, mesh: jax.sharding.Mesh) -> Any:
  """Returns `row_sums` as a jitted function of parameters, batch and byte counts."""
  return jax.jit(
    functools.partial(row_sums, config), compiler_options=compiler_options(mesh)
  )


def document_sums(
  config: Config,
  params: Any,
  batches: Iterable[tuple[Batch, np.ndarray]],
  token_bytes_V: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Returns `row_sums` added up per document: leading axis = documents seen.

  `batches` yields (Batch, document index per row); a negative index is padding.
  """
  program = awaited(row_sums_program(config, mesh))
  table = np.zeros(config.tokenizer.vocab_size, np.int32)
  table[: len(token_bytes_V)] = token_bytes_V
  rows, documents = [], []
  for batch, document_B in batches:
    sums = program(params, put_batch(mesh, batch, is_whole=True), table)
    rows.append(multihost_utils.process_allgather(sums, tiled=True))
    documents.append(document_B)
  document = np.concatenate(documents)
  real = document >= 0
  _, index = np.unique(document[real], return_inverse=True)

  def add_up(*parts: np.ndarray) -> np.ndarray:
    values = np.concatenate(parts)[real].astype(np.float64)
    total = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(total, index, values)
    return total

  return jax.tree.map(add_up, *rows)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
  """Returns mean and standard error over documents of a ratio of sums.

  The mean is NaN without any count; the error is NaN with fewer than two documents.
  """
  total, n = denominator.sum(), len(denominator)
  if total == 0:
    return {"mean": math.nan, "stderr": math.nan}
  mean = numerator.sum() / total
  if n < 2:
    return {"mean": float(mean), "stderr": math.nan}
  residual = numerator - mean * denominator
  error = np.sqrt(n / (n - 1) * np.square(residual).sum()) / total
  return {"mean": float(mean), "stderr": float(error)}


# In place of an error over documents, of which there is one.
NO_ERROR = "an error needs two documents"


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns the likelihood part of eval.json from `document_sums`."""
  num_predictors = sums["nll"].shape[1]
  loss = [ratio(sums["nll"][:, m], sums["count"][:, m]) for m in range(num_predictors)]
  reachable = sums["reachable"]
  drafts = range(sums["agree"].shape[1])
  return {
    "num_documents": len(reachable),
    "main_loss": loss[0],
    "bits_per_byte": ratio(sums["nll"][:, 0] / math.log(2), sums["bytes"]),
    "depth_loss": [
      x | {"count": int(sums["count"][:, m].sum())} for m, x in enumerate(loss)
    ],
    "depth_accuracy": [
      ratio(sums["correct"][:, m], sums["count"][:, m]) for m in range(num_predictors)
    ],
    "teacher_forced_agreement": [ratio(sums["agree"][:, k], reachable) for k in drafts],
    "joint_prefix_agreement": [ratio(sums["prefix"][:, k], reachable) for k in drafts],
    "simulated_accepted_length": ratio(
      reachable + sums["prefix"].sum(axis=1), reachable
    ),
  }
