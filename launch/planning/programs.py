"""The train step of a shape of trial on a mesh, traced and compiled, never run.

Devices may be those of a TPU topology that is not there (`topologies.tpu_devices`), or
CPU devices that stand for others.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import zstandard

from launch.planning import hlo
from mtp_jax import accounting, files, optimizer
from mtp_jax.batch import Batch
from mtp_jax.config import Config
from mtp_jax.model.lm import zeros_batch
from mtp_jax.sharding import batch_shardings, logical_axes, replicated
from mtp_jax.train_state import (
  Hyperparameters,
  TrainState,
  init_state,
  state_shardings,
)
from mtp_jax.train_step import programs, train_step

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class StateBytes:
  """What one device keeps from step to step."""

  params: int
  optimizer: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What XLA says of a compiled step on one device: bytes, and by kind of collective.

  temporaries: at their peak, everything that is neither argument nor result:
               activations, gradients, gathered weights.
  peak:        arguments, results that do not reuse them, temporaries and code.
  xla_flops:   XLA's cost analysis, which counts the body of every loop once.
  calls, sent: of the collectives, per step; see `hlo.Collective`.
  program:     what was compiled.
  """

  arguments: int
  temporaries: int
  peak: int
  xla_flops: float
  calls: dict[str, int]
  sent: dict[str, float]
  program: hlo.Program


def abstract_inputs(config: Config, mesh: Mesh) -> tuple[Any, ...]:
  """Returns the arguments of `programs(config, mesh).step` as shapes with shardings."""
  rows = config.data.batch_size // config.train.accumulation_steps
  batch = jax.eval_shape(lambda: zeros_batch(config, rows))
  steps = config.train.accumulation_steps
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype), batch
  )
  shardings = batch_shardings(mesh, shapes._fields, ("microbatch",))
  whole = replicated(mesh)
  scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)  # noqa: E731
  return (
    abstract_state(config, mesh),
    Batch(
      **{
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in shapes.arrays().items()
      }
    ),
    Hyperparameters(scalar(np.float32), scalar(np.float32), scalar(np.float32)),
    scalar(np.bool_),
  )


@functools.lru_cache(maxsize=8)
def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Returns the state of a run as shapes with shardings."""
  config = traceable(config)
  axes = logical_axes(accounting.abstract_params(config))
  chain = optimizer.make_optimizer(
    config.optimizer, optimizer.trainable(config, axes)
  )
  state = jax.eval_shape(functools.partial(init_state, config, chain), np.int32(0))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state,
    state_shardings(config, chain, mesh),
  )


def traceable(config: Config) -> Config:
  """Returns the config with attention that traces anywhere, as kernels do not."""
  trunk = config.trunk
  if trunk.attention in ("cudnn", "tokamax"):
    trunk = dataclasses.replace(trunk, attention="xla")
  return dataclasses.replace(config, trunk=trunk)


def state_bytes(config: Config, mesh: Mesh) -> StateBytes:
  """Returns the bytes of parameters and optimizer state on one device."""
  state = abstract_state(config, mesh)
  return StateBytes(tree_bytes(state.params), tree_bytes(state.opt_state))


def tree_bytes(tree: Any) -> int:
  """Returns the bytes that a tree of shapes with shardings takes on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def unsharded(tree: Any, at_least: int) -> list[str]:
  """Returns the paths of leaves of so many bytes that every device has whole."""
  return [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if math.prod(leaf.shape) * leaf.dtype.itemsize >= at_least
    and leaf.sharding.is_fully_replicated
  ]


@functools.lru_cache(maxsize=64)
def matmul_flops(config: Config, mesh: jax.sharding.AbstractMesh) -> float | None:
  """Returns the FLOPs of one step's matrix products on all devices together.

  Unlike model FLOPs these include what rematerialisation computes again and, of an
  attention that does not skip them, the scores of later tokens; cuDNN's, which is no
  product, counts as `xla`. None where loops depend on the data, as those over experts.
  """
  config = traceable(config)
  inputs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_inputs(config, mesh)
  )
  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr = jax.make_jaxpr(functools.partial(train_step, config))(*inputs)
  return _flops(jaxpr.jaxpr)


