"""Times the train step against its floor and PyTorch; shows what depth and memory cost.

  python -m launch.benchmark train --trunks=gpt2 --vocabs=264 --depths=0,1
  python -m launch.benchmark train --preset=gpu --models=350M --depths=0 \\
      --contestants=ours --variants=trunk.attention=xla --variants=trunk.remat=none

A step is forward, backward, clipping and AdamW, on random tokens, one document per row.
All contestants of one model, trunk and vocabulary take turns, whatever their depth. The
floor is the time that the model's FLOPs take at the rate of products of large matrices.
"""

import ast
import functools
import itertools
import os
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from launch.benchmarks import harness, limits, pages, torch_steps
from launch.benchmarks.harness import FLOOR, OURS, TORCH, Entrant
from launch.benchmarks.pages import ratios, rounds_of, spread
from launch.tables import markdown
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.metrics import peak_flops
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import Hyperparameters
from mtp_jax.train_step import programs

PRESETS = {
  "cpu": {
    "models": ["5M"], "trunks": ["gpt2", "llama"], "vocabs": [264, 50304],
    "depths": [0, 1, 3], "seq_len": 256, "batch_size": 16, "rounds": 7,
    "steps_per_round": 2, "contestants": [OURS, *TORCH], "apart": False,
  },
  "gpu": {
    "models": ["124M", "350M"], "trunks": ["llama"], "vocabs": [50304],
    "depths": [0, 1, 3], "seq_len": 1024, "batch_size": 16, "rounds": 5,
    "steps_per_round": 10, "contestants": [OURS, "torch.compile"], "apart": True,
  },
  "quick": {
    "models": ["tiny"], "trunks": ["llama"], "vocabs": [264], "depths": [0, 1],
    "seq_len": 64, "batch_size": 4, "rounds": 2, "steps_per_round": 2,
    "contestants": [OURS, "torch eager"], "apart": False,
  },
}
_CHOICES = {
  "models": harness.MODELS, "trunks": harness.TRUNKS, "contestants": (OURS, *TORCH)
}
_XLA_FLAGS = "XLA_FLAGS"

harness.define_settings(
  PRESETS,
  contestants=f"of {', '.join((OURS, *TORCH))}",
  apart="end each contestant before the next is built, where memory does not hold all; "
  "they then take no turns",
)
_KIND = flags.DEFINE_enum(
  "kind", "sequential", ["sequential", "parallel", "linear", "medusa"],
  "predictors at depth > 0",
)
_VARIANTS = flags.DEFINE_multi_string(
  "variants", [], "KEY=VALUE: one more JAX contestant, with another value in its "
  f"config, or with {_XLA_FLAGS}=... in its environment; may be given again"
)


def main() -> None:
  """Measures, and writes the page.

  Raises:
    ConfigError: a variant, or sizes, that no model has.
  """
  settings = harness.read_settings(PRESETS, _CHOICES)
  settings.kind, settings.variants = _KIND.value, _VARIANTS.value
  cases = list(itertools.product(settings.models, settings.trunks, settings.vocabs))
  groups = {case: _entrants(settings, *case) for case in cases}
  turns = sum(len(entrants) for _, entrants in groups.values())
  advance = harness.count_turns(turns * (1 + settings.rounds))
  rows = []
  for of_depth, entrants in groups.values():
    named = {" ".join(key): entrant for key, entrant in entrants.items()}
    found = harness.measure(named, settings, advance)
    for label, row in of_depth.items():
      keys = [key for key in entrants if key[0] == label or key[1] == FLOOR]
      rows.append(row | {"contestants": {k[1]: found[" ".join(k)] for k in keys}})
  pages.write_page(
    "train", settings, rows, pages.device_of(rows), page(settings, rows)
  )


def _entrants(
  settings: SimpleNamespace, model: str, trunk: str, vocab: int
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], Entrant]]:
  """Returns the rows of all depths by label, and what runs by label and contestant."""
  rows, entrants = {}, {}
  for depth in settings.depths:
    config = harness.make_config(
      model, trunk, vocab, settings.kind, depth, settings.seq_len, settings.batch_size
    )
    validate(config)
    if not rows:  # One floor for all depths: large products at the same rate.
      build = functools.partial(limits.build_products, config)
      entrants[f"{model} {trunk} V={vocab}", FLOOR] = Entrant(
        build, settings.steps_per_round
      )
    counts = accounting.count(config)
    label = f"{model} {trunk} V={vocab} D={depth}"
    rows[label] = {
      "model": model, "trunk": trunk, "vocab": vocab, "depth": depth,
      "parameters": counts.total,
      "flops": counts.train_flops_per_token * settings.seq_len * settings.batch_size,
    }
    for name, build in _builds(settings, config).items():
      entrants[label, name] = Entrant(build, settings.steps_per_round)
  return rows, entrants


