"""Schedules by hand, who is scaled, decayed and orthogonalised, and clipping."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from experiments import base
from mtp_jax import accounting
from mtp_jax.config import from_config_dict, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.optimizer import (
  apply,
  learning_rate_scales,
  make_optimizer,
  schedule_at,
)
from mtp_jax.sharding import logical_axes
from tests.common import TRUNKS, mostly_slow, random_params, tiny_config

BASE = tiny_config("sequential", 2).optimizer


def schedule(progress, **changes):
  config = dataclasses.replace(BASE, **changes)
  return [float(schedule_at(config, np.float32(p))) for p in progress]


def test_cosine_schedule_by_hand():
  # Warm-up to 0.2; halfway down the cosine at 0.6: (1 + 0.1) / 2; a quarter at 0.4.
  quarter = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4))
  found = schedule(
    (0, 0.1, 0.2, 0.4, 0.6, 1),
    schedule="cosine",
    warmup_fraction=0.2,
    final_fraction=0.1,
  )
  np.testing.assert_allclose(found, [0, 0.5, 1, quarter, 0.55, 0.1], rtol=1e-5)


def test_a_constant_rate_after_the_warmup():
  constant = {"optimizer.schedule": "cosine", "optimizer.final_fraction": 1.0}
  validate(with_overrides(from_config_dict(base.get_config()), constant))
  found = schedule((0.05, 0.1, 0.5, 1), warmup_fraction=0.1, final_fraction=1.0)
  assert found == [0.5, 1, 1, 1]


def test_warmup_stable_decay_schedule_by_hand():
  found = schedule(
    (0, 0.05, 0.1, 0.5, 0.8, 0.9, 1),
    schedule="wsd",
    warmup_fraction=0.1,
    decay_fraction=0.2,
    final_fraction=0.5,
  )
  np.testing.assert_allclose(found, [0, 0.5, 1, 1, 1, 0.75, 0.5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_no_warmup_starts_at_the_peak(kind):
  found = schedule((0, 1), schedule=kind, warmup_fraction=0.0, final_fraction=0.25)
  np.testing.assert_allclose(found, [1, 0.25], rtol=1e-5)


def parts(config):
  """Returns parameters, logical axes and the optimizer of a config."""
  axes = logical_axes(accounting.abstract_params(config))
  return random_params(config), axes, make_optimizer(config.optimizer, axes)


def first_update(config, params, grads):
  _, _, chain = parts(config)
  return jax.device_get(
    jax.jit(lambda g, p: chain.update(g, chain.init(p), p)[0])(grads, params)
  )


def name_of(path):
  return ".".join(key.key for key in path)


def flat(tree):
  return {name_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def is_matrix(name):
  return not name.endswith(("bias", "scale"))


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("kind, hidden", [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_hidden_and_output_matrices_follow_the_width(kind, hidden, trunk):
  # Four times the base width: 1/4 for Adam, and for Muon 1/2 on what it updates.
  options = {"optimizer.kind": kind, "optimizer.base_width": 4, "trunk.embed_dim": 16}
  config = tiny_config("sequential", 2, TRUNKS[trunk] | options)
  _, axes, _ = parts(config)
  for name, scale in flat(learning_rate_scales(config, axes)).items():
    if name == "unembed.kernel":
      assert scale == 1 / 4
    elif name.startswith(("trunk", "mtp")) and is_matrix(name):
      assert scale == hidden, name
    else:
      assert scale == 1, name


@pytest.mark.parametrize(
  "kind, trunk", [("adamw", "llama"), ("muon", "gpt2")]
)
def test_weight_decay_acts_on_matrices_alone(kind, trunk):
  options = {"optimizer.kind": kind, "optimizer.weight_decay": 0.1}
  config = tiny_config("sequential", 2, TRUNKS[trunk] | options)
  params, _, _ = parts(config)
  updates = first_update(config, params, jax.tree.map(np.zeros_like, params))
  decayed = flat(params)
  for name, update in flat(updates).items():
    expected = -0.1 * decayed[name] if is_matrix(name) else np.zeros_like(update)
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_adamw_is_that_of_optax():
  config = tiny_config("sequential", 2, {"optimizer.clip_norm": 1e9})
  params, axes, chain = parts(config)
  c = config.optimizer
  is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
  mask = jax.tree.map(lambda names: "norm" not in names, axes, is_leaf=is_axes)
  reference = optax.adamw(
    1.0, c.beta1, c.beta2, c.eps, weight_decay=c.weight_decay, mask=mask
  )

  def two_updates(optimizer, grads, params):
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    halved = jax.tree.map(lambda g: g / 2, grads)
    return optimizer.update(halved, state, params)[0]

  grads = random_params(config, seed=1)
  found, expected = (
    jax.jit(functools.partial(two_updates, optimizer))(grads, params)
    for optimizer in (chain, reference)
  )
  for name, update in flat(found).items():
    np.testing.assert_allclose(update, flat(expected)[name], 1e-5, 1e-6, err_msg=name)


@pytest.mark.parametrize("trunk", mostly_slow(TRUNKS, "llama"))
def test_muon_orthogonalises_hidden_matrices_and_adam_updates_the_rest(trunk):
  options = {"optimizer.kind": "muon", "optimizer.weight_decay": 0.0}
  config = tiny_config("sequential", 2, TRUNKS[trunk] | options)
  params, grads = random_params(config), random_params(config, seed=1)
  updates = flat(first_update(config, params, grads))
  d, heads, head = 16, 4, 4
  matrices = {  # Name -> (inputs, outputs): heads are split dimensions of a matrix.
    "trunk.blocks.attention.query": (d, heads * head),
    "trunk.blocks.attention.key": (d, config.trunk.num_kv_heads * head),
    "trunk.blocks.attention.out": (heads * head, d),
    "trunk.blocks.mlp.up": (d, 24),
    "trunk.blocks.mlp.down": (24, d),
    "mtp.modules.projection": (2 * d, d),
    "mtp.modules.block.mlp.up": (d, 24),
  }
  for name, (inputs, outputs) in matrices.items():
    stack = updates[name].reshape(-1, inputs, outputs)
    assert len(stack) == (3 if name.startswith("trunk") else 2)
    # Newton-Schulz stops near, not at, 1: singular values between about 0.5 and 1.5.
    values = np.linalg.svd(stack, compute_uv=False)
    values /= 0.2 * max(inputs, outputs) ** 0.5
    assert 0.3 < values.min() and values.max() < 1.4, (name, values)
  for name, update in updates.items():
    if not (name.startswith(("trunk", "mtp")) and is_matrix(name)):
      # The first step of Adam is the sign of the gradient, up to Nesterov's factor.
      size = np.abs(update)
      np.testing.assert_allclose(size, size.max(), rtol=1e-2, err_msg=name)
      assert np.all(np.sign(update) == -np.sign(flat(grads)[name])), name


def test_gradients_are_clipped_to_the_global_norm():
  # Adam's direction hides the size of a gradient unless eps is larger than it.
  options = {"optimizer.eps": 1e6, "optimizer.weight_decay": 0.0}
  config = tiny_config("none", 0, options)
  params, grads = random_params(config), random_params(config, seed=1)
  norm = float(optax.tree.norm(grads))
  assert norm > 2
  for limit, factor in ((1.0, 1 / norm), (2.0 * norm, 1.0)):
    clipped = dataclasses.replace(config.optimizer, clip_norm=limit)
    updates = flat(
      first_update(dataclasses.replace(config, optimizer=clipped), params, grads)
    )
    for name, grad in flat(grads).items():
      np.testing.assert_allclose(updates[name] * 1e6, -factor * grad, rtol=1e-4)


def test_apply_adds_the_scaled_update_in_the_dtype_of_the_parameter():
  params = {"a": np.float32([1.0, 2.0]), "b": jax.numpy.bfloat16([1.0])}
  updates = {"a": np.float32([10.0, -10.0]), "b": jax.numpy.bfloat16([2.0])}
  found = apply(params, updates, np.float32(0.1), {"a": 0.5, "b": 1.0})
  np.testing.assert_allclose(found["a"], [1.5, 1.5])
  assert found["b"].dtype == jax.numpy.bfloat16
  np.testing.assert_allclose(np.float32(found["b"]), [1.2], rtol=0.01)
