"""Rows of a plan as tables and records: what fits, what it takes, what depth costs."""

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from launch.planning import hlo
from launch.planning.rows import Row
from launch.trials import Trial
from mtp_jax.config import Config, MeshConfig
from mtp_jax.sharding import MESH_AXES

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
_MISSING = "-"


def memory_table(rows: Sequence[Row]) -> Table:
  """Returns what lies on one chip, in GB (10^9 bytes), and whether it fits."""
  header = (
    "shape", "chips", "mesh", "parameters", "rows/chip", "params GB", "optimizer GB",
    "temporaries GB", "peak GB", "usable GB", "fits", "from",
  )
  return header, [
    (
      row.name,
      str(row.topology),
      mesh_text(row.config.mesh),
      f"{row.params:,}",
      f"{_rows_per_chip(row):g} x {row.config.train.accumulation_steps}",
      _giga(row.params_bytes),
      _giga(row.optimizer_bytes),
      _giga(row.temporaries),
      _giga(row.peak),
      _giga(row.usable),
      "yes" if row.fits else "NO",
      row.source,
    )
    for row in rows
  ]


def traffic_table(rows: Sequence[Row]) -> Table:
  """Returns what one chip computes and sends per step."""
  header = (
    "shape", "model TFLOPs/chip", "products/model", *(f"{k} GB" for k in hlo.KINDS),
    "collectives", "all GB",
  )
  table = []
  for row in rows:
    sent = row.sent or {}
    calls = _MISSING if row.calls is None else f"{sum(row.calls.values()):,}"
    if row.unknown_loops:
      calls = f"at least {calls}"
    table.append(
      (
        row.name,
        f"{row.model_flops / row.topology.num_chips / 1e12:.4g}",
        f"{row.matmul_flops / row.model_flops:.2f}" if row.matmul_flops else _MISSING,
        *(_giga(sent.get(kind)) for kind in hlo.KINDS),
        calls,
        _giga(sum(sent.values()) if sent else None),
      )
    )
  return header, table


def run_table(rows: Sequence[Row], trials: Iterable[Trial], mfu: float) -> Table:
  """Returns time and chip-hours of one run of every shape at a utilisation.

  The last column is how fast a chip must send for all traffic to be hidden.
  """
  steps = {}
  for trial in trials:
    steps.setdefault(trial.shape, trial.num_steps)
  header = (
    "shape", "steps", "tokens", "seconds/step", "tokens/s", "days", "chip-hours",
    "GB/s sent",
  )
  table = []
  for row in rows:
    data, seconds = row.config.data, row.step_seconds(mfu)
    tokens, count = data.batch_size * data.seq_len, steps[row.config]
    hours = seconds * count / 3600
    table.append(
      (
        row.name,
        f"{count:,}",
        f"{count * tokens:.3g}",
        f"{seconds:.3g}",
        f"{tokens / seconds:,.0f}",
        f"{hours / 24:.3g}",
        f"{hours * row.topology.num_chips:,.0f}",
        _MISSING if row.sent is None else _giga(sum(row.sent.values()) / seconds),
      )
    )
  return header, table


def depth_table(rows: Sequence[Row]) -> Table | None:
  """Returns what depth costs against D = 0 of the same trunk and mesh.

  Time is that of equal utilisation: the ratio of model FLOPs.
  """
  baselines = {_trunk_key(row.config): row for row in rows if _is_plain(row.config)}
  header = (
    "width", "layers", "kind", "D", "arm", "parameters", "peak GB", "more GB", "memory",
    "time", "sent",
  )
  table = []
  for row in rows:
    config, base = row.config, baselines.get(_trunk_key(row.config))
    if base is None or row is base:
      continue
    known = row.peak is not None and base.peak is not None
    traffic = bool(row.sent and base.sent and sum(base.sent.values()))
    table.append(
      (
        str(config.trunk.embed_dim),
        str(config.trunk.num_layers),
        config.mtp.kind,
        str(config.mtp.depth),
        config.mtp.arm,
        f"x{row.params / base.params:.3f}",
        _giga(row.peak),
        _giga(row.peak - base.peak if known else None),
        f"x{row.peak / base.peak:.3f}" if known else _MISSING,
        f"x{row.model_flops / base.model_flops:.3f}",
        f"x{sum(row.sent.values()) / sum(base.sent.values()):.3f}"
        if traffic
        else _MISSING,
      )
    )
  return (header, table) if table else None


def totals(rows: Sequence[Row], trials: Sequence[Trial], mfu: float) -> str:
  """Returns one line: the whole of `trials` on the chips of the rows."""
  chip = rows[0].topology.chip
  flops = sum(trial.flops for trial in trials)
  hours = flops / (mfu * chip.peak_flops) / 3600
  tokens = sum(trial.num_tokens for trial in trials)
  return (
    f"{len(trials)} trial(s): {tokens:.3g} tokens, {flops:.3g} model FLOPs, "
    f"{hours:,.0f} {chip.name} chip-hours at {mfu:.0%} of {chip.peak_flops / 1e12:g} "
    "TFLOP/s"
  )


def markdown(table: Table) -> str:
  """Returns a table for a .md file."""
  header, rows = table
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(row: Row, mfu: float) -> dict[str, Any]:
  """Returns a row for JSON: every number, and the mesh."""
  chip, mesh = row.topology.chip, row.config.mesh
  values = {
    f.name: getattr(row, f.name)
    for f in dataclasses.fields(row)
    if f.name not in ("config", "topology")
  }
  return values | {
    "topology": str(row.topology),
    "chips": row.topology.num_chips,
    "hbm_bytes": chip.hbm_bytes,
    "hbm_source": chip.source,
    "peak_flops": chip.peak_flops,
    "mesh": {axis: getattr(mesh, axis) for axis in MESH_AXES},
    "accumulation_steps": row.config.train.accumulation_steps,
    "fits": row.fits,
    "seconds_per_step": row.step_seconds(mfu),
  }


def versions() -> dict[str, str]:
  """Returns the versions that a plan depends on."""
  found = {"python": platform.python_version()}
  for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "missing"
  return found


def today() -> str:
  return datetime.datetime.now(datetime.UTC).date().isoformat()


def mesh_text(mesh: MeshConfig) -> str:
  """Returns the axes that are more than 1, as `data=2,fsdp=8`."""
  sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
  return ",".join(f"{k}={v}" for k, v in sizes.items() if v != 1) or "data=1"


def _rows_per_chip(row: Row) -> float:
  config = row.config
  rows = config.data.batch_size / config.train.accumulation_steps
  mesh = config.mesh
  return rows * mesh.tensor * mesh.context / row.topology.num_chips


def _is_plain(config: Config) -> bool:
  return config.mtp.depth == 0 and config.mtp.kind == "none"


def _trunk_key(config: Config) -> tuple[Any, ...]:
  return config.trunk, config.data, config.mesh, config.train, config.loss


def _giga(value: float | None) -> str:
  if value is None:
    return _MISSING
  return f"{value / 1e9:.2f}" if value < 99.5e9 else f"{value / 1e9:,.0f}"
