"""Eight devices give the loss and gradients of one, whatever the mesh splits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from mtp_jax import accounting, optimizer, sharding
from mtp_jax.config import ConfigError
from mtp_jax.program import program_config
from mtp_jax.sharding import (
  AXIS_RULES,
  constrain,
  logical_axes,
  make_mesh,
  partition_spec,
  put_batch,
  tree_shardings,
)
from mtp_jax.targets import future_targets
from mtp_jax.train_state import Hyperparameters, state_shardings
from mtp_jax.train_step import programs
from tests.common import (
  EXPERTS,
  GPT2,
  INPUTS,
  KINDS,
  LATENT,
  assert_trees_close,
  gradient_program,
  microbatches,
  mostly_slow,
  packed_batch,
  random_params,
  tiny_config,
)

WEIGHTS_M = np.float32([1, 0.5, 0.7, 0.3])
MIXED = {"fsdp": 2, "tensor": 2, "context": 2}
MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"context": 8}, MIXED)
# Parallel heads run on the GPT-2 trunk, so that its biases are split too.
MODELS = {"sequential": {"trunk.num_layers": 1}, "parallel": GPT2}
OTHERS = {
  "shifted states and own tokens": ("sequential", INPUTS["shifted"] | INPUTS["own"]),
  "markov": ("parallel", {"mtp.markov_rank": 6}),
  "medusa": ("medusa", {"trunk.num_layers": 1}),
  "eagle": ("eagle", {"trunk.num_layers": 1}),
  "eagle3": ("eagle3", GPT2 | {"trunk.num_layers": 1}),
  "peagle": ("peagle", GPT2 | {"trunk.num_layers": 1}),
  "dflash": ("dflash", GPT2 | {"trunk.num_layers": 1}),
}


def config_on(kind, axes, overrides=None):
  values = {"trunk.num_kv_heads": 4, "trunk.remat": "none", "trunk.num_layers": 2}
  values |= MODELS.get(kind, {}) | {f"mesh.{axis}": size for axis, size in axes.items()}
  return tiny_config(kind, 3, values | (overrides or {}))


def mesh_of(config, axes):
  return make_mesh(config.mesh, jax.devices()[: np.prod([*axes.values(), 1])])


def run_on(kind, axes, overrides=None, scale=1.0):
  """Returns sums, counts and gradients with parameters and batch laid out on a mesh.

  All parameters are taken times `scale`.
  """
  config = config_on(kind, axes, overrides)
  mesh = mesh_of(config, axes)
  layout = tree_shardings(mesh, logical_axes(accounting.abstract_params(config)))
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x: x * np.float32(scale), random_params(config))
    params = jax.device_put(params, layout)
    batch = put_batch(mesh, microbatches(packed_batch(config)), ("microbatch",))
    return jax.device_get(gradient_program(config)(params, batch, WEIGHTS_M))


on_one_device = functools.cache(lambda kind: run_on(kind, {}))


@pytest.mark.parametrize(
  "axes", mostly_slow(MESHES, MIXED), ids=lambda axes: "-".join(axes)
)
@pytest.mark.parametrize("kind", mostly_slow(MODELS, "sequential"))
def test_loss_and_every_gradient_equal_those_of_one_device(kind, axes):
  assert_trees_close(run_on(kind, axes), on_one_device(kind), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_predictors_equal_those_of_one_device(name):
  kind, options = OTHERS[name]
  # At full scale, an ulp of the parameters changes EAGLE's gradients by up to 2e-4.
  found, expected = (run_on(kind, axes, options, 0.5) for axes in (MIXED, {}))
  assert_trees_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_batch_has_targets_beyond_the_next_shard():
  # Two positions a shard: without targets that lie two shards on, the comparison above
  # would not see a shift that goes wrong there.
  batch = packed_batch(config_on("sequential", {"context": 8}))
  _, mask_MBT = future_targets(batch, 3)
  shard = np.arange(16 + 4) // 2
  beyond = shard[4:] - shard[:16] >= 2
  assert mask_MBT[3][:, beyond].sum() > 10


@pytest.mark.slow
def test_one_training_step_on_a_mesh_equals_one_on_a_single_device():
  options = {"optimizer.kind": "muon", "optimizer.eps": 1e-2, "mtp.weight": 1.0}

  def step_on(axes):
    config = config_on("sequential", axes, options)
    mesh = mesh_of(config, axes)
    batch = microbatches(packed_batch(config), 2)
    hyper = Hyperparameters(*jnp.float32([0.1, 1.0, 10.0]))
    with jax.set_mesh(mesh):
      compiled = programs(program_config(config), mesh)
      state = compiled.init(jnp.int32(0))
      before = jax.device_get(state.params)
      batch = put_batch(mesh, batch, ("microbatch",))
      state, report = compiled.step(state, batch, hyper, jnp.bool_(True))
      stays = lambda x, layout: x.sharding.is_equivalent_to(layout, x.ndim)  # noqa: E731
      assert jax.tree.all(jax.tree.map(stays, state, compiled.shardings))
      return before, jax.device_get((state.params, report))

  expected_init, expected = step_on({})
  found_init, found = step_on({"data": 2, "fsdp": 2, "tensor": 2})
  assert_trees_close(found_init, expected_init, rtol=1e-6, atol=1e-7)
  assert_trees_close(found, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_lies_as_its_parameters_do(kind):
  config = config_on("sequential", MIXED, {"optimizer.kind": kind})
  axes = logical_axes(accounting.abstract_params(config))
  chain = optimizer.make_optimizer(config.optimizer, axes)
  state = state_shardings(config, chain, mesh_of(config, MIXED))
  by_path = dict(jax.tree_util.tree_leaves_with_path(state.params))
  assert any("fsdp" in s.spec for s in by_path.values())
  assert any("tensor" in s.spec for s in by_path.values())
  for moment in ("mu", "nu"):
    trees = optax.tree_utils.tree_get_all_with_path(state.opt_state, moment)
    found = {}
    for _, tree in trees:
      found |= dict(jax.tree_util.tree_leaves_with_path(tree))
    assert found == {path: by_path[path] for path in found}
    assert len(found) == len(by_path) or (kind, moment) == ("muon", "nu")


def test_an_unknown_axis_name_raises():
  with pytest.raises(KeyError, match="'hedas' is not in AXIS_RULES"):
    partition_spec(("embed", "hedas"))
  with pytest.raises(KeyError, match="'hedas' is not in AXIS_RULES"):
    constrain(jnp.zeros((2, 2)), "batch", "hedas")  # Also without a mesh.


def test_two_dimensions_on_one_mesh_axis_raise():
  with pytest.raises(ValueError, match=r"'batch', 'embed'.*one mesh axis twice"):
    partition_spec(("batch", "embed"))


def test_the_look_up_follows_the_table():
  assert partition_spec(("batch", "seq", None)) == PartitionSpec(
    ("data", "fsdp", "expert"), "context", None
  )
  assert partition_spec(("embed", "heads", "head_dim")) == PartitionSpec(
    "fsdp", "tensor", None
  )


def test_axes_that_do_not_fit_the_rank_raise():
  with pytest.raises(ValueError, match=r"do not fit shape \(2, 3\)"):
    constrain(jnp.zeros((2, 3)), "batch")


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  config = tiny_config(overrides={"mesh.data": 3, "mesh.tensor": 2})
  with pytest.raises(ConfigError, match=r"mesh must fill the 8 device\(s\): data=3"):
    make_mesh(config.mesh)
  rest = tiny_config(overrides={"mesh.data": -1, "mesh.tensor": 2})
  assert make_mesh(rest.mesh).shape["data"] == 4


@pytest.mark.parametrize("num_devices, expected", [
  (1, None), (8, {"xla_cpu_enable_concurrency_optimized_scheduler": False}),
])
def test_programs_on_several_cpu_devices_have_no_concurrent_schedule(
  num_devices, expected, monkeypatch
):
  """With the schedule, collectives of devices that share few cores can deadlock."""
  axes, jit = {"data": num_devices}, jax.jit
  config = config_on("parallel", axes)
  mesh = mesh_of(config, axes)
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler=true"
  monkeypatch.setenv("XLA_FLAGS", flag)
  assert sharding.compiler_options(mesh) is None
  monkeypatch.setenv("XLA_FLAGS", "")
  assert sharding.compiler_options(mesh) == expected
  # A version of XLA that lacks the option would refuse it here.
  assert jit(lambda x: x + 1, compiler_options=expected)(1) == 2
  options = []
  monkeypatch.setattr(jax, "jit", lambda _, **how: options.append(how))
  programs.__wrapped__(program_config(config), mesh)
  init, step, diagnostics = (how["compiler_options"] for how in options)
  assert step == diagnostics == expected
  assert init == (expected or {}) | {"xla_backend_optimization_level": 0}


@pytest.mark.slow
def test_the_table_has_every_name_in_use_and_no_other(monkeypatch):
  used = set()
  look_up = sharding.partition_spec
  monkeypatch.setattr(
    sharding, "partition_spec", lambda axes: used.update(axes) or look_up(axes)
  )
  others = [("parallel", 3, GPT2), ("sequential", 3, LATENT | EXPERTS)]
  for kind, depth, trunk in [*((*k, {}) for k in KINDS), *others]:
    config = tiny_config(kind, depth, trunk)
    axes = logical_axes(accounting.abstract_params(config))
    tree_shardings(make_mesh(config.mesh, jax.devices()[:1]), axes)
    jax.eval_shape(
      gradient_program(config),
      random_params(config),
      microbatches(packed_batch(config)),
      WEIGHTS_M[: 1 + depth],
    )
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  put_batch(mesh, microbatches(packed_batch(config)), ("microbatch",))
  assert used - {None} == set(AXIS_RULES)
