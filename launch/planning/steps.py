"""Compiles programs of a trial for devices that this machine does not have.

The train step, the step of a pack of trials, and a round of decoding.
"""

import functools
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

from launch.planning import hlo, roofline
from launch.planning.chips import POOL, Chip, Gpu
from launch.planning.topologies import kernels_of
from mtp_jax import files, layouts, pack_program
from mtp_jax.config import Config
from mtp_jax.decode import loop
from mtp_jax.decode.generate import Decoding, make_plan
from mtp_jax.decode.target import unstack
from mtp_jax.pack_program import stacked_step
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, make_trial_mesh, replicated
from mtp_jax.train_step import programs

# Tokens of a prompt and of its completion, where decoding is planned.
_PROMPT, _NEW = 64, 128


def tree_bytes(tree: Any) -> int:
  """Returns the bytes that a tree of shapes with shardings takes on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def fitting_step(
  config: Config, mesh: jax.sharding.Mesh, chip: Chip, cache: Path | None = None
) -> tuple[Config, dict[str, Any]]:
  """Returns the config with the layout that training would choose, and its report."""
  ways = list(layouts.layouts(config)) if isinstance(chip, Gpu) else [config]
  for way in ways:
    report = compile_step(way, mesh, chip, cache)
    room = layouts.LARGEST_SHARE * POOL * chip.hbm_bytes
    if report["peak"] is not None and report["peak"] <= room:
      break
  return way, report


def compile_step(
  config: Config, mesh: jax.sharding.Mesh, chip: Chip, cache: Path | None = None
) -> dict[str, Any]:
  """Returns what XLA reports about the train step on one device.

  Keys: as in `analyse`, and `seconds` of compilation. A step that the compiler
  refuses for its memory has `peak` alone, None if the compiler does not name it.

  Args:
    config: from `train_step.program_config`.
    mesh: of devices that may be compile-only (`topologies.devices`).
    chip: what they are.
    cache: folder in which reports are kept, by program, devices and versions. JAX's own
      cache writes programs for such devices, but does not read them back.
  """
  with jax.set_mesh(mesh), kernels_of(chip):
    inputs = layouts.abstract_inputs(config, mesh)
    lowered = programs(config, mesh).step.trace(*inputs).lower()
  return _report(lowered, mesh, chip, cache)


def compile_pack(
  config: Config, size: int, device: jax.Device, chip: Chip, cache: Path | None = None
) -> dict[str, Any]:
  """Returns the same of a step of `size` trials side by side, which share batches."""
  mesh = make_trial_mesh([device])
  with jax.set_mesh(mesh), kernels_of(chip):
    step = stacked_step(program_config(config), mesh, True)
    lowered = step.trace(*pack_program.abstract_inputs(config, size, mesh)).lower()
  return _report(lowered, mesh, chip, cache)


def compile_round(
  config: Config, rows: int, device: jax.Device, chip: Chip, cache: Path | None = None
) -> dict[str, Any]:
  """Returns the same of a round of greedy decoding with all predictors.

  Kernels are those of one round; `arguments` are the weights, and the caches of `rows`
  sequences of 192 tokens, as in `launch.benchmark decode`. `read` are the bytes of the
  weights that every round reads at least.
  """
  mesh, plan = make_mesh(config.mesh, [device]), make_plan(config, Decoding())
  slots = loop.slots_for(_PROMPT + _NEW, plan.drafter.num_drafted)
  whole = replicated(mesh)

  def shapes(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree
    )

  with jax.set_mesh(mesh), kernels_of(chip):
    params = layouts.abstract_state(program_config(config), mesh).params
    weights = jax.eval_shape(lambda x: unstack(x, config), params)
    inputs = loop.Inputs(weights, weights, None, np.zeros(0, np.int32))
    tokens_BS, row_B = np.zeros((rows, slots), np.int32), np.zeros(rows, np.int32)
    state = jax.eval_shape(
      functools.partial(loop.prefill, plan, _PROMPT), inputs, tokens_BS, row_B, row_B,
      np.uint32(0), row_B,
    )
    lowered = loop.finish.trace(plan, shapes(inputs), shapes(state)).lower()
  read = weights._replace(embedding_VD=None, position_PD=None)
  return _report(lowered, mesh, chip, cache, is_loop=True) | {
    "read": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))
  }


def _report(
  lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, chip: Chip,
  cache: Path | None, is_loop: bool = False,
) -> dict[str, Any]:
  path = cache and cache / f"plan-{_key(lowered, mesh)}.json"
  if path and path.exists():
    return json.loads(path.read_text())
  start = time.monotonic()
  try:
    report = analyse(lowered.compile(), chip, is_loop)
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
  """Returns equal keys for equal programs, devices, compilers and planning code."""
  compilers = sorted(
    f"{x.name} {x.version}"
    for x in importlib.metadata.distributions()
    if x.name in ("jaxlib", "libtpu") or x.name.startswith("jax-cuda")
  )
  devices = [(d.device_kind, d.id) for d in mesh.devices.flat]
  code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
  text = f"{compilers} {devices} {code} {lowered.as_text()}"
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def analyse(
  compiled: jax.stages.Compiled, chip: Chip, is_loop: bool = False
) -> dict[str, Any]:
  """Returns what XLA reports about a compiled step, in bytes of one device.

  arguments:   the state and a batch.
  temporaries: at their peak, activations, gradients, gathered weights.
  peak:        see `layouts.peak_bytes`.
  xla_flops:   XLA's cost analysis, which counts the body of every loop once; None where
               a platform has none.
  collectives, unknown_loops: see `hlo`.
  kernels:     of a GPU, see `roofline.summary`.

  `is_loop`: of one turn of the program's loop.
  """
  memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
  if is_loop:
    module = hlo.turn(module)
  return {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": layouts.peak_bytes(compiled),
    "xla_flops": (compiled.cost_analysis() or {}).get("flops"),
    "collectives": hlo.collectives(module),
    "unknown_loops": hlo.unknown_loops(module),
  } | (
    {"kernels": roofline.summary(roofline.kernels(module), chip)}
    if isinstance(chip, Gpu) else {}
  )
