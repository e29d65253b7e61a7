"""Depth 0 and lambda 0 give back the baseline, and so does deleting the predictors."""

import functools

import jax
import numpy as np
import pytest

from mtp_jax import accounting
from mtp_jax.lm import MtpLm, deployed, unembed_matrix, zeros_batch
from mtp_jax.optimizer import make_optimizer
from mtp_jax.sharding import unbox
from mtp_jax.train_step import loss_and_grads
from tests.common import (
  KINDS,
  SHARED,
  TRUNKS,
  assert_trees_close,
  microbatches,
  mostly_slow,
  packed_batch,
  random_params,
  tiny_config,
)

# Fusion and algebraic rewriting round differently around other code; without them every
# operation of two programs is the same, and so is every bit.
exact_jit = functools.partial(
  jax.jit,
  compiler_options={"xla_disable_hlo_passes": "fusion,cpu-instruction-fusion,algsimp"},
)
MAIN_ONLY = np.float32([1, 0, 0, 0])


@functools.cache
def initial_program(config):
  return jax.jit(
    lambda key: unbox(MtpLm(config).init(key, zeros_batch(config))["params"])
  )


def initial_params(config, seed=0):
  return initial_program(config)(jax.random.key(seed))


def loss_and_gradient(config, params, weights_M):
  # One batch for every depth: what follows a row may be more than a depth needs.
  batch = microbatches(packed_batch(tiny_config("sequential", 3)))
  return exact_jit(functools.partial(loss_and_grads, config))(params, batch, weights_M)


def extended(config, plain_params):
  """Returns parameters of `config` whose deployed model is that of `plain_params`."""
  params = random_params(config, seed=1) | {
    name: tree for name, tree in plain_params.items() if name != "trunk"
  }
  blocks = plain_params["trunk"]["blocks"]
  if config.mtp.kind != "parallel":
    return params | {"trunk": {"blocks": blocks}}
  heads = jax.tree.map(
    lambda layers, heads: np.concatenate([layers[-1:], heads[1:]]),
    blocks,
    params["mtp"]["heads"],
  )
  trunk = {"blocks": jax.tree.map(lambda layers: layers[:-1], blocks)}
  return params | {"trunk": trunk, "mtp": {"heads": heads}}


