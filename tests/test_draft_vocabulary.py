"""EAGLE-3 that can draft some tokens only: choice, losses, evaluation, decoding."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import mtp_jax
from mtp_jax import evaluate, train
from mtp_jax.config import with_overrides
from mtp_jax.data.packing import token_counts
from mtp_jax.decode.target import unstack
from mtp_jax.lm import MtpLm, unembed_matrix
from mtp_jax.losses import loss_coefficients
from mtp_jax.predictors import vocabulary
from mtp_jax.predictors.weights import unembed
from mtp_jax.run import Run
from mtp_jax.targets import future_targets
from tests.common import (
  VOCAB,
  gradient_program,
  microbatches,
  mostly_slow,
  packed_batch,
  random_params,
  tiny_config,
)
from tests.tiny_runs import run_config, write_texts

TOKENS = np.array([0, 3, 4, 9, 17, 22, 23, 30, 31, 38])
REDUCED = {"mtp.unembed": "own", "mtp.draft_vocab": len(TOKENS)}
WEIGHTS_M = np.array([1, 0.5, 0.3], np.float32)


def reduced(**more):
  config = tiny_config("eagle3", 2, REDUCED | more)
  params = random_params(config)
  params["mtp"]["draft_tokens"] = TOKENS.astype(np.float32)
  return config, params


def test_the_most_frequent_tokens_are_chosen():
  counts_V = np.array([0, 5, 2, 5, 0, 9])
  for size, expected in ((1, [5]), (2, [1, 5]), (3, [1, 3, 5]), (5, [0, 1, 2, 3, 5])):
    np.testing.assert_array_equal(vocabulary.most_frequent(counts_V, size), expected)


@pytest.mark.parametrize("objective", mostly_slow(["cross_entropy", "kl"], "kl"))
def test_losses_are_those_of_the_tokens_that_can_be_drafted(objective):
  config, params = reduced(**{"mtp.objective": objective})
  batch = packed_batch(config, padding=True)
  targets_MBT, mask_MBT = map(np.array, future_targets(batch, 2))
  hidden_MBTD = np.float64(jax.jit(MtpLm(config).apply)({"params": params}, batch))
  trunk_DV = np.float64(unembed_matrix(params, config))
  own_DC = np.float64(params["mtp"]["unembed"])
  rows, length = batch.tokens.shape
  sums, counts = np.zeros(3), np.zeros(3)
  for m, b, i in zip(*np.nonzero(mask_MBT), strict=True):
    if objective == "kl" and i + m >= length:
      continue
    target = targets_MBT[m, b, i]
    if m and target not in TOKENS:
      continue
    counts[m] += 1
    log_q = log_softmax(hidden_MBTD[m, b, i] @ (own_DC if m else trunk_DV))
    if m and objective == "kl":
      log_p = log_softmax((hidden_MBTD[0, b, i + m] @ trunk_DV)[TOKENS])
      sums[m] += np.exp(log_p) @ (log_p - log_q)
    else:
      sums[m] -= log_q[list(TOKENS).index(target) if m else target]
  assert rows and 0 < counts[1] < mask_MBT[1].sum()
  sums_found, counts_M, grads = gradient_program(config)(
    params, microbatches(batch), WEIGHTS_M
  )
  np.testing.assert_array_equal(counts_M, counts)
  np.testing.assert_allclose(
    sums_found.weighted_M, WEIGHTS_M * sums / counts, rtol=2e-5
  )
  assert not np.any(grads["mtp"]["draft_tokens"]) and np.any(grads["mtp"]["unembed"])
  assert np.all(loss_coefficients(WEIGHTS_M, mask_MBT) > 0)


def test_drafts_are_counted_by_their_token_ids():
  config, params = reduced()
  batch = packed_batch(config)
  sums = jax.device_get(jax.jit(
    lambda p: evaluate.row_sums(config, p, batch, jnp.ones(VOCAB, int))
  )(params))
  hits = jax.jit(lambda p: evaluate.hit_sums(config, p, batch, 3))(params)["hits"]
  np.testing.assert_array_equal(hits[:, :, 0], sums["agree"])
  hidden_MBTD = jax.jit(MtpLm(config).apply)({"params": params}, batch)
  trunk_BT = np.argmax(hidden_MBTD[0] @ unembed_matrix(params, config), -1)
  length = batch.tokens.shape[1]
  mask_MBT = np.array(future_targets(batch, 2)[1])
  targets_MBT = np.array(future_targets(batch, 2)[0])
  for m in (1, 2):
    draft_BT = TOKENS[np.argmax(hidden_MBTD[m] @ params["mtp"]["unembed"], -1)]
    there = mask_MBT[2, :, : length - 2]
    same = draft_BT[:, : length - 2] == trunk_BT[:, m : length - 2 + m]
    np.testing.assert_array_equal(sums["agree"][:, m - 1], (there & same).sum(1))
    can_BT = mask_MBT[m] & np.isin(targets_MBT[m], TOKENS)
    np.testing.assert_array_equal(sums["count"][:, m], can_BT.sum(1))
    right = can_BT & (draft_BT == targets_MBT[m])
    np.testing.assert_array_equal(sums["correct"][:, m], right.sum(1))


def test_in_decoding_other_tokens_have_no_probability():
  # Ids above 256, which bfloat16 cannot tell apart.
  tokens, vocab = 17 * TOKENS, 700
  config, params = reduced(
    **{"trunk.compute_dtype": "bfloat16", "tokenizer.vocab_size": vocab}
  )
  params["mtp"]["draft_tokens"] = tokens.astype(np.float32)
  weights = unstack(params, config)
  hidden = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
  logits = np.array(unembed(weights, hidden, depth=1))
  others = np.setdiff1d(np.arange(vocab), tokens)
  assert logits.shape == (2, vocab) and np.all(logits[:, others] == -np.inf)
  own_DC = np.float32(weights.draft_unembeds_DV[0])
  np.testing.assert_allclose(logits[:, tokens], hidden @ own_DC, rtol=0.02, atol=0.02)
  assert np.all(np.isfinite(unembed(weights, hidden)))


@pytest.mark.slow
def test_a_run_begins_with_the_frequent_tokens_of_its_text(tmp_path):
  config = run_config(write_texts(tmp_path / "texts"), {
    "mtp.kind": "eagle3", "mtp.depth": 2, "mtp.unembed": "own", "mtp.draft_vocab": 20,
  })
  run = Run(config, tmp_path / "run")
  with contextlib.closing(run.checkpointer), jax.set_mesh(run.mesh):
    params = run.start(run.loader())[0].params
    trunk = {name: tree for name, tree in params.items() if name != "mtp"}
    trunk["unembed"] = {"kernel": 2 * trunk["unembed"]["kernel"]}
    beside = run.initial_state(trunk).params["mtp"]  # Of a trunk that was imported.
  counts_V = token_counts(run.corpus.train_rows(1), config.tokenizer.vocab_size)
  chosen = np.asarray(params["mtp"]["draft_tokens"]).astype(int)
  others = np.setdiff1d(np.arange(len(counts_V)), chosen)
  assert counts_V[chosen].min() >= counts_V[others].max() and counts_V.sum() > 100
  np.testing.assert_array_equal(
    params["mtp"]["unembed"], np.asarray(params["unembed"]["kernel"])[:, chosen]
  )
  np.testing.assert_array_equal(beside["draft_tokens"], chosen)
  np.testing.assert_array_equal(beside["unembed"], 2 * params["mtp"]["unembed"])
  # They stay what they are.
  short = {"train.num_steps": 2, "train.eval_every": 0, "eval.num_rows": 4,
           "eval.line_prompts": 0, "eval.function_prompts": 0}
  train.fit(with_overrides(config, short), tmp_path / "whole", progress=False)
  found = mtp_jax.load(tmp_path / "whole")
  np.testing.assert_array_equal(found.params["mtp"]["draft_tokens"], chosen)
  logits = found.logits("abcd", depth=1)[0]
  assert np.isfinite(logits).sum() == 20
