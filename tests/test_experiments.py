"""Every shipped experiment: its trials are valid and a train step of each traces."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import drafters, gains_with_scale, kinds
from launch import trials
from mtp_jax import accounting, config_rules, optimizer
from mtp_jax import config as config_lib
from mtp_jax.analysis.claims.kinds import ARMS
from mtp_jax.data.tasks.corpus import load_task
from mtp_jax.depth_weights import depth_weights
from mtp_jax.lm import zeros_batch
from mtp_jax.model import block
from mtp_jax.predictors import KINDS, routed_layers
from mtp_jax.sharding import MESH_AXES, logical_axes
from mtp_jax.train_state import Hyperparameters, init_state
from mtp_jax.train_step import train_step

SMALL = (
  "smoke", "ntp_baseline", "depth_sweep", "loss_weight", "head_design",
  "self_speculation", "imported", "demo", "gpu_steps",
)
PRESETS = tuple(gains_with_scale.LADDERS)
WITH_EXPERTS = (
  ("deepseek_v3", "cpu"), ("deepseek_v3", "v3"), ("moe_balance", "cpu"),
  ("moe_balance", "gpu"),
)
ON_TASKS = (
  "star_graph", "sat", "countdown", "polynomial", "induction", "siblings", "look_ahead",
)
ON_TEXT = (
  "acceptance_by_depth", "schedules", "bytes_or_bpe", "data_repetition",
  "hidden_source", "tax",
)
RATES = [(name, "cpu_rates") for name in ("siblings", "look_ahead", "tax")]
EXPERIMENTS = [
  *((name, None) for name in SMALL),
  *(("gains_with_scale", preset) for preset in PRESETS),
  *WITH_EXPERTS,
  *((name, preset) for name in ON_TASKS + ON_TEXT for preset in ("cpu", "gpu")),
  *RATES,
  *(
    (name, preset) for name in ("drafters", "kinds")
    for preset in ("cpu", "cpu_trunks", "gpu", "gpu_trunks")
  ),
  *(("markov", preset) for preset in ("cpu", "gpu")),
]
# The presets `cluster` of the questions are `gpu` with more seeds or sizes.
LARGEST = [(name, "cluster") for name in ON_TASKS + ON_TEXT]


@functools.cache
def planned(name, preset=None):
  experiment = importlib.import_module(f"experiments.{name}")
  base = experiment.get_config(*(() if preset is None else (preset,)))
  return trials.plan(
    config_lib.from_config_dict(base), {}, trials.points(experiment, preset), Path(".")
  )


def ladder(preset):
  return planned("gains_with_scale", preset)


def mesh_sizes(config):
  """Returns devices along each axis; one where the config takes what there is."""
  return tuple(abs(getattr(config.mesh, axis)) for axis in MESH_AXES)


def check_traces(shapes):
  """Traces one train step of every shape under its own mesh; takes no memory."""
  assert shapes
  for shape in shapes:
    # On accelerators `auto` is not the unrolled attention of a CPU, slow to trace.
    trunk = dataclasses.replace(shape.trunk, attention="xla")
    before, after, report = trace_step(dataclasses.replace(shape, trunk=trunk))
    assert jax.tree.map(spec, before) == jax.tree.map(spec, after)
    assert report["loss_M"].shape == (1 + shape.mtp.depth,)


def abstract_mesh(config):
  """Returns a mesh without devices, for tracing; `data = -1` counts as 1."""
  return jax.sharding.AbstractMesh(
    tuple(abs(getattr(config, axis)) for axis in MESH_AXES),
    MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
  )


def trace_step(shape):
  axes = logical_axes(accounting.abstract_params(shape))
  chain = optimizer.make_optimizer(
    shape.optimizer, optimizer.trainable(shape, axes)
  )
  microbatches = shape.train.accumulation_steps
  rows = jax.eval_shape(
    lambda: zeros_batch(shape, shape.data.batch_size // microbatches)
  )
  scalar = jax.ShapeDtypeStruct((), np.float32)
  with jax.sharding.use_abstract_mesh(abstract_mesh(shape.mesh)):
    state = jax.eval_shape(functools.partial(init_state, shape, chain), np.int32(0))
    return state, *jax.eval_shape(
      functools.partial(train_step, shape),
      state,
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((microbatches, *x.shape), x.dtype), rows
      ),
      Hyperparameters(scalar, scalar, scalar),
      jax.ShapeDtypeStruct((), np.bool_),
    )


def spec(leaf):
  return leaf.shape, leaf.dtype


@pytest.mark.parametrize(
  "name, preset",
  [*EXPERIMENTS, *(pytest.param(*x, marks=pytest.mark.slow) for x in LARGEST)],
)
def test_trials_are_valid_on_their_devices(name, preset):
  for trial in planned(name, preset):
    for config in (trial.config, trial.resolved):
      config_rules.validate(config, int(np.prod(mesh_sizes(config))))


@pytest.mark.slow
def test_small_experiments_trace():
  check_traces({trial.program for name in SMALL for trial in planned(name)})


@pytest.mark.parametrize("name", ON_TASKS)
def test_examples_fit_into_rows_and_vocabulary(name):
  for preset in ("cpu", "gpu"):
    configs = (trial.config for trial in planned(name, preset))
    for config in {(c.task, c.data.seq_len): c for c in configs}.values():
      corpus = load_task(config)
      assert corpus.per_row == 1
      spare = config.data.seq_len - corpus.task.max_tokens - 2
      assert 0 <= spare <= 1


def test_no_two_trials_of_an_experiment_are_the_same():
  for name, preset in EXPERIMENTS:
    configs = [
      dataclasses.replace(trial.config, name="") for trial in planned(name, preset)
    ]
    assert len(set(configs)) == len(configs), (name, preset)


@pytest.mark.slow
@pytest.mark.parametrize("name, preset", WITH_EXPERTS)
def test_models_with_experts_trace(name, preset):
  check_traces({trial.program for trial in planned(name, preset)})


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_models_of_hidden_source_trace_and_differ_in_their_inputs_alone(preset):
  found = planned("hidden_source", preset)
  assert len(found) == 7 * 3 and len({trial.name for trial in found}) == 7 * 3
  assert len({(trial.config.trunk, trial.config.data) for trial in found}) == 1
  assert len({trial.counts.total for trial in found if trial.config.mtp.depth}) == 1
  if preset == "cpu":
    check_traces({trial.program for trial in found})


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_drafters_find_the_trunks_that_they_are_trained_on(machine):
  folder = Path(f"runs/drafters_{machine}_trunks")
  assert str(folder) in drafters.__doc__
  trunks = {
    folder / t.workdir.name: t.config
    for t in planned("drafters", f"{machine}_trunks")
  }
  found = [trial.config for trial in planned("drafters", machine)]
  afterwards = [config for config in found if config.train.trunk_from]
  assert (len(trunks), len(afterwards), len(found)) == (6, 10 * 6, 14 * 6)
  for config in afterwards:
    source = trunks[Path(config.train.trunk_from)]
    if config.data.train_on:
      written = str(Path(config.train.trunk_from) / "written.jsonl")
      assert config.data.train_on == written
      source = config_lib.with_overrides(source, {"data.train_on": written})
    assert config.train.freeze_trunk and source.mtp.depth == 0
    for part in ("seed", "trunk", "tokenizer", "data", "optimizer"):
      assert getattr(config, part) == getattr(source, part)
    assert config.train.num_steps == source.train.num_steps
  assert not any(c.train.freeze_trunk for c in found if not c.train.trunk_from)
  if machine == "cpu":
    narrow = [t for t in planned("drafters", "cpu") if t.config.trunk.embed_dim == 32]
    check_traces({trial.program for trial in narrow})


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_kinds_are_all_there_and_find_their_trunks(machine):
  folder = Path(f"runs/kinds_{machine}_trunks")
  assert str(folder) in kinds.__doc__
  trunks = {
    folder / t.workdir.name: t.config for t in planned("kinds", f"{machine}_trunks")
  }
  found = [trial.config for trial in planned("kinds", machine)]
  assert (len(trunks), len(found)) == (3, (9 + 9 + 3) * 3)
  assert {config.mtp.kind for config in found} == set(KINDS) - {"none"}
  for config in found:
    is_frozen = config.train.freeze_trunk
    assert is_frozen == bool(config.train.trunk_from)
    assert config.mtp.depth == (1 if config.mtp.kind == "top" else 3)
    source = trunks[Path(config.train.trunk_from)] if is_frozen else next(
      trunk for trunk in trunks.values() if trunk.seed == config.seed
    )
    assert (source.mtp.depth, source.train.num_steps) == (0, config.train.num_steps)
    for part in ("seed", "trunk", "tokenizer", "data", "optimizer"):
      assert getattr(config, part) == getattr(source, part)
  # Every arm of the table is an arm of the experiment, and the other way round.
  flat = [config_lib.flatten(config_lib.to_dict(config)) for config in found]
  for where in ARMS.values():
    assert sum(all(x[k] == v for k, v in where.items()) for x in flat) == 3
  assert len(ARMS) * 3 == len(found)


@pytest.mark.slow
def test_drafters_at_equal_parameters_have_nearly_as_many():
  for machine, reference in (("cpu", "medusa"), ("gpu", "module")):
    sizes = {}
    for trial in planned("drafters", machine):
      if trial.config.train.freeze_trunk:
        name = trial.name.split("drafter=")[1].split(",")[0]
        width = trial.config.trunk.embed_dim
        sizes[name, width] = trial.counts.total - trial.counts.deployed
    for (name, width), size in sizes.items():
      if name == "medusa" or (name.startswith(("module", "eagle")) and name[-1] != "s"):
        expected = sizes[reference, width]
        if (machine, name) == ("gpu", "medusa"):
          assert size < expected
        else:
          assert size == pytest.approx(expected, rel=0.01), name


def test_medusa_heads_weigh_0_8_to_the_power_of_their_depth():
  for trial in planned("drafters", "cpu"):
    mtp = trial.config.mtp
    if mtp.kind == "medusa":
      factor = 1.0 if trial.config.train.freeze_trunk else 0.2
      expected = factor * 0.8 ** np.arange(1, 4)
      weights_M, _ = depth_weights(mtp, mtp.weight, 0.0)
      np.testing.assert_allclose(weights_M, [1, *expected], rtol=1e-6)


@pytest.mark.slow
def test_star_graphs_with_other_tokens_are_named_and_trace():
  fed = {
    preset: [t for t in planned("star_graph", preset) if t.config.mtp.fed != "true"]
    for preset in PRESETS
  }
  assert [len(fed[preset]) for preset in PRESETS] == [0, 4 * 2 * 5, 4 * 2 * 10]
  for trial in fed["gpu"]:
    assert f",kind=sequential,depth=3,fed={trial.config.mtp.fed}," in trial.name
  check_traces({trial.program for trial in fed["gpu"][:2]})


def test_deepseek_v3_has_the_published_size():
  """The README of the released weights: 671B, of which 36.7B are active, MTP 11.5B."""
  (trial,) = planned("deepseek_v3", "v3")
  found = trial.counts
  assert found.deployed == pytest.approx(671.0e9, rel=1e-3)
  assert found.active == pytest.approx(37e9, rel=0.02)
  assert found.total - found.deployed == pytest.approx(11.5e9, rel=0.02)
  trunk = trial.config.trunk
  cache = jax.eval_shape(lambda: block.empty_cache(trunk, rows=1, slots=1))
  assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == 512 + 64


@pytest.mark.slow
def test_deepseek_v3_has_every_parameter_of_transformers():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  with torch.device("meta"):
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())
  number = sum(parameter.numel() for parameter in theirs.parameters())
  (trial,) = planned("deepseek_v3", "v3")
  biases = routed_layers(trial.config)["trunk"] * trial.config.trunk.moe.num_experts
  assert trial.counts.deployed - biases == number  # Theirs are no parameters.


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", PRESETS)
def test_all_models_of_the_ladders_trace(preset):
  check_traces({trial.program for trial in ladder(preset)})


@pytest.mark.parametrize("preset", PRESETS)
def test_learning_rate_is_checked_on_both_sides_for_every_arm_and_size(preset):
  rates = {}
  for trial in ladder(preset):
    config = trial.config
    is_other_lambda = ",weight=" in trial.name or ",schedule=" in trial.name
    if config.mtp.arm != "flops" and not is_other_lambda:
      rates.setdefault((config.trunk.embed_dim, config.mtp), set()).add(
        config.optimizer.learning_rate
      )
  for size in gains_with_scale.LADDERS[preset]:
    chosen = size.learning_rate
    found = [rates[key] for key in rates if key[0] == size.embed_dim]
    assert len(found) >= 1 + 2 * len(gains_with_scale.DEPTHS)  # NTP and two kinds.
    assert all(r == {chosen / 2, chosen, chosen * 2} for r in found)


@pytest.mark.parametrize("preset", PRESETS)
def test_ntp_is_trained_for_the_flops_of_the_added_arms(preset):
  for size in gains_with_scale.LADDERS[preset]:
    trials_of = {"flops": {}, "added": {}}
    for trial in ladder(preset):
      mtp = trial.config.mtp
      if mtp.arm in trials_of and trial.config.trunk.embed_dim == size.embed_dim:
        trials_of[mtp.arm][mtp.kind, mtp.depth] = trial
    for key, trial in trials_of["flops"].items():
      assert trial.resolved.mtp.depth == 0
      one_step = trial.flops / trial.num_steps  # Steps are whole numbers.
      assert abs(trial.flops - trials_of["added"][key].flops) <= one_step
    largest = max(trial.flops for trial in trials_of["flops"].values())
    for trial in trials_of["added"].values():  # Budgets in between are interpolated.
      assert trial.flops <= largest * 1.001


def test_arms_of_one_size_share_data_and_seeds():
  for preset in PRESETS:
    for size in gains_with_scale.LADDERS[preset]:
      configs = [trial.config for trial in ladder(preset)]
      of_size = [c for c in configs if c.trunk.embed_dim == size.embed_dim]
      assert len({(config.data, config.trunk) for config in of_size}) == 1
      seeds = {
        has_mtp: {c.seed for c in of_size if (c.mtp.depth > 0) == has_mtp}
        for has_mtp in (False, True)
      }
      more = gains_with_scale.NOISE_SEEDS if preset == "gpu" else ()
      assert seeds[True] == set(gains_with_scale.SEEDS[preset])
      assert seeds[False] == seeds[True] | set(more)


def test_cluster_ladder_is_that_of_the_paper():
  """Gloeckle et al. 2024, tables S13 and S14; 12 L d^2 parameters in the blocks."""
  ntp = {
    t.config.trunk.embed_dim: t for t in ladder("cluster") if t.config.mtp.depth == 0
  }
  for trial in ntp.values():
    trunk, data = trial.config.trunk, trial.config.data
    assert data.batch_size * data.seq_len == 8 * 2**20
    nominal = 12 * trunk.num_layers * trunk.embed_dim**2
    assert trial.counts.trunk == pytest.approx(nominal, rel=0.05)
  tokens = [trial.num_tokens / 1e9 for trial in ntp.values()]
  np.testing.assert_allclose(tokens, [91.0] * 4 + [209.7] * 2, rtol=1e-3)