def _builds(
  settings: SimpleNamespace, config: Config
) -> dict[str, Callable[[], Any]]:
  builds: dict[str, Callable[[], Any]] = {}
  for name in settings.contestants:
    build = build_ours if name == OURS else functools.partial(
      torch_steps.build_train, name=name
    )
    builds[name] = functools.partial(build, config)
  for text in settings.variants:
    key, is_given, value = text.partition("=")
    if not is_given:
      raise ConfigError(f"--variants must be KEY=VALUE, got {text!r}.")
    if key == _XLA_FLAGS:
      builds[text] = functools.partial(build_ours, config, value)
      continue
    changed = with_overrides(config, {key: _value(value)})
    validate(changed)
    builds[text] = functools.partial(build_ours, changed)
  return builds


def _value(text: str) -> Any:
  """Returns the number or truth that a text means, or the text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def build_ours(
  config: Config, xla_flags: str = ""
) -> tuple[Callable[[], None], dict[str, Any]]:
  """Builds our step; `xla_flags` are added to those of the environment."""
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
  before = limits.resident_with_jax()
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  jax.set_mesh(mesh)
  train = programs(program_config(config), mesh)
  state = train.init(jnp.int32(0))
  batch = jax.tree.map(lambda x: x[None], harness.one_document_batch(config))
  batch = put_batch(mesh, batch, ("microbatch",))
  hyper = Hyperparameters(*(jnp.float32(x) for x in (1e-3, config.mtp.weight, 1e4)))
  arguments = (batch, hyper, jnp.bool_(True))
  program = train.step.lower(state, *arguments).compile()

  def step() -> None:
    nonlocal state
    state, report = program(state, *arguments)
    jax.block_until_ready((state, report))

  step()
  memory = program.memory_analysis()
  return step, {
    "hardware": jax.devices()[0].device_kind,
    "threads": len(os.sched_getaffinity(0)),
    "peak_memory": limits.peak_memory(step, before),
    "xla_memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
  }


def page(settings: SimpleNamespace, rows: list[dict[str, Any]]) -> list[str]:
  """Returns the paragraphs and tables of the page."""
  turns = "separate" if settings.apart else "interleaved"
  plain = {_model(row): row for row in rows if row["depth"] == 0}
  parts = [
    f"T={settings.seq_len}, B={settings.batch_size}, {settings.kind} predictors at D > "
    f"0. {settings.rounds} {turns} rounds of {settings.steps_per_round} steps. Times: "
    "median over rounds. Ratios: median over rounds [least, greatest]; below 1 our "
    "step is the faster. Floor: the model's FLOPs at the rate of products of large "
    "matrices, measured in every round. MFU: the model's FLOPs per second over the "
    "maker's figure for dense bfloat16, where that is known.",
    markdown(_sizes(r) | pages.compare(r) | _mfu(r) for r in rows),
  ]
  deeper = [row for row in rows if row["depth"] and _model(row) in plain]
  if deeper:
    parts += [
      "Cost of depth: step time over the step time at D = 0. Last column: the same "
      "over the ratio of model FLOPs.",
      markdown(_sizes(r) | _depth_cost(r, plain[_model(r)]) for r in deeper),
    ]
  return [
    *parts,
    "Peak memory of one warm step, model and optimizer state included: on a CPU the "
    "growth of the resident set, on a GPU the allocator's peak. XLA: arguments and "
    "temporaries of our compiled step by XLA's analysis. State: weights and optimizer "
    "state alone, three times four bytes per parameter.",
    markdown(_sizes(r) | _memory(r) for r in rows),
  ]


def _model(row: dict[str, Any]) -> tuple[Any, ...]:
  return row["model"], row["trunk"], row["vocab"]


def _sizes(row: dict[str, Any]) -> dict[str, Any]:
  model, trunk, vocab = _model(row)
  return {"model": model, "trunk": trunk, "V": vocab, "D": row["depth"]}


def _mfu(row: dict[str, Any]) -> dict[str, str]:
  peak = peak_flops(row["contestants"].get(OURS, {}).get("hardware", ""))
  seconds = rounds_of(row, OURS)
  if peak is None or not seconds:
    return {}
  return {"MFU": f"{row['flops'] / statistics.median(seconds) / peak:.0%}"}


def _depth_cost(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, str]:
  flops = row["flops"] / plain["flops"]
  cost = {
    name: ratios(rounds_of(row, name), rounds_of(plain, name))
    for name in row["contestants"]
    if name != FLOOR
  }
  return {"FLOPs": f"{flops:.2f}"} | {n: spread(x) for n, x in cost.items()} | {
    f"{OURS} / FLOPs": spread([x / flops for x in cost.get(OURS, [])])
  }


def _memory(row: dict[str, Any]) -> dict[str, str]:
  xla = row["contestants"].get(OURS, {}).get("xla_memory")
  return pages.megabytes(row, "peak_memory") | {
    "XLA MB": f"{xla / 1e6:.0f}" if xla else "-",
    "state MB": f"{12 * row['parameters'] / 1e6:.0f}",
  }