def assert_trees_identical(actual, expected):
  assert_trees_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def baseline_init():
  return initial_params(tiny_config())


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("kind", ["sequential", "linear", "medusa"])
def test_depth_0_has_the_parameters_of_the_baseline(kind, trunk):
  found, expected = (
    accounting.abstract_params(tiny_config(k, 0, TRUNKS[trunk]))
    for k in (kind, "none")
  )
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert jax.tree.leaves(found) == jax.tree.leaves(expected)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_parallel_heads_at_depth_0_are_the_baseline(trunk):
  config = tiny_config("parallel", 0, TRUNKS[trunk])
  params, batch = random_params(config), packed_batch(config)
  plain_params, plain = deployed(params, config)
  assert plain == tiny_config("none", 0, TRUNKS[trunk])
  assert accounting.count(config).total == accounting.count(plain).total
  np.testing.assert_allclose(
    jax.jit(MtpLm(config).apply)({"params": params}, batch),
    jax.jit(MtpLm(plain).apply)({"params": plain_params}, batch),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize("kind", mostly_slow(
  [kind for kind, _ in KINDS if kind != "none"], "sequential"
))
def test_initial_trunk_does_not_depend_on_the_predictors(kind, baseline_init):
  params = initial_params(tiny_config(kind, 3))
  del params["mtp"]
  # Parallel heads deploy their first head, so their trunk is one layer shorter.
  layers = 2 if kind == "parallel" else 3
  trunk = jax.tree.map(lambda x: x[:layers], baseline_init["trunk"])
  assert_trees_identical(params, baseline_init | {"trunk": trunk})


def test_initial_parameters_depend_on_the_seed(baseline_init):
  other = initial_params(tiny_config(), seed=1)["unembed"]["kernel"]
  assert not np.array_equal(other, baseline_init["unembed"]["kernel"])


@functools.cache
def baseline_gradient(trunk):
  """Returns parameters, loss sums and gradient of the next-token model."""
  config = tiny_config("none", 0, TRUNKS[trunk])
  params = random_params(config)
  sums, _, grads = loss_and_gradient(config, params, MAIN_ONLY[:1])
  return params, sums, grads


@pytest.mark.parametrize(
  "kind, trunk",
  mostly_slow(
    [
      ("sequential", "llama"),
      ("sequential", "gpt2"),
      ("parallel", "llama"),
      ("linear", "llama"),
      ("medusa", "llama"),
      ("eagle3", "llama"),
    ],
    ("sequential", "llama"),
  ),
)
def test_lambda_0_gives_the_gradients_of_the_baseline_bit_for_bit(kind, trunk):
  plain_params, plain_sums, expected = baseline_gradient(trunk)
  depth = 1 if kind == "eagle3" else 3  # Steps that are unrolled compile slowly.
  config = tiny_config(kind, depth, TRUNKS[trunk])
  params = extended(config, plain_params)
  sums, _, grads = loss_and_gradient(config, params, MAIN_ONLY[: 1 + depth])
  assert sums.total == plain_sums.total
  extra = jax.tree.leaves(grads["mtp"])
  if kind == "parallel":
    extra = [g[1:] for g in extra]  # The first head is the last layer of the baseline.
  assert extra and not any(np.any(g) for g in extra)
  assert_trees_identical(deployed(grads, config)[0], expected)


@pytest.mark.parametrize("kind, options", mostly_slow(
  [
    ("sequential", {"mtp.objective": "kl"}),
    ("sequential", {}),
    ("linear", {}),
    ("medusa", {"mtp.unembed": "own"}),
    ("eagle", {"mtp.feature_weight": 0.5}),
    ("eagle3", {}),
  ],
  ("sequential", {"mtp.objective": "kl"}),
))
def test_detached_predictors_learn_and_the_trunk_has_the_gradient_of_the_baseline(
  kind, options
):
  plain_params, plain_sums, expected = baseline_gradient("llama")
  depth = 1 if kind == "eagle3" else 3
  config = tiny_config(kind, depth, options | {"mtp.detach": True})
  params = extended(config, plain_params)
  weights_M = np.float32([1, 0.5, 0.3, 0.2])[: 1 + depth]
  sums, _, grads = loss_and_gradient(config, params, weights_M)
  # Without the main loss nothing but the predictors has a gradient.
  _, _, extra = loss_and_gradient(config, params, weights_M * (weights_M < 1))
  assert all(np.any(g) for g in jax.tree.leaves(extra.pop("mtp")))
  assert not any(np.any(g) for g in jax.tree.leaves(extra))
  assert sums.total > plain_sums.total
  assert_trees_identical(deployed(grads, config)[0], expected)


def test_the_gradient_of_detached_predictors_does_not_scale_that_of_the_trunk():
  """Clipping has a norm of its own for either, however large the other is."""
  axes = {"embed": ("embed",), "mtp": ("embed",)}
  config = tiny_config(overrides={"optimizer.eps": 1.0}).optimizer  # Sizes matter.
  updates = []
  for size in (0.0, 1e6):
    grads = {"embed": np.float32([3, 4]), "mtp": np.float32([size, 0])}
    chain = make_optimizer(config, axes, clips_apart=True)
    found, _ = chain.update(grads, chain.init(grads), grads)
    updates.append(np.asarray(found["embed"]))
  np.testing.assert_array_equal(*updates)


def arms():
  for kind, depth in KINDS:
    yield kind, depth, {}
    if kind in ("parallel", "sequential", "eagle3"):
      yield kind, depth, {"mtp.arm": "shortened", "trunk.num_layers": 5}
    if depth:
      yield kind, depth, {"mtp.arm": "flops"}
  yield "sequential", 3, SHARED | {"mtp.arm": "shortened"}


@pytest.mark.parametrize("kind, depth, options", mostly_slow(
  arms(), ("parallel", 3, {}), ("sequential", 3, {}), ("medusa", 3, {})
))
def test_deployed_model_has_the_next_token_states_of_the_full_one(kind, depth, options):
  config = accounting.resolve(tiny_config(kind, depth, options))
  params, batch = random_params(config), packed_batch(config)
  plain_params, plain = deployed(params, config)
  assert plain.mtp.kind == "none" and "mtp" not in plain_params
  np.testing.assert_allclose(
    jax.jit(MtpLm(plain).apply)({"params": plain_params}, batch)[0],
    jax.jit(MtpLm(config).apply)({"params": params}, batch)[0],
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_array_equal(
    unembed_matrix(plain_params, plain), unembed_matrix(params, config)
  )
