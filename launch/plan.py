r"""Plans training on TPUs and GPUs, on any machine: memory, work, collectives, time.

  mtp-jax plan --config=experiments/gains_with_scale.py:cluster \
      --topology=v5p --only='embed_dim=1024,arm=added,seed=0'
  mtp-jax plan --config=experiments/deepseek_v3.py:v3 --topology=v5p:8x16x16 \
      --output=experiments/results/plan
  mtp-jax plan --config=experiments/gains_with_scale.py:gpu \
      --topology=h200:1,h200:8 --only='embed_dim=768,depth=1,arm=added,seed=0'

A topology is a TPU slice, v4, v5e, v5p or v6e with the chips along each axis, or a
number of GPUs, a100, h100, h200 or b200. A bare name takes as many as each trial's mesh
has. --config.mesh.* tries another mesh.

The real train step is compiled for these devices, on any Linux machine that has the
compilers (requirements-plan.txt): memory, collectives and kernels are XLA's. A
compilation takes ten seconds to ten minutes per program; its report is kept in
--compilation_cache. For GPUs --packs and --decode also compile steps of packs and
rounds of decoding. Time follows from model FLOPs and --mfu, which is an assumption,
not a result. For GPUs a roofline shows the time by kind of kernel: a model, not a
measurement. Nothing is trained and no text is read.

Exit code 1: some program does not fit.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from absl import flags

from launch import cli, paths, tables, trials
from launch.planning import roofline, steps, topologies
from launch.planning.chips import Chip, Gpu
from launch.planning.topologies import Topology
from launch.states import Trial
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError, to_dict, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.layouts import abstract_state
from mtp_jax.predictors import kind_of
from mtp_jax.progress import Progress
from mtp_jax.sharding import MESH_AXES, make_mesh

cli.define_config()
_TOPOLOGY = flags.DEFINE_list(
  "topology", None, "devices, separated by commas: v5p:4x4x4, v6e:16x16, v5p, h200:8"
)
cli.require("topology")
_MFU = flags.DEFINE_float(
  "mfu", 0.4, "model FLOPs per second over the chips' peak that is assumed"
)
_PACKS = flags.DEFINE_list(
  "packs", [], "also plan packs of so many trials, on one GPU: 8,32"
)
_DECODE = flags.DEFINE_list(
  "decode", [], "also plan rounds of decoding so many texts at once, on one GPU: 1,64"
)
trials.define_flags()
_OUTPUT = flags.DEFINE_string(
  "output", None, "folder for the plan as .md and .json; by default nothing is written"
)
_COMPILATION_CACHE = cli.define_compilation_cache()
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "flax", "optax")


def main() -> int:
  jax.config.update("jax_platforms", "cpu")  # No accelerator is needed.
  if not 0 < _MFU.value <= 1:
    raise ConfigError(f"--mfu must be in (0, 1], got {_MFU.value}.")
  if _OUTPUT.value is not None:
    paths.check_folder("output", _OUTPUT.value)
  wanted = [topologies.parse(text) for text in _TOPOLOGY.value]
  sizes = {flag.name: _sizes(flag, wanted) for flag in (_PACKS, _DECODE)}
  everything, chosen = trials.from_flags(Path("."))
  # All meshes are checked before the first compilation.
  programs = [check(chosen, topology) for topology in wanted]
  cache = Path(_COMPILATION_CACHE.value) if _COMPILATION_CACHE.value else None
  file, preset = cli.config_file()
  title = f"{file.stem}:{preset}" if preset else file.stem
  progress, done, total = Progress("programs"), 0, sum(map(len, programs))
  fits = True
  for topology, of_program in zip(wanted, programs, strict=True):
    rows = {}
    for program, (fitted, same) in of_program.items():
      print(f"{same[0].name} on {fitted}", file=sys.stderr, flush=True)
      progress("planned", done, total)
      rows[program] = plan(fitted, same, cache, _MFU.value, sizes)
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


def _sizes(flag: flags.FlagHolder, wanted: Sequence[Topology]) -> list[int]:
  """Returns the numbers of a flag.

  Raises:
    ConfigError: they are no numbers, or not for GPUs.
  """
  if not all(x.isdecimal() and int(x) for x in flag.value):
    raise ConfigError(
      f"--{flag.name} must be numbers of at least 1, got {','.join(flag.value)}."
    )
  others = [str(x) for x in wanted if not isinstance(x.chip, Gpu)]
  if flag.value and others:
    raise ConfigError(
      f"--{flag.name} must have GPUs in --topology alone, got {', '.join(others)}."
    )
  return [int(x) for x in flag.value]


def check(
  chosen: Iterable[Trial], topology: Topology
) -> dict[Config, tuple[Topology, list[Trial]]]:
  """Returns the topology and the trials of every program.

  Raises:
    ConfigError: a mesh that the topology does not have, or its compiler is missing.
  """
  programs: dict[Config, tuple[Topology, list[Trial]]] = {}
  for trial in chosen:
    try:
      fitted = topologies.fit_to_mesh(topology, trial.config.mesh)
      platform = "gpu" if isinstance(fitted.chip, Gpu) else "tpu"
      with topologies.kernels_of(fitted.chip):
        validate(trial.config, fitted.num_chips, platform)
      topologies.devices(fitted)
    except ConfigError as error:
      raise ConfigError(f"{trial.name} on {topology}: {error}") from error
    programs.setdefault(trial.program, (fitted, []))[1].append(trial)
  return programs


def plan(
  topology: Topology, same: Sequence[Trial], cache: Path | None, mfu: float,
  sizes: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, Any]:
  """Returns the row of trials of one program; bytes and collectives are of one chip.

  `sizes`: numbers of trials or texts, whose reports the row has too, by key of `SIZED`.
  """
  trial, chip, chips = same[0], topology.chip, topology.num_chips
  data = trial.program.data
  of_mesh = trial.program.mesh
  split = of_mesh.tensor * of_mesh.context  # Devices that share rows.
  mesh = make_mesh(of_mesh, list(topologies.devices(topology)))
  # Ways to run the layers are compiled until one fits: the row has the program that a
  # run would train.
  program, report = steps.fitting_step(trial.program, mesh, chip, cache)
  with topologies.kernels_of(chip):
    state = abstract_state(program, mesh)
  tokens = data.batch_size * data.seq_len
  flops = accounting.train_flops_per_token(program) * tokens
  seconds = flops / (mfu * chip.peak_flops * chips)
  peak = report["peak"]
  # Packs and rounds run on one GPU, whatever the mesh.
  alone = with_overrides(trial.resolved, {f"mesh.{axis}": 1 for axis in MESH_AXES})
  one = mesh.devices.flat[0]
  return {
    "program": trial.name,
    "topology": str(topology),
    "chips": chips,
    "mesh": {k: v for k, v in to_dict(trial.config)["mesh"].items() if k in MESH_AXES},
    "trials": len(same),
    "parameters": trial.counts.total,
    "rows_per_chip": data.batch_size * split / chips,
    "scan_layers": program.trunk.scan_layers,
    "remat": program.trunk.remat,
    "accumulation_steps": program.train.accumulation_steps,
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
    **{
      flag: {
        size: sized.compile(alone, size, one, chip, cache)
        for size in sizes.get(flag, ())
      }
      for flag, sized in SIZED.items()
    },
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
  costs = (depth_cells(program, row, rows) for program, row in rows.items())
  depth = [cost for cost in costs if cost is not None]
  parts = [
    f"{chip.name}: {chip.hbm_bytes / 1e9:g} GB, {chip.peak_flops / 1e12:g} TFLOP/s "
    f"({chip.source}). Figures are for one chip and one step. XLA counts the "
    "FLOPs of a loop's body once. Collectives: how often they run, and the bytes of "
    f"their results. Time is at {mfu:.0%} of the peak, an assumption.",
    tables.markdown(map(cells, rows.values())),
    *(gpu_parts(chip, rows.values()) if isinstance(chip, Gpu) else ()),
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
    "program": row["program"], "chips": row["topology"], "mesh": mesh or "data=1",
    "parameters": f"{row['parameters']:,}", "rows/chip": f"{row['rows_per_chip']:g}",
    "loop, remat": f"{row['scan_layers']}, {row['remat']}",
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


def gpu_parts(chip: Gpu, rows: Collection[dict[str, Any]]) -> list[str]:
  """Returns the sections that only plans for GPUs have."""
  sized = [part for flag in SIZED for part in sized_parts(chip, rows, flag)]
  return roofline_parts(chip, rows) + sized


def roofline_parts(chip: Gpu, rows: Iterable[dict[str, Any]]) -> list[str]:
  """Returns the section with the time of every program by kind of kernel."""
  lines = []
  for row in rows:
    if "kernels" not in row:  # The compiler refused it.
      continue
    below = "< " if row["unknown_loops"] else ""
    peak = chip.peak_flops * row["chips"] * _roofline_seconds(row)
    lines.append({"program": row["program"]} | kernel_cells(row) | {
      "MFU": f"{below}{row['model_flops'] / peak:.1%}"
    })
  return [
    "## Roofline: a model, not a measurement",
    "Kernels of one step on one GPU: time, number, bytes read and written. "
    f"{roofline.ASSUMED.format(chip=chip)} Nothing overlaps. Loops of unknown length "
    "count once. XLA chose the kernels without trying them; a GPU tries them.",
    tables.markdown(lines),
  ] if lines else []


def kernel_cells(report: dict[str, Any]) -> dict[str, str]:
  """Returns the cells of a program's kernels: number, time and bytes by kind."""
  kinds = report["kernels"]
  # What loops of unknown length repeat is missing.
  above = "> " if report["unknown_loops"] else ""
  return {
    "kernels": f"{sum(x['count'] for x in kinds.values()):,}",
    **{
      kind: f"{1e3 * x['seconds']:.2f} ms, {x['count']:,}, {_giga(x['bytes'])} GB"
      for kind, x in kinds.items() if x["count"]
    },
    "roofline ms": f"{above}{1e3 * _roofline_seconds(report):.2f}",
  }


