"""Times the step of trials side by side in one program against one after the other.

  python -m launch.benchmark pack --models=1M --packs=8,16

A trial is a small Llama with one sequential module, on random tokens, one document per
row, all trials on the same rows. Contestants are the lone step, packs of N trials and a
lone PyTorch step. Ours are started as the training loop starts them: the next step
begins before the last has ended. The floor is the time of the FLOPs of all trials, at
the rate of products of large matrices.
"""

import functools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from absl import flags

from launch.benchmarks import harness, limits, pages, torch_steps
from launch.benchmarks.harness import FLOOR, OURS, TORCH, Entrant
from launch.benchmarks.pages import ratios, rounds_of, spread
from launch.tables import markdown
from mtp_jax import accounting
from mtp_jax.config import Config
from mtp_jax.config_rules import validate
from mtp_jax.pack_program import Pack
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import compiled, programs

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
  packs="trials of a pack",
  steps_per_round="steps of one trial in a turn; a pack of N takes an Nth of them, but "
  "at least three",
)
_PEERS = flags.DEFINE_bool("torch", True, "compare with PyTorch", allow_override=True)


def main() -> None:
  """Measures, and writes the page.

  Raises:
    ConfigError: a pack without trials, or sizes that no model has.
  """
  settings = harness.read_settings(PRESETS, {"models": harness.MODELS})
  settings.torch = _PEERS.value
  configs = {
    model: harness.make_config(
      model, "llama", 264, "sequential", 1, settings.seq_len, settings.batch_size
    )
    for model in settings.models
  }
  for config in configs.values():
    validate(config, 1)
  contestants = 2 + len(settings.packs) + len(TORCH) * settings.torch
  advance = harness.count_turns(len(configs) * contestants * (1 + settings.rounds))
  rows = [_measure(settings, *case, advance) for case in configs.items()]
  pages.write_page(
    "pack", settings, rows, pages.device_of(rows), page(settings, rows)
  )


def _measure(
  settings: SimpleNamespace, model: str, config: Config, advance: Callable[[int], None]
) -> dict[str, Any]:
  """Returns the row of one size: its contestants and its floor in turns."""
  counts = accounting.count(config)
  builds = {FLOOR: functools.partial(limits.build_products, config)}
  builds |= {
    name: functools.partial(build_step, config, size)
    for name, size in [(OURS, 0), *((str(n), n) for n in settings.packs)]
  }
  if settings.torch:
    builds |= {n: functools.partial(torch_steps.build_train, config, n) for n in TORCH}
  entrants = {
    f"{model} {name}": Entrant(
      build, max(3, settings.steps_per_round // _num_trials(name))
    )
    for name, build in builds.items()
  }
  found = harness.measure(entrants, settings, advance)
  return {
    "model": model,
    "parameters": counts.total,
    "flops": counts.train_flops_per_token * settings.seq_len * settings.batch_size,
    "contestants": dict(zip(builds, found.values(), strict=True)),
  }


def _num_trials(name: str) -> int:
  return int(name) if name.isdigit() else 1


def build_step(
  config: Config, num_trials: int
) -> tuple[Callable[[], Any], dict[str, Any]]:
  """Builds the step of a pack; that of a lone trial if `num_trials` is 0."""
  devices = jax.devices()[:1]
  mesh, shape = make_mesh(config.mesh, devices), program_config(config)
  rows = jax.tree.map(lambda x: x[None], harness.one_document_batch(config))
  hyper, waits_for = hyperparameters(config), None
  with jax.set_mesh(mesh):
    one = programs(shape, mesh)
    state = one.init(np.int32(0))

  def put() -> Any:
    return put_batch(mesh, rows, ("microbatch",))

  if not num_trials:
    with jax.set_mesh(mesh):
      start = time.perf_counter()
      program = compiled(one.step, state, put(), hyper, np.bool_(True))

    def take() -> Any:
      nonlocal state
      state, report = program(state, put(), hyper, np.bool_(True))
      return report["loss_total"]
  else:
    states = [jax.device_get(state)] * num_trials
    pack = Pack(shape, states, [hyper] * num_trials, num_trials, devices)
    active = dict.fromkeys(range(num_trials), True)
    start = time.perf_counter()
    program = pack.compile(pack.put([rows]))

    def take() -> Any:
      return pack.step(pack.put([rows]), active)

  seconds = time.perf_counter() - start

  def step() -> Any:
    nonlocal waits_for
    current = take()
    jax.block_until_ready(waits_for)
    waits_for = current
    return current

  step()
  step()
  memory = program.memory_analysis()
  return step, {
    "hardware": devices[0].device_kind,
    "compile_seconds": seconds,
    "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
  }


def page(settings: SimpleNamespace, rows: list[dict[str, Any]]) -> list[str]:
  """Returns the paragraphs and the table of the page."""
  return [
    f"Llama with one sequential module, T={settings.seq_len}, B={settings.batch_size}, "
    f"one batch for all trials. {settings.rounds} interleaved rounds of "
    f"{settings.steps_per_round} steps of a trial; a pack of N takes an Nth of them, "
    "but at least three. Times: median over rounds. Ratios: median over rounds [least, "
    "greatest], of steps of a trial per second over those of the lone step (above 1 is "
    "better), and of the step over its floor. Evaluation and saving are left out. MB: "
    "arguments and temporaries of one program, by XLA's analysis; of PyTorch the peak "
    "of a step. PyTorch: a lone step, float32 on a CPU and autocast to bfloat16 on a "
    "GPU.",
    markdown(
      cells(row, name)
      for row in rows
      for name, facts in row["contestants"].items()
      if name != FLOOR and "error" not in facts
    ),
  ]


def cells(row: dict[str, Any], name: str) -> dict[str, str]:
  """Returns a contestant's line of the table."""
  facts, trials = row["contestants"][name], _num_trials(name)
  steps, alone = rounds_of(row, name), rounds_of(row, OURS)
  memory = facts.get("memory", facts.get("peak_memory"))
  return {
    "model": row["model"],
    "N": name,
    "compile s": f"{facts.get('compile_seconds', 0.0):.1f}",
    "step ms": pages.milliseconds(steps),
    "step / floor": spread(ratios(steps, [trials * x for x in rounds_of(row, FLOOR)])),
    "MB": f"{memory / 1e6:.0f}" if memory else "-",
    "steps/s of a trial": f"{trials / statistics.median(steps):,.1f}",
    "over lone": spread(ratios([trials * x for x in alone], steps)),
  }
