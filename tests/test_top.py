"""Token-order prediction: what it learns, what it costs, and what is left of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

import mtp_jax
from mtp_jax import accounting, evaluate, train
from mtp_jax.config_rules import validate
from mtp_jax.decode import drafters
from mtp_jax.lm import MtpLm, deployed, zeros_batch
from mtp_jax.predictors import num_drafts, tokens_after_row
from tests.common import (
  VOCAB,
  assert_trees_close,
  batch_of,
  gradient_program,
  microbatches,
  mostly_slow,
  random_params,
  tiny_config,
)
from tests.tiny_runs import read_metrics, run_config, write_texts

LENGTH, WINDOW = 16, 6
OWN = {"mtp.unembed": "own", "mtp.window": WINDOW}
WEIGHTS_M = np.array([1.0, 0.7])


def top_config(**more):
  return tiny_config("top", 1, OWN | more)


def rows(window=WINDOW):
  """Two rows of few tokens, so that they repeat, in documents that end anywhere."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 7, (2, LENGTH + window))
  segments = np.array([[1] * 5 + [2] * 17, [1] * 14 + [0] * 2 + [0] * 6])
  return tokens, segments[:, : LENGTH + window]


def targets_by_hand(tokens, segments, window):
  """Returns p_BTV, softmax of the proximity scores, a row of 0 where there is none."""
  p_BTV = np.zeros((*tokens.shape, VOCAB))[:, :LENGTH]
  for b, row in enumerate(tokens):
    for i in range(LENGTH):
      score_V = np.full(VOCAB, -np.inf)
      for d in range(window, 0, -1):  # From afar, so that the nearest stays.
        j = i + d
        if j < len(row) and segments[b, j] == segments[b, i] != 0:
          score_V[row[j]] = window - d
      if np.any(np.isfinite(score_V)):
        p_BTV[b, i] = softmax(score_V)
  return p_BTV


@pytest.mark.parametrize("window", mostly_slow([1, WINDOW, 3], WINDOW))
def test_loss_and_gradients_are_listnet_on_whole_targets(window):
  tokens, segments = rows()
  p_BTV = targets_by_hand(tokens, segments, window)
  is_there_BT = p_BTV.sum(-1) > 0
  assert 20 < is_there_BT.sum() < 32 and np.any((p_BTV > 0).sum(-1) > 2) == (window > 2)
  with jax.enable_x64(True):
    config = top_config(**{"mtp.window": window, "trunk.compute_dtype": "float64"})
    params = jax.tree.map(jnp.float64, random_params(config))
    batch = batch_of(tokens, segments, LENGTH)

    def plain(params):
      hidden_BTD = MtpLm(config).apply({"params": params}, batch)[0]
      log_q_BTV = jax.nn.log_softmax(hidden_BTD @ params["unembed"]["kernel"])
      nll_BT = -jnp.take_along_axis(log_q_BTV, tokens[:, 1 : 1 + LENGTH, None], -1)
      ranked_BTV = jax.nn.log_softmax(hidden_BTD @ params["mtp"]["unembed"])
      losses = jnp.stack([
        jnp.sum(is_there_BT * nll_BT[..., 0]), -jnp.sum(p_BTV * ranked_BTV)
      ]) / is_there_BT.sum()
      return WEIGHTS_M @ losses, losses

    expected, losses = jax.jit(jax.grad(plain, has_aux=True))(params)
    sums, counts_M, grads = gradient_program(config)(
      params, microbatches(batch), WEIGHTS_M
    )
  np.testing.assert_array_equal(counts_M, 2 * [is_there_BT.sum()])
  np.testing.assert_allclose(
    sums.weighted_M, WEIGHTS_M * np.float64(losses), rtol=1e-12
  )
  assert_trees_close(grads, expected, rtol=1e-9, atol=1e-12)
  assert np.any(expected["mtp"]["unembed"])


def test_the_default_window_is_as_good_as_a_whole_row():
  shares = []
  for window in (32, 120):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, LENGTH + 120))
    shares.append(targets_by_hand(tokens, np.ones_like(tokens), window))
  np.testing.assert_allclose(*shares, rtol=0, atol=1e-13)


