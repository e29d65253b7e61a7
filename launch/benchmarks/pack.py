"""Times the step of trials side by side in one program against one after the other.

  mtp-jax bench pack --models=1M --packs=8,16

A trial is a small Llama with one sequential module, on random tokens, one document per
row, all trials on the same rows. Contestants are the lone step (ours), packs of N
trials and a lone PyTorch step, in float32 on a CPU and autocast to bfloat16 on a GPU.
Our steps are started as the training loop starts them: the next step begins before the
last has ended. Evaluation and saving are left out. The floor is the time of the FLOPs
of one trial, at the rate of products of large matrices.

The time of a pack is an Nth of its step, so `ours / this` is how many times as many
steps of a trial it takes in the same time. Temporaries: those and the arguments of one
program, by XLA's analysis.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from absl import flags

from launch.benchmarks import harness, limits, pages, torch_steps
from launch.benchmarks.harness import FLOOR, OURS, TORCH
from launch.planning import roofline
from mtp_jax import accounting
from mtp_jax.config import Config
from mtp_jax.config_rules import validate
from mtp_jax.executables import compiled
from mtp_jax.pack_program import Pack
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import programs

PRESETS = {
  "cpu": {
    "models": ["0.3M", "1M", "3M"], "packs": [1, 2, 8, 32], "seq_len": 128,
    "batch_size": 8, "rounds": 5, "steps_per_round": 24,
  },
  "gpu": {
    "models": ["0.3M", "1M", "3M", "10M"], "packs": [1, 2, 4, 8, 16, 32],
    "seq_len": 256, "batch_size": 16, "rounds": 5, "steps_per_round": 64,
  },
  "quick": {
    "models": ["0.3M"], "packs": [1, 2], "seq_len": 32, "batch_size": 2, "rounds": 2,
    "steps_per_round": 2,
  },
}
harness.define_settings(
  PRESETS,
  {"models": harness.MODELS},
  packs="trials of a pack",
  steps_per_round="steps of one trial in a turn; a pack of N takes an Nth of them, but "
  "at least three",
)
_PEERS = flags.DEFINE_bool("torch", True, "compare with PyTorch", allow_override=True)


def main() -> None:
  """Measures, and writes the page.

  Raises:
    ConfigError: sizes that no model has.
  """
  settings = harness.read_settings(PRESETS, _PEERS)
  configs = {
    model: harness.make_config(
      model, "llama", 264, "sequential", 1, settings.seq_len, settings.batch_size
    )
    for model in settings.models
  }
  for config in configs.values():
    validate(config, 1)
  rows = harness.measure_all(
    configs.items(), lambda case: [_measure(settings, *case)]
  )
  pages.write_page("pack", settings, rows, __doc__, [pages.compare(rows)])


def _measure(settings: SimpleNamespace, model: str, config: Config) -> dict[str, Any]:
  """Returns the row of one size: its contestants and its floor in turns."""
  builds = {FLOOR: functools.partial(limits.build_products, config)}
  sizes = {OURS: 0} | {f"pack of {size}": size for size in settings.packs}
  builds |= {n: functools.partial(build_step, config, k) for n, k in sizes.items()}
  if settings.torch:
    builds |= {n: functools.partial(torch_steps.build_train, config, n) for n in TORCH}
  found = harness.measure(
    {f"{model} {name}": build for name, build in builds.items()}, settings
  )
  flops = accounting.train_flops_per_token(config)
  return {
    "model": model,
    "flops": flops * settings.seq_len * settings.batch_size,
    "contestants": dict(zip(builds, found.values(), strict=True)),
  }


def build_step(config: Config, num_trials: int) -> harness.Built:
  """Builds the step of a pack, or of a lone trial if `num_trials` is 0."""
  devices = jax.devices()[:1]
  mesh, shape = make_mesh(config.mesh, devices), program_config(config)
  rows = jax.tree.map(lambda x: x[None], harness.one_document_batch(config))
  hyper, waits_for = hyperparameters(config), None
  with jax.set_mesh(mesh):
    one = programs(shape, mesh)
    state = one.init(np.int32(0))

  def put() -> Any:
    return put_batch(mesh, rows, ("microbatch",))

  # The lone step is the program of a run that is trained alone, not a pack of one.
  if not num_trials:
    with jax.set_mesh(mesh):
      program = compiled(one.step, state, put(), hyper, np.bool_(True))

    def take() -> Any:
      nonlocal state
      state, report = program(state, put(), hyper, np.bool_(True))
      return report["loss_total"]
  else:
    states = [jax.device_get(state)] * num_trials
    pack = Pack(shape, states, [hyper] * num_trials, num_trials, devices)
    active = dict.fromkeys(range(num_trials), True)
    program = pack.compile(pack.put([rows]))

    def take() -> Any:
      return pack.step(pack.put([rows]), active)

  # As in training, one step is in flight while the host prepares the next one.
  def step() -> Any:
    nonlocal waits_for
    current = take()
    jax.block_until_ready(waits_for)
    waits_for = current
    return current

  # The second step is the first that waits for a step.
  step()
  step()
  memory = program.memory_analysis()
  return step, {
    "hardware": devices[0].device_kind,
    "trials": max(num_trials, 1),
    "temporaries": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    **roofline.predicted(program, devices[0].device_kind),
  }
