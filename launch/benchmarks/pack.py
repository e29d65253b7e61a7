"""`launch.benchmark pack`: trials per hour side by side, against one after the other.

A trial is a small Llama with one sequential module, on random tokens, one document per
row, all trials on the same rows. The contestants of one size, the lone step, packs of N
trials and a lone PyTorch step, take turns for several rounds. Ours are taken as the
training loop takes them: the next one is started before the last has ended. Every ratio
is formed within a round, so that a machine that is busy for a while slows both of its
sides. The floor takes turns with them: products of large matrices, at whose rate the
model's FLOPs would take so long.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.benchmarks.contestants import (
  NAMES,
  Build,
  Contestant,
  Turns,
  build_train_step,
)
from launch.benchmarks.limits import build_products
from launch.benchmarks.records import (
  Progress,
  add_huge_pages,
  add_output,
  add_trace,
  apply_preset,
  floor_seconds,
  header,
  heading,
  make_config,
  new_parser,
  ratios,
  rounds,
  slug,
  spread,
  table,
  write,
)
from launch.benchmarks.rows import one_document_batch
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError
from mtp_jax.config_rules import validate
from mtp_jax.pack import make_pack
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import compiled, programs, shape_of

_SIZES = ["0.3M", "1M", "3M", "10M"]
_PRESETS = {
  "cpu": {
    "models": _SIZES[:3], "packs": [1, 2, 8, 32], "seq_len": 128, "batch_size": 8,
    "rounds": 5, "steps_per_round": 24,
  },
  "gpu": {
    "models": _SIZES, "packs": [1, 2, 4, 8, 16, 32], "seq_len": 256,
    "batch_size": 16, "rounds": 5, "steps_per_round": 64,
  },
}
_QUICK = {
  "models": ["0.3M"], "packs": [1, 2], "seq_len": 32, "batch_size": 2, "rounds": 2,
  "steps_per_round": 2,
}
_ALONE = "alone"
_FLOOR = "floor"
_PEERS = [name for name in NAMES if name.startswith("torch")]


@dataclasses.dataclass(frozen=True)
class Ready:
  """What a contestant says once it is compiled and warm.

  memory: bytes of arguments and temporaries of the program, by XLA's own analysis; of
    PyTorch the peak of a step, None where it is not known.
  """

  hardware: str
  compile_seconds: float
  memory: int | None


def add_parser(commands: Any) -> None:
  """Adds the `pack` subcommand to the subparsers of `launch.benchmark`."""
  parser = new_parser(
    commands, "pack", _PRESETS, __doc__,
    "trials per hour side by side in one program, against one after the other",
    (
      "  python -m launch.benchmark pack --quick         a check that takes a minute\n"
      "  python -m launch.benchmark pack                 the published table of a CPU\n"
      "  python -m launch.benchmark pack --preset gpu    that of a GPU\n"
      "  python -m launch.benchmark pack --models 1M --packs 8 16\n"
    ),
  )
  add = parser.add_argument
  add("--models", nargs="+", choices=_SIZES, help="by number of parameters")
  add("--packs", nargs="+", type=int, metavar="N", help="trials of a pack")
  add("--seq_len", type=int)
  add("--batch_size", type=int)
  add("--rounds", type=int, help="turns of every contestant")
  add(
    "--steps_per_round", type=int,
    help="of one trial: a pack of N takes an Nth of them, but at least three",
  )
  add(
    "--num_steps", type=int, default=2000,
    help="of a trial, for the trials per hour that include compilation",
  )
  add("--torch", action=argparse.BooleanOptionalAction, default=True)
  add_huge_pages(parser)
  add_trace(parser)
  add_output(parser, "tiny sizes, two rounds")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the table, writes it and its figures.

  Raises:
    ConfigError: a pack without trials, or sizes that no model has.
  """
  apply_preset(args, _PRESETS, _QUICK)
  if min(args.packs) < 1:
    raise ConfigError(f"--packs must be at least 1, got {min(args.packs)}.")
  configs = {size: _config(args, size) for size in args.models}
  for config in configs.values():
    validate(config, 1)
  contestants = _contestants(args)
  say = Progress(len(args.models) * (1 + len(contestants)), args.rounds)
  rows = [_measure(args, size, config, say) for size, config in configs.items()]
  record = header(args) | {"rows": rows}
  name = "pack-quick" if args.quick else f"pack-{slug(rows[0]['hardware'])}"
  write(args.output, name, record, markdown(record))


def _config(args: argparse.Namespace, size: str) -> Config:
  values = argparse.Namespace(**vars(args) | {"kind": "sequential"})
  return make_config(values, size, "llama", 264, depth=1)