def _roofline_seconds(report: dict[str, Any]) -> float:
  return sum(x["seconds"] for x in report["kernels"].values())


class Sized(NamedTuple):
  """A program on one GPU that a flag asks for, once for each of its numbers.

  unit:    what the numbers count.
  compile: returns the report of a config, a number, a device, its kind, and the cache.
  """

  unit: str
  compile: Callable[..., dict[str, Any]]
  title: str
  text: str


# {name of the flag: what it plans}
SIZED = {
  "packs": Sized(
    "trial", steps.compile_pack, "Packs: trials side by side",
    "One step of all trials, by the same roofline. Packs take XLA's attention, because "
    "cuDNN's cannot be stacked.",
  ),
  "decode": Sized(
    "text", steps.compile_round, "Decoding: one round",
    "Greedy, with all predictors as drafters: a round commits 1 to D + 1 tokens of "
    "every text. Caches have room for 192 tokens. Floor: the time in which the memory "
    "reads the weights at {chip.bandwidth:.3g} bytes/s.",
  ),
}


def sized_parts(chip: Gpu, rows: Iterable[dict[str, Any]], flag: str) -> list[str]:
  """Returns the section of one of `SIZED`: a line for every program and number."""
  sized, lines = SIZED[flag], []
  for row in rows:
    for size, report in row[flag].items():
      each = _roofline_seconds(report) / size
      lines.append(
        {"program": row["program"], f"{sized.unit}s": str(size)}
        | {"peak GB": _giga(report["peak"])} | kernel_cells(report)
        | {f"ms/{sized.unit}": f"{1e3 * each:.3g}"}
      )
      if "read" in report:
        floor = report["read"] / chip.bandwidth
        lines[-1] |= {
          "weights GB": _giga(report["read"]), "floor ms": f"{1e3 * floor:.3g}"
        }
  return [
    f"## {sized.title} on one GPU", sized.text.format(chip=chip), tables.markdown(lines)
  ] if lines else []


