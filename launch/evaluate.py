r"""Evaluates a checkpoint of a run again: other text, another step, other devices.

  mtp-jax evaluate --workdir=runs/smoke --split=test
  mtp-jax evaluate --workdir=runs/smoke --step=50

The run folder holds how the model was trained. Its mesh is used where it fits the
devices; where it does not, rows are spread over all of them. The table is also written
to eval_<split>.json in the run folder (eval_<split>_step<N>.json with --step), beside
the eval.json of training, which is not touched; docs/reference has the fields.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch import cli
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import Config, MeshConfig
from mtp_jax.evaluate import NO_ERROR
from mtp_jax.files import write_json
from mtp_jax.saved_model import portable
from mtp_jax.train import evaluate_run

_WORKDIR = cli.define_workdir("run folder")
_SPLIT = flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "which held-out documents"
)
_STEP = cli.define_step()
_COMPILATION_CACHE = cli.define_compilation_cache()


def main() -> int:
  workdir, split = Path(_WORKDIR.value), _SPLIT.value
  config = cli.load_run_config(workdir)
  limits = dataclasses.replace(config.eval, split=split)
  config = portable(dataclasses.replace(config, eval=limits))
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  config = fit_to_devices(config, jax.device_count())
  with cli.as_bad_input(CheckpointError):
    result = evaluate_run(config, workdir, _STEP.value)
  suffix = "" if _STEP.value is None else f"_step{_STEP.value}"
  path = workdir / f"eval_{split}{suffix}.json"
  print(f"{workdir}: step {result['step']:,}, {split} split")
  print(result_table(result), flush=True)
  try:
    write_json(path, result)
  except OSError as error:  # A run that is read-only, or a full disk.
    reason = error.strerror or error
    print(f"warning: {path} could not be written: {reason}.", file=sys.stderr)
    return 0
  print(f"written to {path}")
  return 0


def fit_to_devices(config: Config, num_devices: int) -> Config:
  """Returns the config with a mesh and an evaluation batch for so many devices."""
  mesh = dataclasses.replace(config.mesh, data=-1)
  if num_devices % (mesh.fsdp * mesh.expert * mesh.tensor * mesh.context):
    mesh = MeshConfig(data=-1, fsdp=1, expert=1, tensor=1, context=1)
  shards = num_devices // (mesh.tensor * mesh.context)
  batch_size = -(-config.eval.batch_size // shards) * shards
  limits = dataclasses.replace(config.eval, batch_size=batch_size)
  return dataclasses.replace(config, mesh=mesh, eval=limits)


def result_table(result: dict[str, Any]) -> str:
  """Returns a row for every mean in an eval.json, depths numbered from 0 or 1."""
  rows = []
  for name, value in result.items():
    entries = {name: value}
    if isinstance(value, list):  # The extra depths draft.
      first = 0 if name.startswith("depth") else 1
      entries = {f"{name}, depth {first + i}": x for i, x in enumerate(value)}
    for label, entry in entries.items():
      if isinstance(entry, dict) and "mean" in entry:
        mean, error = (_number(entry[key]) for key in ("mean", "stderr"))
        rows.append((label, mean, error or (mean and NO_ERROR)))
  return cli.table(("", "mean", "standard error"), rows)


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
  cli.run(main)
