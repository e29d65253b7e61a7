"""Compiles the train step of a trial for devices that this machine does not have."""

import hashlib
import importlib.metadata
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtp_jax import files
from mtp_jax.config import Config
from mtp_jax.lm import zeros_batch
from mtp_jax.sharding import batch_shardings, replicated
from mtp_jax.train_state import Hyperparameters, TrainState
from mtp_jax.train_step import programs

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# Asynchronous collectives count where they end: there the type is that of the results.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-done)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the state of a run as shapes with shardings."""
  train = programs(config, mesh)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(train.init, np.int32(0)),
    train.shardings,
  )


def abstract_inputs(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
  """Returns the arguments of `programs(config, mesh).step` as shapes with shardings."""
  steps = config.train.accumulation_steps
  rows = config.data.batch_size // steps
  batch = jax.eval_shape(lambda: zeros_batch(config, rows))
  shardings = batch_shardings(mesh, batch._fields, ("microbatch",))

  def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))

  return (
    abstract_state(config, mesh),
    type(batch)(**{
      name: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype, sharding=shardings[name])
      for name, x in batch.arrays().items()
    }),
    Hyperparameters(*[scalar(np.float32)] * 3),
    scalar(np.bool_),
  )


def tree_bytes(tree: Any) -> int:
  """Returns the bytes that a tree of shapes with shardings takes on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def compile_step(
  config: Config, mesh: jax.sharding.Mesh, cache: Path | None = None
) -> dict[str, Any]:
  """Returns what XLA reports about the train step on one device.

  Keys are those of `analyse`, and `seconds` of compilation. A step that the compiler
  refuses for its memory has `peak` alone, None if the compiler does not name it.

  Args:
    config: from `train_step.program_config`.
    mesh: of devices that may be compile-only (`topologies.devices`).
    cache: folder in which reports are kept, by program, devices and versions. JAX's own
      cache writes programs for such devices, but does not read them back.
  """
  step, inputs = programs(config, mesh).step, abstract_inputs(config, mesh)
  with jax.set_mesh(mesh):
    lowered = step.trace(*inputs).lower()
  path = cache and cache / f"plan-{_key(lowered, mesh)}.json"
  if path and path.exists():
    return json.loads(path.read_text())
  start = time.monotonic()
  try:
    report = analyse(lowered.compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
    report = {"peak": used and float(used[1]) * 1024 ** (1 + "KMGT".index(used[2]))}
  report["seconds"] = time.monotonic() - start
  if path:
    cache.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(report).encode())
  return report


def _key(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> str:
  """Returns equal keys for equal programs, devices, compilers and code of this file."""
  compilers = sorted(
    f"{x.name} {x.version}"
    for x in importlib.metadata.distributions()
    if x.name in ("jaxlib", "libtpu")
  )
  devices = [(d.device_kind, d.id) for d in mesh.devices.flat]
  text = f"{compilers} {devices} {Path(__file__).read_text()} {lowered.as_text()}"
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def analyse(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Returns what XLA reports about a compiled step, in bytes of one device.

  arguments:   the state and a batch.
  temporaries: at their peak, activations, gradients, gathered weights.
  peak:        arguments, results that do not reuse them, temporaries and code.
  xla_flops:   XLA's cost analysis, which counts the body of every loop once; None where
               a platform has none.
  collectives, unknown_loops: see `collectives`.
  """
  memory = compiled.memory_analysis()
  found, unknown_loops = collectives(compiled.as_text())
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes,
    "xla_flops": (compiled.cost_analysis() or {}).get("flops"),
    "collectives": found,
    "unknown_loops": unknown_loops,
  }


def collectives(text: str) -> tuple[dict[str, dict[str, int]], int]:
  """Counts the collectives of one step in the text of a compiled module.

  Returns by kind `count` and `bytes`, the size of the results on one device, of all
  times that they run; and the number of loops of unknown length, which count once.
  """
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
  unknown_loops = 0

  def walk(name: str, times: int) -> None:
    nonlocal unknown_loops
    for line in computations[name]:
      if match := _COLLECTIVE.search(line):
        # On a TPU, a fusion that keeps a part of an all-reduce is a reduce-scatter.
        is_part = name.startswith("all-reduce-scatter")
        counts = found["reduce-scatter" if is_part else match[2]]
        counts["count"] += times
        counts["bytes"] += times * _bytes(match[1])
      elif " while(" in line:
        trips = _trips(line, computations)
        unknown_loops += trips is None
        walk(_named("body", line), times * (trips or 1))
      elif "-done(" not in line:
        for group in _CALLED.findall(line):
          for called in re.findall(r"[\w.\-]+", group):
            walk(called, times)

  walk(entry, 1)
  return found, unknown_loops


def _trips(loop: str, computations: dict[str, list[str]]) -> int | None:
  """Returns how often a loop's body runs, None where its text does not tell.

  XLA notes it for CPUs and GPUs. For TPUs it is the constant that the counter stays
  below, over the constant that the body adds to the counter. Counters start at 0.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
    return int(known[1])
  condition = "\n".join(computations[_named("condition", loop)])
  limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
  places = re.findall(r"[su]32\[\]\S* get-tuple-element\(.*?, index=(\d+)", condition)
  if (len(limits), len(places)) != (1, 1) or "direction=LT" not in condition:
    return None
  body = computations[_named("body", loop)]
  of_name = dict(re.findall(r"%([\w.\-]+) = (.*)", "\n".join(body)))
  root = next(line for line in body if "ROOT " in line).partition(" tuple(")[2]
  counter = re.findall(r"%([\w.\-]+)", root)[int(places[0])] if root else ""
  added = re.search(r" add\((.*?)\)", of_name.get(counter, ""))
  for name in re.findall(r"%([\w.\-]+)", added[1]) if added else ():
    if step := re.search(r" constant\((\d+)\)", of_name.get(name, "")):
      return -(-int(limits[0]) // int(step[1]))
  return int(limits[0])


def _named(part: str, loop: str) -> str:
  return re.search(rf"\b{part}=%?([\w.\-]+)", loop)[1]


def _bytes(types: str) -> int:
  """Returns the bytes of all arrays of a type, as `bf16[2,4]{1,0}` or a tuple."""
  return sum(
    math.prod(int(d) for d in dims.split(",") if d) * max(int(bits or 8), 8) // 8
    for name, bits, dims in _ARRAY.findall(re.sub(r"\{.*?\}", "", types))
  )