def depth_cells(
  program: Config, row: dict[str, Any], rows: dict[Config, dict[str, Any]]
) -> dict[str, Any] | None:
  """Returns what depth costs against the plain row of the same trunk and mesh."""
  plain = next((
    other
    for key, other in rows.items()
    if not kind_of(key.mtp).has_depths and _trunk(key) == _trunk(program)
  ), None)
  if plain is None or plain is row:
    return None

  def ratio(size: Any) -> str:
    above, below = size(row), size(plain)
    return f"x{above / below:.3f}" if above and below else "-"

  return {
    "width": program.trunk.embed_dim, "layers": program.trunk.num_layers,
    "kind": program.mtp.kind, "D": program.mtp.depth, "arm": program.mtp.arm,
    "parameters": ratio(lambda r: r["parameters"]),
    "peak GB": _giga(row["peak"]),
    "peak": ratio(lambda r: r["peak"]),
    "time": ratio(lambda r: r["model_flops"]),
    "collectives": ratio(
      lambda r: sum(x["bytes"] for x in r.get("collectives", {}).values())
    ),
  }


def _trunk(program: Config) -> tuple[Any, ...]:
  return program.trunk, program.data, program.mesh, program.train, program.loss


def _totals(chip: Chip, of: Sequence[Trial], mfu: float) -> str:
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
