r"""Plans training on TPUs, on any machine: memory, work, collectives, time.

  mtp-jax plan --config=experiments/gains_with_scale.py:cluster \
      --topology=v5p --only='embed_dim=1024,arm=added,seed=0'
  mtp-jax plan --config=experiments/deepseek_v3.py:v3 --topology=v5p:8x16x16 \
      --output=experiments/results/plan

A topology is a TPU slice: v4, v5e, v5p or v6e with the chips along each axis. A bare
name takes as many chips as each trial's mesh has. --config.mesh.* tries another mesh.

The real train step is compiled for the slice, on any Linux machine that has the package
libtpu (requirements-plan.txt): memory and collectives are XLA's. A compilation takes
one to ten minutes per shape of trial; its report is kept in --compilation_cache. Time
follows from model FLOPs and --mfu, which is an assumption, not a result. Nothing is
trained and no text is read.

Exit code 1: some shape does not fit.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch import cli, paths, tables, trials
from launch.planning import steps, topologies
from launch.planning.topologies import Topology
from launch.states import Trial
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError, to_dict
from mtp_jax.config_rules import validate
from mtp_jax.predictors import kind_of
from mtp_jax.progress import Progress
from mtp_jax.sharding import MESH_AXES, make_mesh

cli.define_config()
_TOPOLOGY = flags.DEFINE_list(
  "topology", None, "TPU slices, separated by commas: v5p:4x4x4, v6e:16x16, v5p"
)
cli.require("topology")
_MFU = flags.DEFINE_float(
  "mfu", 0.4, "model FLOPs per second over the chips' peak that is assumed"
)
trials.define_flags()
_OUTPUT = flags.DEFINE_string(
  "output", None, "folder for the plan as .md and .json; by default nothing is written"
)
_COMPILATION_CACHE = cli.define_compilation_cache()
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def main() -> int:
  jax.config.update("jax_platforms", "cpu")  # No TPU is needed, not even one at hand.
  if not 0 < _MFU.value <= 1:
    raise ConfigError(f"--mfu must be in (0, 1], got {_MFU.value}.")
  if _OUTPUT.value is not None:
    paths.check_folder("output", _OUTPUT.value)
  wanted = [topologies.parse(text) for text in _TOPOLOGY.value]
  everything, chosen = trials.from_flags(Path("."))
  # All meshes are checked before the first compilation.
  shapes = [check(chosen, topology) for topology in wanted]
  cache = Path(_COMPILATION_CACHE.value) if _COMPILATION_CACHE.value else None
  file, preset = cli.config_file()
  title = f"{file.stem}:{preset}" if preset else file.stem
  progress, done, total = Progress("shapes"), 0, sum(map(len, shapes))
  fits = True
  for topology, of_shape in zip(wanted, shapes, strict=True):
    rows = {}
    for shape, (fitted, same) in of_shape.items():
      print(f"{same[0].name} on {fitted}", file=sys.stderr, flush=True)
      progress("planned", done, total)
      rows[shape] = plan(fitted, same, cache, _MFU.value)
      done += 1
    fits = fits and all(row["fits"] for row in rows.values())
    name = f"{title}-{topology}".replace(":", "-")
    record = tables.facts(["launch.plan"], _PACKAGES)
    tables.write_page(
      Path(_OUTPUT.value) / name if _OUTPUT.value else None, f"{title} on {topology}",
      record | {"mfu": _MFU.value, "rows": list(rows.values())},
      page(topology, rows, chosen, everything, _MFU.value),
    )
  progress.close()
  return 0 if fits else 1


def check(
  chosen: Iterable[Trial], topology: Topology
) -> dict[Config, tuple[Topology, list[Trial]]]:
  """Returns the topology and the trials of every shape.

  Raises:
    ConfigError: a mesh that the topology does not have, or libtpu is missing.
  """
  shapes: dict[Config, tuple[Topology, list[Trial]]] = {}
  for trial in chosen:
    try:
      fitted = topologies.fit_to_mesh(topology, trial.config.mesh)
      validate(trial.config, fitted.num_chips)
      topologies.devices(fitted)
    except ConfigError as error:
      raise ConfigError(f"{trial.name} on {topology}: {error}") from error
    shapes.setdefault(trial.program, (fitted, []))[1].append(trial)
  return shapes


def plan(
  topology: Topology, same: Sequence[Trial], cache: Path | None, mfu: float
) -> dict[str, Any]:
  """Returns the row of trials of one program; bytes and collectives are of one chip."""
  trial, chip, chips = same[0], topology.chip, topology.num_chips
  shape, data = trial.program, trial.program.data
  mesh = make_mesh(shape.mesh, list(topologies.devices(topology)))
  state = steps.abstract_state(shape, mesh)
  report = steps.compile_step(shape, mesh, cache)
  tokens = data.batch_size * data.seq_len
  flops = accounting.train_flops_per_token(shape) * tokens
  seconds = flops / (mfu * chip.peak_flops * chips)
  peak = report["peak"]
  return {
    "shape": trial.name,
    "topology": str(topology),
    "chips": chips,
    "mesh": {k: v for k, v in to_dict(trial.config)["mesh"].items() if k in MESH_AXES},
    "trials": len(same),
    "parameters": trial.counts.total,
    "rows_per_chip": data.batch_size * shape.mesh.tensor * shape.mesh.context / chips,
    "accumulation_steps": shape.train.accumulation_steps,
    "params_bytes": steps.tree_bytes(state.params),
    "optimizer_bytes": steps.tree_bytes(state.opt_state),
    "hbm_bytes": chip.hbm_bytes,
    "hbm_source": chip.source,
    "peak_flops": chip.peak_flops,
    **report,
    "fits": peak is not None and peak <= chip.hbm_bytes,
    "model_flops": flops,
    "steps": trial.num_steps,
    "tokens": trial.num_tokens,
    "seconds_per_step": seconds,
  }


def page(
  topology: Topology,
  rows: dict[Config, dict[str, Any]],
  chosen: list[Trial],
  everything: list[Trial],
  mfu: float,
) -> list[str]:
  """Returns the paragraphs and tables of the plan of one topology."""
  chip = topology.chip
  costs = (depth_cells(shape, row, rows) for shape, row in rows.items())
  depth = [cost for cost in costs if cost is not None]
  parts = [
    f"{chip.name}: {chip.hbm_bytes / 1e9:g} GB, {chip.peak_flops / 1e12:g} TFLOP/s "
    f"({chip.source}). Figures are those of one chip and one step. XLA counts the "
    "FLOPs of a loop's body once. Collectives: how often they run, and the bytes of "
    f"their results. Time is at {mfu:.0%} of the peak, an assumption.",
    tables.markdown(map(cells, rows.values())),
    f"Planned: {_totals(chip, chosen, mfu)}. Whole sweep: "
    f"{_totals(chip, everything, mfu)}.",
  ]
  if depth:
    parts += [
      "## Cost of depth, against D = 0",
      "Time at equal utilisation: the ratio of model FLOPs.",
      tables.markdown(depth),
    ]
  return parts


def cells(row: dict[str, Any]) -> dict[str, str]:
  """Returns the cells of a row: memory, work, collectives and time."""
  mesh = ",".join(f"{k}={v}" for k, v in row["mesh"].items() if v != 1)
  sizes = ("params_bytes", "optimizer_bytes", "temporaries", "peak", "hbm_bytes")
  xla, seconds = row.get("xla_flops"), row["seconds_per_step"]
  hours = seconds * row["steps"] / 3600
  return {
    "shape": row["shape"], "chips": row["topology"], "mesh": mesh or "data=1",
    "parameters": f"{row['parameters']:,}", "rows/chip": f"{row['rows_per_chip']:g}",
    "microbatches": str(row["accumulation_steps"]),
    **{f"{key.removesuffix('_bytes')} GB": _giga(row.get(key)) for key in sizes},
    "fits": "yes" if row["fits"] else "NO",
    "model TFLOPs": f"{row['model_flops'] / row['chips'] / 1e12:.4g}",
    "XLA TFLOPs": f"{xla / 1e12:.4g}" if xla else "-",
    **{
      kind: f"{counts['count']:,}, {_giga(counts['bytes'])} GB"
      for kind, counts in row.get("collectives", {}).items()
    },
    "loops of unknown length": str(row.get("unknown_loops", "-")),
    "steps": f"{row['steps']:,}", "seconds/step": f"{seconds:.3g}",
    "tokens/s": f"{row['tokens'] / row['steps'] / seconds:,.0f}",
    "days": f"{hours / 24:.3g}", "chip-hours": f"{hours * row['chips']:,.0f}",
  }


def depth_cells(
  shape: Config, row: dict[str, Any], rows: dict[Config, dict[str, Any]]
) -> dict[str, Any] | None:
  """Returns what depth costs against the plain row of the same trunk and mesh."""
  plain = next((
    other
    for key, other in rows.items()
    if not kind_of(key.mtp).has_depths and _trunk(key) == _trunk(shape)
  ), None)
  if plain is None or plain is row:
    return None

  def ratio(size: Any) -> str:
    above, below = size(row), size(plain)
    return f"x{above / below:.3f}" if above and below else "-"

  return {
    "width": shape.trunk.embed_dim, "layers": shape.trunk.num_layers,
    "kind": shape.mtp.kind, "D": shape.mtp.depth, "arm": shape.mtp.arm,
    "parameters": ratio(lambda r: r["parameters"]),
    "peak GB": _giga(row["peak"]),
    "peak": ratio(lambda r: r["peak"]),
    "time": ratio(lambda r: r["model_flops"]),
    "collectives": ratio(
      lambda r: sum(x["bytes"] for x in r.get("collectives", {}).values())
    ),
  }


def _trunk(shape: Config) -> tuple[Any, ...]:
  return shape.trunk, shape.data, shape.mesh, shape.train, shape.loss


def _totals(chip: topologies.Chip, of: Sequence[Trial], mfu: float) -> str:
  flops = sum(trial.flops for trial in of)
  hours = flops / (mfu * chip.peak_flops) / 3600
  tokens = sum(trial.num_tokens for trial in of)
  return (
    f"{len(of)} trial(s): {tokens:.3g} tokens, {flops:.3g} model FLOPs, {hours:,.0f} "
    f"{chip.name} chip-hours"
  )


def _giga(size: float | None) -> str:
  return "-" if size is None else f"{size / 1e9:,.2f}"


if __name__ == "__main__":
  cli.run(main)
