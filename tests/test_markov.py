"""The Markov head of parallel and Medusa heads: losses, size, and how it drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax import accounting, evaluate
from mtp_jax.config_rules import validate
from mtp_jax.lm import MtpLm, draft_tokens, unembed_matrix
from mtp_jax.predictors import contract
from mtp_jax.sharding import unbox
from mtp_jax.targets import future_targets
from tests.common import (
  VOCAB,
  assert_trees_close,
  gradient_program,
  microbatches,
  mostly_slow,
  packed_batch,
  random_params,
  tiny_config,
)

DEPTH, RANK = 2, 5
MARKOV = {"mtp.markov_rank": RANK}
WEIGHTS_M = np.array([1, 0.5, 0.3])
FLOAT64 = {"trunk.compute_dtype": "float64"}


def plain_loss(config, params, batch):
  """The definition, on whole logits: (weighted losses, counts, mask) of the depths.

  A table [V, V], the product of the factors, has a row for the token before the target.
  """
  hidden_MBTD = MtpLm(config).apply({"params": params}, batch)
  whole_BS = jnp.concatenate([batch.tokens, batch.next_tokens], axis=1)
  table_VV = params["mtp"]["markov_previous"] @ params["mtp"]["markov_next"]
  dim, length = config.trunk.embed_dim, batch.tokens.shape[1]
  targets_MBT, mask_MBT = future_targets(batch, config.mtp.depth)
  if config.mtp.objective != "cross_entropy":
    inside_MT = jnp.arange(1 + DEPTH)[:, None] + jnp.arange(length) < length
    mask_MBT &= inside_MT[:, None]
  trunk_BTV = hidden_MBTD[0, ..., :dim] @ params["unembed"]["kernel"]
  losses = []
  for m in range(1 + config.mtp.depth):
    own = m and config.mtp.unembed == "own"
    matrix_DV = params["mtp"]["unembed"][m - 1] if own else params["unembed"]["kernel"]
    logits_BTV = hidden_MBTD[m, ..., :dim] @ matrix_DV
    if m:
      logits_BTV += table_VV[whole_BS[:, m : m + length]]
    log_q_BTV = jax.nn.log_softmax(logits_BTV)
    loss_BT = -jnp.take_along_axis(log_q_BTV, targets_MBT[m][..., None], -1)[..., 0]
    if m and config.mtp.objective == "kl":
      p_BTV = jax.lax.stop_gradient(jax.nn.softmax(jnp.roll(trunk_BTV, -m, axis=1)))
      loss_BT = jnp.sum(p_BTV * (jnp.log(p_BTV) - log_q_BTV), axis=-1)
    if m and config.mtp.feature_weight:
      own_BTD, trunk_BTD = hidden_MBTD[m, ..., :dim], hidden_MBTD[0, ..., :dim]
      trunk_BTD = jax.lax.stop_gradient(jnp.roll(trunk_BTD, -m, axis=1))
      distance_BT = jnp.mean(optax.losses.huber_loss(own_BTD, trunk_BTD), axis=-1)
      loss_BT += config.mtp.feature_weight * distance_BT
    losses.append(jnp.sum(jnp.where(mask_MBT[m], loss_BT, 0.0)))
  counts_M = jnp.sum(mask_MBT, axis=(1, 2))
  weighted_M = WEIGHTS_M * jnp.stack(losses) / counts_M
  return jnp.sum(weighted_M), (weighted_M, counts_M)


@pytest.mark.parametrize("kind, options", mostly_slow(
  [
    ("parallel", {}),
    ("parallel", {"mtp.objective": "kl", "mtp.feature_weight": 0.5}),
    ("medusa", {}),
    ("medusa", {"mtp.unembed": "own"}),
  ],
  ("parallel", {}),
))
def test_losses_and_gradients_are_those_of_a_whole_table(kind, options):
  with jax.enable_x64(True):
    config = tiny_config(kind, DEPTH, MARKOV | FLOAT64 | options)
    params = jax.tree.map(jnp.float64, random_params(config))
    batch = packed_batch(config, padding=True)
    sums, counts_M, grads = gradient_program(config)(
      params, microbatches(batch), WEIGHTS_M
    )
    plain = jax.jit(jax.grad(
      lambda p: plain_loss(config, p, batch), has_aux=True
    ))
    expected, (weighted_M, expected_M) = plain(params)
  np.testing.assert_array_equal(counts_M, expected_M)
  np.testing.assert_allclose(sums.weighted_M, weighted_M, rtol=1e-12)
  assert_trees_close(grads, expected, rtol=1e-9, atol=1e-12)
  assert all(np.any(x) for x in jax.tree.leaves(expected["mtp"]))


@pytest.mark.slow
def test_training_begins_as_without_the_table():
  batch = packed_batch(tiny_config("parallel", DEPTH))
  found = []
  for options in ({}, MARKOV):
    config = tiny_config("parallel", DEPTH, options)
    init = lambda: MtpLm(config).init(jax.random.key(0), batch)["params"]  # noqa: B023,E731
    params = unbox(jax.jit(init)())
    found.append(gradient_program(config)(
      params, microbatches(batch), np.float32(WEIGHTS_M)
    ))
  (plain, counts_M, plain_grads), (markov, markov_counts_M, grads) = found
  np.testing.assert_array_equal(counts_M, markov_counts_M)
  np.testing.assert_allclose(plain.weighted_M, markov.weighted_M, rtol=1e-6)
  assert np.any(grads["mtp"]["markov_next"])
  grads["mtp"] = {"heads": grads["mtp"]["heads"]}
  assert_trees_close(grads, plain_grads, rtol=1e-4, atol=1e-6)


def test_evaluation_reads_the_true_token_before_the_target():
  config = tiny_config("parallel", DEPTH, MARKOV)
  params, batch = random_params(config), packed_batch(config)
  sums = jax.jit(
    lambda p: evaluate.row_sums(config, p, batch, jnp.ones(VOCAB, int))
  )(params)
  _, (weighted_M, counts_M) = jax.jit(lambda p: plain_loss(config, p, batch))(params)
  np.testing.assert_array_equal(sums["count"].sum(0), counts_M)
  np.testing.assert_allclose(
    sums["nll"].sum(0) / counts_M, weighted_M / WEIGHTS_M, rtol=2e-5
  )
  hits = jax.jit(lambda p: evaluate.hit_sums(config, p, batch, 2))(params)["hits"]
  np.testing.assert_array_equal(hits[:, :, 0], sums["agree"])
  assert np.any(sums["agree"]) and draft_tokens(params, config) is None
  assert unembed_matrix(params, config).shape == (16, VOCAB)
  assert unembed_matrix(params, config, 2).shape == (16 + RANK, VOCAB)


@pytest.mark.parametrize("kind", ["parallel", "medusa"])
def test_parameters_flops_and_contract(kind):
  plain, markov = (
    tiny_config(kind, DEPTH, {"trunk.num_layers": 3} | o) for o in ({}, MARKOV)
  )
  before, after = accounting.count(plain), accounting.count(markov)
  assert after.total - before.total == 2 * VOCAB * RANK
  assert (after.deployed, after.trunk) == (before.deployed, before.trunk)
  flops = after.train_flops_per_token - before.train_flops_per_token
  assert flops == 3 * 2 * DEPTH * RANK * VOCAB
  assert set(contract(markov)) - set(contract(plain)) == {"added_logits"}


@pytest.mark.parametrize("kind, depth", [
  ("sequential", 2), ("linear", 2), ("parallel", 0), ("none", 0)
])
def test_other_kinds_have_none(kind, depth):
  large = {"tokenizer.vocab_size": 264, "data.seq_len": 128}
  with pytest.raises(Exception, match=r"mtp.markov_rank must be 0 unless .*, got 5"):
    validate(tiny_config(kind, depth, large | MARKOV))
  for kind in ("parallel", "medusa"):
    validate(tiny_config(kind, 2, large | MARKOV))