def _measure(
  args: argparse.Namespace, size: str, config: Config, say: Progress
) -> dict[str, Any]:
  """Returns the row of one size, its contestants in turns."""
  counts = accounting.count(config)
  tokens = args.seq_len * args.batch_size
  floor: dict[str, Any] = {"contestants": {}}
  row: dict[str, Any] = {
    "size": size,
    "parameters": counts.total,
    "flops_per_step": counts.train_flops_per_token * tokens,
    "hardware": "unknown",
    "contestants": {},
  }
  with Turns(args.rounds, args.steps_per_round, say, trace=args.trace) as turns:
    entrant = Contestant(_FLOOR, config, args.huge_pages, build_products)
    turns.enter(f"{size} {_FLOOR}", entrant, floor)
    for name, build in _contestants(args).items():
      label = f"{size} {f'pack of {name}' if name.isdigit() else name}"
      turns.enter(
        label, Contestant(name, config, args.huge_pages, build), row,
        max(3, args.steps_per_round // (int(name) if name.isdigit() else 1)),
      )
    turns.take()
  return row | {"floor": floor["contestants"][_FLOOR]}


def _contestants(args: argparse.Namespace) -> dict[str, Build]:
  packs = {name: build_step for name in (_ALONE, *map(str, args.packs))}
  return packs | (dict.fromkeys(_PEERS, build_peer) if args.torch else {})


def build_peer(config: Config, name: str) -> tuple[Callable[[], None], Ready]:
  """Returns a lone PyTorch step, compiled where the name says so, and warm."""
  step, ready = build_train_step(config, name)
  return step, Ready(ready.hardware, ready.build_seconds, ready.peak_memory)


def build_step(config: Config, name: str) -> tuple[Callable[[], Any], Ready]:
  """Returns the lone step, or that of a pack of `name` trials, compiled and warm."""
  devices = jax.devices()[:1]
  mesh, shape = make_mesh(config.mesh, devices), shape_of(config)
  rows = jax.tree.map(lambda x: x[None], one_document_batch(config))
  hyper, waits_for = hyperparameters(config), None
  with jax.set_mesh(mesh):
    one = programs(shape, mesh)
    state = one.init(np.int32(0))

  def put() -> Any:
    return put_batch(mesh, rows, ("microbatch",))

  if name == _ALONE:
    with jax.set_mesh(mesh):
      start = time.perf_counter()
      program = compiled(one.step, state, put(), hyper, np.bool_(True))

    def take() -> Any:
      nonlocal state
      state, report = program(state, put(), hyper, np.bool_(True))
      return report["loss_total"]
  else:
    num_trials = int(name)
    states = [jax.device_get(state)] * num_trials
    pack = make_pack(shape, states, [hyper] * num_trials, num_trials, devices)
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
  return step, Ready(
    hardware=devices[0].device_kind,
    compile_seconds=seconds,
    memory=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
  )


def markdown(record: dict[str, Any]) -> str:
  """Returns the table of a benchmark record, with what is needed to read it."""
  settings = record["settings"]
  parts = [
    *heading(
      "Packs: trials side by side, against one after the other",
      record, record["rows"][0]["hardware"],
    ),
    f"Llama with one sequential module, T={settings['seq_len']}, "
    f"B={settings['batch_size']}, one batch for all. {settings['rounds']} interleaved "
    f"rounds of {settings['steps_per_round']} steps of a trial, which N together take "
    "in an Nth as many, but at least three. Times: median over rounds. Ratios "
    "to the lone step: median over rounds [least, greatest]; above 1 more gets done. "
    "Floor / step: the model's FLOPs of all trials at the rate of products of large "
    "matrices, over the step. With compilation: N trials of "
    f"{settings['num_steps']:,} steps, compiled once either way. Evaluation and saving "
    "are not in it. Memory: arguments and temporaries of one program, by XLA's own "
    "analysis; of PyTorch the peak of a step. PyTorch: a lone step, float32 on a CPU "
    "and autocast to bfloat16 on a GPU.",
    "",
  ]
  parts += table(
    (
      "parameters", "N", "compile s", "step ms", "floor / step", "MB", "trials/h",
      "ratio", "trials/h with compilation", "ratio",
    ),
    [
      _table_row(row, name, settings["num_steps"])
      for row in record["rows"]
      for name, figures in row["contestants"].items()
      if "error" not in figures
    ],
  )
  failures = [
    f"- {row['parameters']:,} parameters, {name}: {figures['error']}"
    for row in record["rows"]
    for name, figures in (row["contestants"] | {_FLOOR: row["floor"]}).items()
    if "error" in figures
  ]
  if failures:
    parts += ["", "Failed:", "", *failures]
  return "\n".join(parts) + "\n"


def _table_row(row: dict[str, Any], name: str, num_steps: int) -> tuple[Any, ...]:
  figures, alone = (row["contestants"].get(x, {}) for x in (name, _ALONE))
  trials, steps = int(name) if name.isdigit() else 1, rounds(figures)
  floor = floor_seconds(row["floor"], trials * row["flops_per_step"])
  warm = [num_steps * x / trials for x in steps]
  warm_alone = [num_steps * x for x in rounds(alone)]
  # Seconds of one trial of `trials`, the program being compiled for all of them.
  cold, cold_alone = (
    [x + contestant.get("compile_seconds", 0.0) / trials for x in seconds]
    for seconds, contestant in ((warm, figures), (warm_alone, alone))
  )
  per_hour = lambda seconds: f"{3600 / statistics.median(seconds):,.1f}"  # noqa: E731
  return (
    f"{row['parameters']:,}",
    name,
    f"{figures['compile_seconds']:.1f}",
    f"{statistics.median(steps) * 1e3:.1f}",
    spread(ratios(floor, steps)),
    "-" if figures["memory"] is None else f"{figures['memory'] / 1e6:.0f}",
    per_hour(warm),
    spread(ratios(warm_alone, warm)),
    per_hour(cold),
    spread(ratios(cold_alone, cold)),
  )
