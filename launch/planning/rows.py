"""One row of a plan for every shape of trial: memory, work and traffic per step."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from launch.planning import estimate, programs, topologies
from launch.planning.topologies import Topology
from launch.trials import Trial
from mtp_jax import accounting
from mtp_jax.config import Config, ConfigError, MeshConfig
from mtp_jax.config_rules import validate
from mtp_jax.sharding import abstract_mesh, make_mesh

# Share of a GPU's memory that a plan may take: the formula is rough, and the CUDA
# context and libraries take some. On TPU XLA's plan is what is allocated.
GPU_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Row:
  """What a step of one shape takes; bytes and collectives are those of one chip.

  trials:       how many trials have this shape.
  source:       XLA (compiled for the topology) | formula (see `estimate`).
  peak:         None where the compiler gave up without saying how much it needs.
  usable:       bytes that the plan may take.
  model_flops:  of one step on all chips, as training reports them.
  matmul_flops: the same with what is computed again; see `programs.matmul_flops`.
  xla_flops:    XLA's cost analysis of one chip, loops counted once; None for formulas.
  calls, sent:  by kind of collective; None where nothing was compiled.
  unknown_loops: loops whose length was not found: what is in them counts once.
  formula:      the temporaries that the formula would say.
  """

  name: str
  trials: int
  config: Config
  topology: Topology
  source: str
  params: int
  params_bytes: int
  optimizer_bytes: int
  temporaries: float | None
  peak: float | None
  usable: float
  model_flops: float
  matmul_flops: float | None
  xla_flops: float | None
  calls: dict[str, int] | None
  sent: dict[str, float] | None
  unknown_loops: int
  formula: float
  compile_seconds: float | None

  @property
  def fits(self) -> bool:
    return self.peak is not None and self.peak <= self.usable

  def step_seconds(self, mfu: float) -> float:
    """Returns the time of a step at a utilisation of the chips' peak."""
    chip = self.topology.chip
    return self.model_flops / (mfu * chip.peak_flops * self.topology.num_chips)


def check(
  trials: Iterable[Trial], topology: Topology
) -> dict[Config, tuple[Topology, list[Trial]]]:
  """Returns the topology and the trials of every shape.

  Raises:
    ConfigError: a mesh that the topology does not have, or libtpu is missing.
  """
  if topology.chip.platform == "tpu":
    topologies.check_compiler()
  shapes: dict[Config, tuple[Topology, list[Trial]]] = {}
  for trial in trials:
    try:
      fitted = topologies.fit_to_mesh(topology, trial.config.mesh)
      validate(trial.config, fitted.num_chips, topology.chip.platform)
      if topology.chip.platform == "tpu":
        topologies.tpu_devices(fitted)
    except ConfigError as error:
      raise ConfigError(f"{trial.name} on {topology}: {error}") from error
    shapes.setdefault(trial.shape, (fitted, []))[1].append(trial)
  return shapes


def make_row(
  topology: Topology,
  trials: list[Trial],
  cache: Path | None,
  say: Callable[[str], None],
) -> Row:
  """Returns the row of trials of one shape, compiled if the topology is of TPUs."""
  shape, chip = trials[0].shape, topology.chip
  mesh = _abstract_mesh(shape.mesh, topology.num_chips)
  resolved = estimate.resolve_auto(shape, mesh, chip.platform)
  guess = estimate.estimate(resolved, mesh)
  state = programs.state_bytes(shape, mesh)
  kept = state.params + state.optimizer
  row = Row(
    name=trials[0].name,
    trials=len(trials),
    config=shape,
    topology=topology,
    source="formula",
    params=trials[0].counts.total,
    params_bytes=state.params,
    optimizer_bytes=state.optimizer,
    temporaries=guess.temporaries,
    peak=kept + guess.temporaries,
    usable=GPU_SHARE * chip.hbm_bytes,
    model_flops=accounting.train_flops_per_token(shape) * _tokens(shape),
    matmul_flops=programs.matmul_flops(resolved, mesh),
    xla_flops=None,
    calls=None,
    sent=guess.sent,
    unknown_loops=0,
    formula=guess.temporaries,
    compile_seconds=None,
  )
  if chip.platform != "tpu":
    return row
  devices = list(topologies.tpu_devices(topology))
  replace = functools.partial(
    dataclasses.replace, row, source="XLA", usable=chip.hbm_bytes
  )
  try:
    found, seconds = programs.compile_step(shape, make_mesh(shape.mesh, devices), cache)
  except programs.OutOfMemory as error:
    say("XLA refuses it: out of memory")
    needed = error.needed
    return replace(
      peak=needed,
      temporaries=needed and needed - kept,
      sent=None,
      compile_seconds=error.seconds,
    )
  return replace(
    temporaries=found.temporaries,
    peak=found.peak,
    xla_flops=found.xla_flops,
    calls=found.calls,
    sent=found.sent,
    unknown_loops=found.program.unknown_loops,
    compile_seconds=seconds,
  )


def _tokens(config: Config) -> int:
  return config.data.batch_size * config.data.seq_len


def _abstract_mesh(mesh: MeshConfig, num_chips: int) -> jax.sharding.AbstractMesh:
  fixed = mesh.fsdp * mesh.expert * mesh.tensor * mesh.context
  return abstract_mesh(dataclasses.replace(mesh, data=num_chips // fixed))
