"""Times the train step against its floor and PyTorch; shows what depth and memory cost.

  mtp-jax bench train --trunks=gpt2 --vocabs=264 --depths=0,1
  mtp-jax bench train --preset=gpu --models=350M --depths=0 \\
      --contestants=ours --variants=trunk.attention=xla --variants=trunk.remat=none

A step is forward, backward, clipping and AdamW, on random tokens, one document per row.
All contestants of one model, trunk and vocabulary take turns, whatever their depth. The
floor is the time that the model's FLOPs take at the rate of products of large matrices.

MFU: the model's FLOPs per second over the maker's figure for dense bfloat16, where that
is known. Cost of depth: step time over the step time at D = 0; FLOPs is the same ratio
of model FLOPs. Peak memory is the peak of one warm step, model and optimizer state
included: on a CPU the growth of the resident set, on a GPU the allocator's peak. XLA:
arguments and temporaries of our compiled step by XLA's analysis. Least: weights and
optimizer state alone, three times four bytes per parameter.
"""

import ast
import functools
import itertools
import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from launch.benchmarks import harness, limits, pages, torch_steps
from launch.benchmarks.harness import FLOOR, OURS, TORCH, Build
from launch.benchmarks.pages import ratios, rounds_of, spread
from launch.planning import roofline
from launch.tables import markdown
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.layouts import fastest_that_fits
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
harness.define_settings(
  PRESETS,
  {"models": harness.MODELS, "trunks": harness.TRUNKS, "contestants": (OURS, *TORCH)},
  contestants=f"of {', '.join((OURS, *TORCH))}",
  apart="end each contestant before the next is built, where memory does not hold all; "
  "they then take no turns",
)
_KIND = flags.DEFINE_enum(
  "kind", "sequential", ["sequential", "parallel", "linear", "medusa"],
  "predictors at depth > 0",
)
_VARIANTS = flags.DEFINE_multi_string(
  "variants", [], "KEY=VALUE,...: one more JAX contestant, with other values in its "
  "config; may be given again"
)


def main() -> None:
  """Measures, and writes the page.

  Raises:
    ConfigError: a variant, or sizes, that no model has.
  """
  settings = harness.read_settings(PRESETS, _KIND, _VARIANTS)
  cases = itertools.product(settings.models, settings.trunks, settings.vocabs)
  # All configs are checked before the first is measured.
  groups = [_by_depth(settings, *case) for case in cases]
  rows = harness.measure_all(groups, functools.partial(_measure, settings))
  pages.write_page("train", settings, rows, __doc__, page(rows))


def _by_depth(
  settings: SimpleNamespace, model: str, trunk: str, vocab: int
) -> list[tuple[dict[str, Any], dict[str, Build]]]:
  """Returns of each depth a row without contestants, and what builds these."""
  groups = []
  for depth in settings.depths:
    config = harness.make_config(
      model, trunk, vocab, settings.kind, depth, settings.seq_len, settings.batch_size
    )
    validate(config)
    flops = accounting.train_flops_per_token(config)
    row = {
      "model": model, "trunk": trunk, "V": vocab, "D": depth,
      "flops": flops * settings.seq_len * settings.batch_size,
    }
    groups.append((row, builds(settings, config)))
  return groups


def _measure(
  settings: SimpleNamespace, group: list[tuple[dict[str, Any], dict[str, Build]]]
) -> list[dict[str, Any]]:
  """Returns the rows of one model, whose contestants of all depths take turns."""
  of_depth, named = [], {}
  for row, of_row in group:
    label = f"{row['model']} {row['trunk']} V={row['V']}"
    # One floor for all depths: large products at the same rate.
    of_depth.append({
      name: label + (f" {name}" if name == FLOOR else f" D={row['D']} {name}")
      for name in of_row
    })
    named |= {of_depth[-1][name]: build for name, build in of_row.items()}
  found = harness.measure(named, settings)
  return [
    row | {"contestants": {name: found[key] for name, key in keys.items()}}
    for (row, _), keys in zip(group, of_depth, strict=True)
  ]


def builds(settings: SimpleNamespace, config: Config) -> dict[str, Build]:
  """Returns what builds the floor, the contestants and the variants of a config.

  Raises:
    ConfigError: a variant that is none.
  """
  found: dict[str, Build] = {FLOOR: functools.partial(limits.build_products, config)}
  for name in settings.contestants:
    found[name] = functools.partial(build_ours, config)
    if name != OURS:
      found[name] = functools.partial(torch_steps.build_train, config, name)
  for text in settings.variants:
    overrides = {}
    for pair in text.split(","):
      key, is_given, value = pair.partition("=")
      if not is_given:
        raise ConfigError(f"--variants must be KEY=VALUE, got {pair!r}.")
      overrides[key] = _value(value)
    changed = with_overrides(config, overrides)
    validate(changed)
    found[text] = functools.partial(build_ours, changed)
  return found


def _value(text: str) -> Any:
  """Returns the number or truth that a text means, or the text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def build_ours(config: Config) -> harness.Built:
  """Builds our step."""
  before = limits.resident_with_jax()
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  jax.set_mesh(mesh)
  train = programs(fastest_that_fits(program_config(config), mesh), mesh)
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
    "least_memory": 12 * accounting.count(config).total,
    **roofline.predicted(program, jax.devices()[0].device_kind),
  }


def page(rows: Iterable[dict[str, Any]]) -> list[str]:
  """Returns the tables of the page."""
  costs = depth_costs(rows)
  return [pages.compare(rows), *(["Cost of depth:", markdown(costs)] if costs else [])]


def depth_costs(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a line for each row at D > 0, of the models that were measured at D = 0."""
  plain = {(r["model"], r["trunk"], r["V"]): r for r in rows if r["D"] == 0}
  lines = []
  for row in rows:
    same = plain.get((row["model"], row["trunk"], row["V"]))
    if row["D"] and same:
      flops = row["flops"] / same["flops"]
      costs = {
        name: ratios(rounds_of(row, name), rounds_of(same, name))
        for name in row["contestants"]
        if name != FLOOR
      }
      sizes = {key: row[key] for key in ("model", "trunk", "V", "D")}
      lines.append(sizes | {"FLOPs": f"{flops:.2f}"} | {
        name: spread(cost) for name, cost in costs.items()
      } | {f"{OURS} / FLOPs": spread([x / flops for x in costs.get(OURS, [])])})
  return lines