def test_records_are_of_the_next_token_and_nothing_is_a_draft():
  config, (tokens, segments) = top_config(), rows()
  params, batch = random_params(config), batch_of(tokens, segments, LENGTH)
  sums = jax.jit(
    lambda p: evaluate.row_sums(config, p, batch, jnp.ones(VOCAB, int))
  )(params)
  hidden_BTD = np.float64(MtpLm(config).apply({"params": params}, batch)[0])
  is_there_BT = targets_by_hand(tokens, segments, 1).sum(-1) > 0
  next_BT1 = tokens[:, 1 : 1 + LENGTH, None]
  matrices = params["unembed"]["kernel"], params["mtp"]["unembed"]
  for m, matrix_DV in enumerate(matrices):
    log_q_BTV = log_softmax(hidden_BTD @ np.float64(matrix_DV), axis=-1)
    nll_BT = -np.take_along_axis(log_q_BTV, next_BT1, -1)[..., 0]
    np.testing.assert_allclose(
      sums["nll"][:, m], (nll_BT * is_there_BT).sum(1), rtol=1e-4
    )
    right_BT = is_there_BT & (log_q_BTV.argmax(-1) == next_BT1[..., 0])
    np.testing.assert_array_equal(sums["correct"][:, m], right_BT.sum(1))
  assert sums["agree"].shape == sums["prefix"].shape == (2, 0)
  found = evaluate.summarize(jax.tree.map(np.float64, sums))
  assert found["teacher_forced_agreement"] == []
  assert found["simulated_accepted_length"]["mean"] == 1
  assert num_drafts(config.mtp) == 0
  assert drafters.own_predictors(config) is drafters.given(0)
  with pytest.raises(ValueError, match="at most the model's 0 extra predictor"):
    drafters.own_predictors(config, 1)


def test_what_is_added_is_one_matrix():
  ntp, top = accounting.count(tiny_config()), accounting.count(top_config())
  assert (top.total - ntp.total, top.deployed) == (16 * VOCAB, ntp.total)
  added = top.train_flops_per_token - ntp.train_flops_per_token
  assert added == 3 * 2 * 16 * VOCAB
  params, batch = random_params(top_config()), batch_of(*rows(), LENGTH)
  left, plain = deployed(params, top_config())
  assert "mtp" not in left and plain.mtp == tiny_config().mtp
  np.testing.assert_array_equal(
    MtpLm(plain).apply({"params": left}, batch)[0],
    MtpLm(top_config()).apply({"params": params}, batch)[0],
  )


def test_rows_come_with_the_tokens_of_a_window():
  config = top_config()
  assert tokens_after_row(config.mtp) == WINDOW
  assert zeros_batch(config, 1).next_tokens.shape == (1, WINDOW)
  # Of other kinds and without a ranking the window counts nothing.
  for kind, depth in (("parallel", 2), ("top", 0)):
    assert tokens_after_row(tiny_config(kind, depth).mtp) == 1 + depth


@pytest.mark.parametrize("overrides, message", [
  ({"mtp.depth": 2}, "mtp.depth must be at most 1 for mtp.kind 'top': one matrix"),
  ({"mtp.unembed": "shared"}, "mtp.unembed must be 'own' for mtp.kind 'top', got"),
  ({"mtp.objective": "kl"}, "mtp.objective must be 'cross_entropy' for mtp.kind 'top'"),
  ({"mtp.feature_weight": 1.0}, "mtp.feature_weight must be 0.0 for mtp.kind 'top'"),
  ({"mtp.window": 0}, "mtp.window must be at least 1, got 0."),
  ({"mtp.window": 129}, r"mtp.window must be at most data.seq_len \(128\), got 129"),
  ({"mtp.kind": "medusa"}, "mtp.window must be 32 unless mtp.kind is 'top'"),
  ({"eval.num_drafts": 1}, "eval.num_drafts must be at most the tokens that the pred"),
])
def test_what_does_not_fit_is_refused(overrides, message):
  large = {"tokenizer.vocab_size": 264, "data.seq_len": 128}
  validate(top_config(**large))
  with pytest.raises(mtp_jax.config.ConfigError, match=message):
    validate(top_config(**large | overrides))


@pytest.mark.slow
def test_a_run_trains_is_evaluated_and_decodes_as_plain_prediction(tmp_path):
  config = run_config(write_texts(tmp_path / "texts"), OWN | {
    "mtp.kind": "top", "mtp.depth": 1, "mtp.weight": 1.0, "train.num_steps": 30,
    "optimizer.learning_rate": 0.02,
  })
  train.fit(config, tmp_path / "run", progress=False)
  records = read_metrics(tmp_path / "run", "train")
  ranked = [x["weighted_loss"][1] for x in records]
  assert all(len(x["loss"]) == 2 for x in records) and ranked[-1] < ranked[0] - 0.2
  result = json.loads((tmp_path / "run/eval.json").read_text())
  assert len(result["depth_loss"]) == 2 and result["teacher_forced_agreement"] == []
  model = mtp_jax.load(tmp_path / "run")
  found = model.generate("def f", 8, stop=[])
  assert not np.any(found.source > 0) and model.losses("def f").shape[0] == 2