def compile_step(
  config: Config, mesh: jax.sharding.Mesh, cache: Path | None = None
) -> tuple[Compiled, float]:
  """Returns what XLA says of the step, and how many seconds compiling it took.

  Args:
    config: from `train_step.shape_of`.
    mesh: of devices that may be compile-only.
    cache: folder in which XLA's answers are kept, by program, devices and versions.

  Raises:
    OutOfMemory: the compiler for TPUs refuses what does not fit.
  """
  step, inputs = programs(config, mesh).step, abstract_inputs(config, mesh)
  with jax.set_mesh(mesh):
    lowered = step.trace(*inputs).lower(
      lowering_platforms=(mesh.devices.flat[0].platform,)
    )
  path = cache and cache / f"plan-{_key(lowered, mesh)}.zst"
  if path and path.exists():
    answer = json.loads(zstandard.decompress(path.read_bytes()))
  else:
    start = time.monotonic()
    answer = _answer(lowered)
    answer["seconds"] = time.monotonic() - start
    if path:
      cache.mkdir(parents=True, exist_ok=True)
      files.write_whole(path, zstandard.compress(json.dumps(answer).encode()))
  if "needed" in answer:
    raise OutOfMemory(answer["needed"], answer["seconds"])
  return _analyse(answer), answer["seconds"]


class OutOfMemory(Exception):
  """The step needs `needed` bytes on every device (None if the compiler won't say)."""

  def __init__(self, needed: float | None, seconds: float):
    super().__init__(needed, seconds)
    self.needed, self.seconds = needed, seconds


def _key(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> str:
  """Equal for equal programs, devices and compilers."""
  versions = [
    importlib.metadata.version(name)
    for name in ("jaxlib", "libtpu")
    if importlib.util.find_spec(name)
  ]
  devices = [(d.device_kind, d.id) for d in mesh.devices.flat]
  text = f"{versions} {devices} {lowered.as_text()}"
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _answer(lowered: jax.stages.Lowered) -> dict[str, Any]:
  """Compiles; returns XLA's analyses and the text of the program."""
  try:
    return _facts(lowered.compile())
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    scale = used and 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]]
    return {"needed": float(used[1]) * scale if used else None}


def analyse(compiled: jax.stages.Compiled) -> Compiled:
  """Returns what XLA says of a compiled step."""
  return _analyse(_facts(compiled))


def _facts(compiled: jax.stages.Compiled) -> dict[str, Any]:
  memory = compiled.memory_analysis()
  sizes = ("argument", "output", "alias", "temp", "generated_code")
  return {
    "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in sizes},
    "flops": compiled.cost_analysis().get("flops", 0.0),
    "text": compiled.as_text(),
  }


def _analyse(answer: dict[str, Any]) -> Compiled:
  memory, program = answer["memory"], hlo.Program(answer["text"])
  calls, sent = dict.fromkeys(hlo.KINDS, 0), dict.fromkeys(hlo.KINDS, 0.0)
  for collective in program.collectives:
    calls[collective.kind] += collective.times
    sent[collective.kind] += collective.sent_bytes
  new = memory["output"] - memory["alias"]
  return Compiled(
    arguments=memory["argument"],
    temporaries=memory["temp"],
    peak=memory["argument"] + new + memory["temp"] + memory["generated_code"],
    xla_flops=answer["flops"],
    calls=calls,
    sent=sent,
    program=program,
  )


def _flops(jaxpr: Any) -> float | None:
  """The FLOPs of all products in a jaxpr, on all devices, loops by their length."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "ragged_dot_general"):
      total += _product_flops(equation)
      continue
    inner = [_flops(j) for j in _inner(params)]
    if None in inner or (name == "while" and any(inner)):
      return None
    if name == "cond":
      total += max(inner)
      continue
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
      times = math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"])
    total += times * sum(inner)
  return total


def _product_flops(equation: Any) -> float:
  params, left = equation.params, equation.invars[0].aval.shape
  out = equation.outvars[0].aval.shape
  ragged = params.get("ragged_dot_dimension_numbers")
  numbers = ragged.dot_dimension_numbers if ragged else params["dimension_numbers"]
  contracted = numbers[0][0]
  flops = 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
  # A gradient by expert has every row in one of the results alone.
  by_expert = ragged is not None and set(ragged.lhs_ragged_dimensions) & set(contracted)
  return flops / out[0] if by_expert else flops


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
        yield item.jaxpr
      elif hasattr(item, "eqns"):
        yield item
