r"""Plans training on accelerators that are not there: memory, work, traffic, time.

  python -m launch.plan --config=experiments/gains_with_scale.py:cluster \
      --topology=v5p --only='embed_dim=1024,arm=added,seed=0'
  python -m launch.plan --config=experiments/deepseek_v3.py:v3 --topology=v5p:8x16x16
  python -m launch.plan --config=experiments/gains_with_scale.py:cluster \
      --topology=h100,h200 --output=experiments/results/plan

A topology is a TPU slice (v5p:4x4x4, chips along each axis), GPUs of a node (h100:8) or
of several (h100:8x16, nodes last). A bare name takes as many chips as each trial's mesh
has. --config.mesh.* tries another mesh.

For TPUs the real train step is compiled, on any machine that has the package libtpu
(requirements-plan.txt): memory and collectives are XLA's. It takes minutes per shape of
trial, and is kept in --compilation_cache. For GPUs they are the formula in
launch/planning/estimate.py. Time follows from model FLOPs and --mfu, which is an
assumption, not a result. Nothing is trained and no text is read.

Exit code 1: some shape does not fit.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from launch import cli, trials
from launch.benchmarks.records import environment
from launch.planning import report, rows, topologies
from launch.planning.topologies import Topology
from launch.trials import Trial
from mtp_jax.config import ConfigError
from mtp_jax.metrics import write_json

cli.define_config()
_TOPOLOGY = flags.DEFINE_list(
  "topology", None, "accelerators, separated by commas: v5p:4x4x4, h100:8x16, v5p"
)
flags.mark_flag_as_required("topology")
_MFU = flags.DEFINE_float(
  "mfu", 0.4, "model FLOPs per second over the chips' peak that is assumed"
)
_SWEEP = flags.DEFINE_list(
  "sweep", None, "which sweep_<name> of the experiment to cross; by default all"
)
_ONLY = flags.DEFINE_string(
  "only", None, "plan only the trials whose name has these parts; see launch.sweep"
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "folder for PLAN.md and PLAN.json; by default nothing is written"
)
_COMPILATION_CACHE = cli.define_compilation_cache()


def main() -> int:
  jax.config.update("jax_platforms", "cpu")  # Not even a TPU that is there is needed.
  if not 0 < _MFU.value <= 1:
    raise ConfigError(f"--mfu must be in (0, 1], got {_MFU.value}.")
  file, preset = cli.config_file()
  experiment = trials.load_experiment(file)
  everything = trials.plan(
    cli.load_config(),
    cli.config_overrides(),
    trials.points(experiment, preset, _SWEEP.value),
    Path("."),
  )
  chosen = trials.select(everything, _ONLY.value)
  wanted = [topologies.parse(text) for text in _TOPOLOGY.value]
  # All meshes before the first compilation.
  shapes = [rows.check(chosen, topology) for topology in wanted]
  cache = Path(_COMPILATION_CACHE.value) if _COMPILATION_CACHE.value else None
  fits = True
  for topology, of_shape in zip(wanted, shapes, strict=True):
    found = _plan(list(of_shape.values()), cache)
    text = _text(topology, found, chosen, everything)
    print(f"\n{text}")
    fits = fits and all(row.fits for row in found)
    if _OUTPUT.value:
      _write(Path(_OUTPUT.value), topology, found, text)
  return 0 if fits else 1


def _plan(
  of_shape: Sequence[tuple[Topology, list[Trial]]], cache: Path | None
) -> list[rows.Row]:
  """Makes the rows, and says how far it is and how long the rest may take."""
  start, found = time.monotonic(), []
  for number, (topology, same) in enumerate(of_shape, start=1):
    left = ""
    if found:
      rate = (time.monotonic() - start) / len(found)
      left = f", about {rate * (len(of_shape) - len(found)) / 60:.0f} min left"
    _say(f"[{number}/{len(of_shape)}{left}] {same[0].name} on {topology}")
    found.append(rows.make_row(topology, same, cache, _say))
  return found


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _text(
  topology: Topology,
  found: list[rows.Row],
  chosen: list[Trial],
  everything: list[Trial],
) -> str:
  """Returns the plan of one topology as Markdown."""
  chip, mfu = topology.chip, _MFU.value
  depth = report.depth_table(found)
  parts = [
    f"# {_title()} on {topology}",
    f"`python -m launch.plan {' '.join(map(_shell, _arguments()))}`",
    f"{report.today()}, commit {environment()['commit']}; "
    + ", ".join(f"{k} {v}" for k, v in report.versions().items())
    + ".",
    f"{chip.name}: {chip.hbm_bytes / 1e9:g} GB, {chip.peak_flops / 1e12:g} TFLOP/s "
    f"({chip.source}).",
    "## Memory of one chip",
    report.markdown(report.memory_table(found)),
    "## Work and traffic of one chip in a step",
    report.markdown(report.traffic_table(found)),
    f"## A run at {mfu:.0%} of the peak (assumed)",
    report.markdown(report.run_table(found, chosen, mfu)),
    f"Planned: {report.totals(found, chosen, mfu)}.",
  ]
  if len(everything) > len(chosen):
    parts.append(f"Whole sweep: {report.totals(found, everything, mfu)}.")
  if depth is not None:
    parts += ["## What depth costs, against D = 0", report.markdown(depth)]
  return "\n\n".join(parts) + "\n"


def _title() -> str:
  file, preset = cli.config_file()
  return f"{file.stem}:{preset}" if preset else file.stem


def _arguments() -> list[str]:
  """The flags that a plan depends on."""
  return [a for a in sys.argv[1:] if not re.match("--?compilation_cache", a)]


def _shell(argument: str) -> str:
  return f"'{argument}'" if any(c in argument for c in "*,; ") else argument


def _write(
  folder: Path, topology: Topology, found: list[rows.Row], text: str
) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  name = f"{_title()}-{topology}".replace(":", "-")
  (folder / f"{name}.md").write_text(text)
  write_json(
    folder / f"{name}.json",
    {
      "command": ["python", "-m", "launch.plan", *_arguments()],
      "date": report.today(),
      "commit": environment()["commit"],
      "versions": report.versions(),
      "overrides": json.loads(json.dumps(cli.config_overrides(), default=str)),
      "mfu": _MFU.value,
      "rows": [report.record(row, _MFU.value) for row in found],
    },
  )
  print(f"written to {folder / name}.md and .json")


if __name__ == "__main__":
  cli.run(main)
