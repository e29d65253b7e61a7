"""One optimizer step: what is traced, reported, skipped and diagnosed."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax import evaluate
from mtp_jax import train_step as train_step_lib
from mtp_jax.executables import compiled, forget_compiled
from mtp_jax.lm import MtpLm, unembed_matrix
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh
from mtp_jax.targets import future_targets
from mtp_jax.train_state import Hyperparameters
from mtp_jax.train_step import loss_and_grads, programs
from tests.common import (
  assert_trees_close,
  gradient_program,
  microbatches,
  packed_batch,
  random_params,
  tiny_config,
)

CONFIG = tiny_config(
  "sequential",
  2,
  {
    "trunk.num_layers": 1,
    "trunk.remat": "none",
    "mtp.weight": 0.6,
    "mtp.schedule": "linear",
    "mtp.final_weight": 0.2,
    "mtp.curriculum": "forward",
    "optimizer.warmup_fraction": 0.5,
  },
)
# The same shape of trial in another run: nothing here may compile anew.
OTHER = {
  "name": "other",
  "seed": 7,
  "mtp.weight": 0.1,
  "optimizer.learning_rate": 0.5,
  "train.num_steps": 20,
  "train.log_every": 3,
  "train.evals_per_doubling": 2,
  "train.eval_test": True,
  "train.stop_metric": "loss",
  "train.stop_value": 1.0,
  "train.trunk_from": "runs/other",
  "train.start_from": "runs/third",
  "data.seed": 5,
}
PROGRAMS = ("init_state", "train_step", "gradient_diagnostics")
START, GO_ON = jnp.bool_(True), jnp.bool_(False)


def hyper(learning_rate=0.01, weight=0.6, num_steps=10):
  return Hyperparameters(*jnp.float32([learning_rate, weight, num_steps]))


@pytest.fixture(scope="module")
def trial():
  """The programs, how often each was traced and compiled, the mesh, a batch [1, B, ..].

  The names of compilations are those of XLA: `jit(train_step)`.
  """
  counts = collections.Counter()

  def counted(name):
    function = getattr(train_step_lib, name)

    @functools.wraps(function)
    def wrapper(*args):
      counts[name] += 1
      return function(*args)

    return wrapper

  def count_compilation(event, _, fun_name="", **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      counts[fun_name] += 1

  mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    for name in PROGRAMS:
      patch.setattr(train_step_lib, name, counted(name))
    compiled = programs(program_config(CONFIG), mesh)
  jax.monitoring.register_event_duration_secs_listener(count_compilation)
  yield compiled, counts, mesh, microbatches(packed_batch(CONFIG))
  jax.monitoring.unregister_event_duration_listener(count_compilation)


def state_with(compiled, state=None, **changes):
  """Returns a state (a new one on random parameters) with values replaced."""
  if state is None:
    state = compiled.init(jnp.int32(0)).replace(params=random_params(CONFIG))
  # Laid out as the program's own results are, or it would be compiled once more.
  return jax.device_put(state.replace(**changes), compiled.shardings)


def test_trials_that_differ_in_traced_values_compile_once(trial):
  compiled, counts, mesh, batch = trial
  other = tiny_config("sequential", 2, flat_values(CONFIG) | OTHER)
  assert other != CONFIG and programs(program_config(other), mesh) is compiled
  reports, states = [], []
  for seed, values in ((0, hyper()), (7, hyper(0.5, 0.1, 20))):
    state = compiled.init(jnp.int32(seed))
    state, report = compiled.step(state, batch, values, START)
    reports.append(jax.device_get(report))
    states.append(jax.device_get(state))
    compiled.diagnostics(state.params, batch, values, state.step)
    compiled.step(state, batch, values, GO_ON)
  for name in PROGRAMS:
    assert counts[name] == counts[f"jit({name})"] == 1, (name, counts)
  # First of 10 and of 20 steps, with the warm-up over half of them.
  np.testing.assert_allclose(reports[0]["learning_rate"], 0.01 * 1 / 5, rtol=1e-6)
  np.testing.assert_allclose(reports[1]["learning_rate"], 0.5 * 1 / 10, rtol=1e-6)
  np.testing.assert_allclose([r["lambda"] for r in reports], [0.6, 0.1], rtol=1e-6)
  kernels = [s.params["unembed"]["kernel"] for s in states]
  assert not np.allclose(kernels[0], kernels[1])


def flat_values(config):
  return {
    "trunk.num_layers": config.trunk.num_layers,
    "trunk.remat": config.trunk.remat,
    "mtp.schedule": config.mtp.schedule,
    "mtp.final_weight": config.mtp.final_weight,
    "mtp.curriculum": config.mtp.curriculum,
    "optimizer.warmup_fraction": config.optimizer.warmup_fraction,
  }


def test_what_changes_the_program_changes_the_shape():
  for key, value in (
    ("mtp.depth", 1),
    ("mtp.schedule", "constant"),
    ("mtp.weighting", "sum"),
    ("mtp.score_from", "answer"),
    ("optimizer.kind", "muon"),
    ("trunk.num_layers", 2),
    ("train.freeze_trunk", True),
    ("data.seq_len", 8),
  ):
    other = tiny_config("sequential", 2, flat_values(CONFIG) | {key: value})
    assert program_config(other) != program_config(CONFIG), key


def losses_by_definition(config, params, batch):
  """Returns the mean loss, the hits and the valid targets of every depth."""
  hidden_MBTD = jax.jit(MtpLm(config).apply)({"params": params}, batch)
  targets_MBT, mask_MBT = jax.device_get(future_targets(batch, config.mtp.depth))
  log_probs = jax.nn.log_softmax(hidden_MBTD @ unembed_matrix(params, config))
  nll = -np.take_along_axis(np.asarray(log_probs), targets_MBT[..., None], -1)[..., 0]
  hits = np.argmax(log_probs, -1) == targets_MBT
  count_M = mask_MBT.sum((1, 2))
  return (nll * mask_MBT).sum((1, 2)) / count_M, (hits & mask_MBT).sum((1, 2)), count_M


def test_training_and_evaluation_score_extra_depths_from_the_answer():
  config = tiny_config(
    "medusa", 2, {"trunk.num_layers": 1, "mtp.score_from": "answer"}
  )
  batch, rng = packed_batch(config), np.random.default_rng(0)
  batch = batch._replace(
    scored=rng.random(batch.tokens.shape) < 0.5,
    next_scored=rng.random(batch.next_tokens.shape) < 0.5,
  )
  from_start_MBT = np.array(future_targets(batch, 2)[1])
  mask_MBT = from_start_MBT & from_start_MBT[:1]
  counts_M = mask_MBT.sum((1, 2))
  assert np.all(counts_M[1:] < from_start_MBT.sum((1, 2))[1:])
  params = random_params(config)
  trained, found_M, _ = jax.jit(functools.partial(loss_and_grads, config))(
    params, microbatches(batch, 2), jnp.ones(3)
  )
  rows = jax.jit(functools.partial(evaluate.row_sums, config))(
    params, batch, np.ones(config.tokenizer.vocab_size, int)
  )
  assert found_M.tolist() == rows["count"].sum(0).tolist() == counts_M.tolist()
  np.testing.assert_allclose(trained.nll_M, rows["nll"].sum(0), rtol=1e-5)
  hits = jax.jit(functools.partial(evaluate.hit_sums, config, ranks=1))(params, batch)
  for sums in (rows, hits):
    assert sums["reachable"].sum() == mask_MBT[2, :, :-2].sum()


@pytest.mark.slow
def test_report_holds_the_losses_weights_and_rates_of_the_step(trial):
  compiled, _, _, batch = trial
  # Step 4 of 10: lambda = 0.6 - 0.4 * 0.4; of three phases the second, so one depth is
  # on; the learning rate of the fifth step ends the warm-up.
  state = state_with(compiled, step=jnp.int32(4))
  _, report = compiled.step(state, batch, hyper(), START)
  report = jax.device_get(report)
  np.testing.assert_allclose(report["lambda"], 0.44, rtol=1e-6)
  np.testing.assert_allclose(report["weight_M"], [1, 0.22, 0], rtol=1e-6)
  np.testing.assert_allclose(report["learning_rate"], 0.01, rtol=1e-6)
  loss_M, hits_M, count_M = losses_by_definition(
    CONFIG, random_params(CONFIG), packed_batch(CONFIG)
  )
  np.testing.assert_allclose(report["loss_M"], loss_M, rtol=1e-5)
  assert report["correct_M"].tolist() == hits_M.tolist()
  assert report["count_M"].tolist() == count_M.tolist()
  main_and_extra = loss_M[0] + 0.22 * loss_M[1]
  np.testing.assert_allclose(report["loss_total"], main_and_extra, rtol=1e-5)
  _, _, grads = gradient_program(CONFIG)(
    random_params(CONFIG), batch, np.float32([1, 0.22, 0])
  )
  np.testing.assert_allclose(report["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_interval_adds_up_until_it_starts_again(trial):
  compiled, _, _, batch = trial
  state, single = state_with(compiled, step=jnp.int32(3)), []
  for starts in (START, START):
    state, report = compiled.step(state, batch, hyper(), starts)
    single.append(jax.device_get(report))
  state = state_with(compiled, step=jnp.int32(3))
  for starts in (START, GO_ON):
    state, report = compiled.step(state, batch, hyper(), starts)
  both = jax.device_get(report)
  assert (single[0]["steps"], single[1]["steps"], both["steps"]) == (1, 1, 2)
  for name in ("loss_total", "loss_M", "weighted_loss_M", "weight_M", "correct_M",
               "count_M", "grad_norm"):
    total = single[0][name] + single[1][name]
    np.testing.assert_allclose(both[name], total, rtol=1e-6, err_msg=name)
  # lambda differs between the two steps: the sum of products is not that of the means.
  np.testing.assert_allclose(
    both["loss_total"], both["weighted_loss_M"].sum(), rtol=1e-5
  )


def test_a_few_steps_lower_the_loss(trial):
  compiled, _, _, batch = trial
  state, losses = compiled.init(jnp.int32(0)), []
  for _ in range(8):
    state, report = compiled.step(state, batch, hyper(num_steps=1e6, weight=0), START)
    losses.append(float(report["loss_total"]))
  assert int(state.step) == 8
  state = compiled.init(jnp.int32(0))
  for _ in range(8):
    state, report = compiled.step(state, batch, hyper(num_steps=8), START)
  assert float(report["loss_M"][0]) < losses[0] - 0.1
  # A millionth of the warm-up leaves the parameters where they are.
  np.testing.assert_allclose(losses, losses[0], rtol=1e-3)


def with_nan_parameter(params, batch):
  params["trunk"]["blocks"]["mlp"]["up"][0, 0, 0] = np.nan
  return params, batch


def with_gradient_beyond_float32(params, batch):
  # Losses near 1e20 are finite; the square of their gradient is not.
  params["unembed"]["kernel"] *= np.float32(1e20)
  return params, batch


def with_token_outside_the_vocabulary(params, batch):
  tokens = batch.tokens.copy()
  tokens[0, 0, 0] = 1000
  return params, batch._replace(tokens=tokens)


@pytest.mark.parametrize(
  "spoil, loss_is_finite",
  [
    (with_nan_parameter, False),
    (with_gradient_beyond_float32, True),
    (with_token_outside_the_vocabulary, False),
  ],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(trial, spoil, loss_is_finite):
  compiled, _, _, good_batch = trial
  params, batch = spoil(random_params(CONFIG), good_batch)
  sums, _, grads = gradient_program(CONFIG)(params, batch, np.float32([1, 0.5, 0.5]))
  assert np.isfinite(sums.total) == loss_is_finite
  assert not np.isfinite(optax.tree.norm(grads))

  state, _ = compiled.step(state_with(compiled), good_batch, hyper(), START)
  state = state_with(compiled, state, params=params)  # With moments that are not 0.
  before = jax.device_get(state)
  for run in (1, 2):
    state, report = compiled.step(state, batch, hyper(), START if run == 1 else GO_ON)
    after = jax.device_get(state)
    assert_trees_close(after.params, before.params, rtol=0, atol=0)
    assert_trees_close(after.opt_state, before.opt_state, rtol=0, atol=0)
    assert after.step == before.step + run
    assert after.nonfinite_run == report["nonfinite_total"] == run
    assert report["longest_nonfinite_run"] == run
    # The bad step is in no average.
    assert report["steps"] == report["loss_total"] == report["grad_norm"] == 0

  state = state_with(compiled, state, params=random_params(CONFIG))
  state, report = compiled.step(state, good_batch, hyper(), GO_ON)
  assert (int(state.nonfinite_run), int(state.nonfinite_total)) == (0, 2)
  assert (int(report["longest_nonfinite_run"]), int(report["steps"])) == (2, 1)
  assert np.isfinite(report["loss_total"])


@pytest.mark.parametrize("weight", [0.9, 0.0])
def test_diagnostics_compare_the_two_gradients_of_the_trunk(trial, weight):
  compiled, _, _, batch = trial
  params = random_params(CONFIG)
  # Step 9 of 10: lambda has gone 0.9 of the way to 0.2, and both depths are on.
  extra = (0.1 * weight + 0.9 * 0.2) / 2
  state = state_with(compiled, step=jnp.int32(9))
  found = compiled.diagnostics(state.params, batch, hyper(weight=weight), state.step)

  def trunk_gradient(weights_M):
    grads = gradient_program(CONFIG)(params, batch, np.float32(weights_M))[2]["trunk"]
    return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)], dtype=float)

  ntp = trunk_gradient([1, 0, 0])
  mtp = trunk_gradient([1, extra, extra]) - ntp
  norms = np.linalg.norm(ntp), np.linalg.norm(mtp)
  assert norms[1] > 0
  np.testing.assert_allclose(found["mtp_grad_share"], norms[1] / sum(norms), rtol=1e-4)
  cosine = ntp @ mtp / (norms[0] * norms[1])
  np.testing.assert_allclose(found["mtp_grad_cosine"], cosine, rtol=1e-3, atol=1e-5)


def test_diagnostics_are_0_while_the_curriculum_has_no_depth_on(trial):
  compiled, _, _, batch = trial
  state = state_with(compiled)
  found = compiled.diagnostics(state.params, batch, hyper(), state.step)
  assert found["mtp_grad_share"] == found["mtp_grad_cosine"] == 0


@pytest.mark.slow
def test_a_frozen_trunk_stays_as_it_is_while_the_predictors_learn(trial):
  compiled, _, mesh, batch = trial
  config = tiny_config(
    "sequential", 2, flat_values(CONFIG) | {"train.freeze_trunk": True}
  )
  frozen = programs(program_config(config), mesh)
  start = random_params(CONFIG)
  state = jax.device_put(
    frozen.init(jnp.int32(0)).replace(params=start), frozen.shardings
  )
  free = state_with(compiled)
  for _ in range(2):
    state, report = frozen.step(state, batch, hyper(), START)
  assert {"mtp"} == set(state.opt_state[1].mu)
  for name, tree in jax.device_get(state.params).items():
    is_same = jax.tree.map(np.array_equal, tree, start[name])
    assert all(jax.tree.leaves(is_same)) == (name != "mtp"), name

  # The gradient of the predictors is what it is without freezing.
  weights_M = jnp.float32([1.0, 0.3, 0.2])
  _, _, of_all = gradient_program(CONFIG)(start, batch, weights_M)
  _, _, of_mtp = gradient_program(config)(start, batch, weights_M)
  assert set(of_mtp) == {"mtp"}
  assert_trees_close(of_mtp["mtp"], of_all["mtp"], 1e-5, 1e-7)
  # What is compared is the whole gradient of the trunk, frozen or not.
  same = (state_with(compiled).params, batch, hyper(), free.step)
  np.testing.assert_allclose(
    *(
      np.array(list(jax.device_get(program.diagnostics(*same)).values()))
      for program in (compiled, frozen)
    ),
    rtol=1e-4,
  )
  assert report["loss_M"].shape == (3,)


def test_a_forgotten_program_is_compiled_again():
  program, one = jax.jit(lambda x: 2 * x), np.float32(1)
  first = compiled(program, one)
  assert compiled(program, one) is first
  forget_compiled()
  assert compiled(program, one) is not first
