"""What every depth sees, by the gradient of each loss to each embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.lm import MtpLm, unembed_matrix
from mtp_jax.predictors import kind_of
from mtp_jax.targets import future_targets
from tests.common import (
  INPUTS,
  KINDS,
  SHARED,
  TRUNKS,
  batch_of,
  mostly_slow,
  random_params,
  tiny_config,
)

LENGTH, DEPTH = 12, 3
# The third document goes on after the row; every position has its own token.
SEGMENTS = np.repeat([1, 2, 3], [5, 4, 7])
PLACES = np.arange(len(SEGMENTS))
TOKENS = np.random.default_rng(0).permutation(len(SEGMENTS))
# Every kind on both trunks; what modules read, which no trunk knows, on one of them.
CASES = {
  f"{kind}-{trunk}": (kind, {}, trunk) for kind, _ in KINDS for trunk in TRUNKS
} | {
  f"sequential-{name}": ("sequential", options, trunk)
  for name, options, trunk in (
    ("shared", SHARED, "gpt2"),
    # What is chosen has no gradient to see it by: `own` has a test of its own.
    ("trunk", INPUTS["trunk"], "llama"),
    ("shifted", INPUTS["shifted"], "gpt2"),
    ("before", INPUTS["before"], "llama"),
    ("trunk-before", INPUTS["trunk-before"], "gpt2"),
    ("none", INPUTS["none"], "llama"),
    ("bare", INPUTS["bare"], "gpt2"),
    ("shifted-none", INPUTS["shifted"] | INPUTS["none"], "llama"),
  )
}


def influence(config, batch):
  """Returns |d loss[m, i] / d embedding[u]| as [M, T, T + M], and the mask."""
  params = random_params(config)
  unembed_DV = unembed_matrix(params, config)
  targets_MBT, mask_MBT = future_targets(batch, config.mtp.depth)

  def losses(table_VD):
    hidden_MBTD = MtpLm(config).apply(
      {"params": params | {"embed": {"embedding": table_VD}}}, batch
    )
    log_probs = jax.nn.log_softmax(hidden_MBTD @ unembed_DV)
    nll_MBT = -jnp.take_along_axis(log_probs, targets_MBT[..., None], -1)[..., 0]
    return jnp.where(mask_MBT, nll_MBT, 0.0)[:, 0]

  jacobian_MTVD = jax.jit(jax.jacrev(losses))(params["embed"]["embedding"])
  norms_MTV = np.abs(jacobian_MTVD).max(-1)
  in_batch = np.isin(np.arange(norms_MTV.shape[-1]), TOKENS)
  assert not norms_MTV[..., ~in_batch].any()
  return norms_MTV[..., TOKENS], np.asarray(mask_MBT[:, 0])


def newest_in_trunk(config, m, i):
  """Returns the place of the last token that the trunk's state of depth m has seen."""
  if m == 0 or config.mtp.hidden != "trunk_shifted":
    return i
  return max(i, min(i + m - 1, LENGTH - 1))  # The trunk ends with the row.


@pytest.mark.parametrize("case", mostly_slow(
  CASES, "none-llama", "parallel-gpt2", "sequential-llama", "sequential-shifted",
))
def test_a_loss_sees_its_document_up_to_its_place_and_nothing_else(case):
  kind, options, trunk = CASES[case]
  depth = 0 if kind == "none" else DEPTH
  overrides = TRUNKS[trunk] | options | {"data.seq_len": LENGTH}
  config = tiny_config(kind, depth, overrides)
  batch = batch_of([TOKENS], [SEGMENTS], LENGTH)
  found_MTU, mask_MT = influence(config, batch)
  for m in range(1 + depth):
    # Depth m of a chain is given the m tokens before the one it predicts.
    ahead = kind_of(config.mtp).reads_ahead(config.mtp, m) if m else 0
    for i in range(LENGTH):
      same_document = SEGMENTS == SEGMENTS[i]
      newest = i + ahead if config.mtp.fed == "true" else newest_in_trunk(config, m, i)
      may_see = same_document & (PLACES <= newest) & mask_MT[m, i]
      if config.mtp.hidden == "trunk" and config.mtp.fed == "true":
        # Token u is fed to depth m at u - m; no state of depth m - 1 brings it to i.
        may_see &= (PLACES <= i) | (PLACES - m >= np.argmax(same_document))
      np.testing.assert_array_equal(found_MTU[m, i] > 0, may_see, f"depth {m} at {i}")


@pytest.mark.parametrize("hidden", ["chained", "trunk_shifted"])
def test_own_tokens_show_nothing_of_the_true_ones(hidden):
  """Row u and the last row differ in token u alone, and their states from there on."""
  options = INPUTS["own"] | {"mtp.hidden": hidden, "data.seq_len": LENGTH}
  config = tiny_config("sequential", DEPTH, options)
  rows = np.tile(TOKENS, (len(TOKENS) + 1, 1))
  rows[PLACES, PLACES] += 20
  batch = batch_of(rows, np.tile(SEGMENTS, (len(rows), 1)), LENGTH)
  hidden_MBTD = jax.jit(MtpLm(config).apply)({"params": random_params(config)}, batch)
  differs_MBT = np.any(hidden_MBTD != hidden_MBTD[:, -1:], axis=-1)
  for m in range(1 + DEPTH):
    for u, segment in enumerate(SEGMENTS):
      for i in range(LENGTH):
        if i + m + 1 < len(SEGMENTS) and SEGMENTS[i] == SEGMENTS[i + m + 1]:
          may_see = segment == SEGMENTS[i] and u <= newest_in_trunk(config, m, i)
          assert differs_MBT[m, u, i] == may_see, (m, u, i)
