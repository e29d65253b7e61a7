"""TPU slices that train steps can be compiled for, on any machine.

A topology is written `v5p:4x4x4`, the chips along each axis of a slice. The bare name,
`v5p`, leaves the number of chips to the mesh of every trial.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax

from mtp_jax.config import ConfigError, MeshConfig
from mtp_jax.metrics import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of accelerator.

  hbm_bytes: memory of one chip, as its maker states it, in decimal GB.
  most:      chips of the largest slice.
  axes:      axes of a slice.
  """

  name: str
  device_kind: str
  hbm_bytes: float
  most: int
  axes: int

  @property
  def peak_flops(self) -> float:
    """Dense bfloat16 FLOP/s; see `metrics.PEAK_FLOPS`."""
    return peak_flops(self.device_kind)

  @property
  def source(self) -> str:
    return f"Google Cloud documentation, TPU {self.name}"


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", "TPU v4", 32e9, 4096, axes=3),
    Chip("v5e", "TPU v5 lite", 16e9, 256, axes=2),
    Chip("v5p", "TPU v5", 95e9, 8960, axes=3),
    Chip("v6e", "TPU v6 lite", 32e9, 256, axes=2),
  )
}
# libtpu reads these when it is loaded: it need not be alone, and looks for no TPUs.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice; `shape` is None where the mesh decides."""

  chip: Chip
  shape: tuple[int, ...] | None

  @property
  def num_chips(self) -> int | None:
    return math.prod(self.shape) if self.shape else None

  def __str__(self) -> str:
    if self.shape is None:
      return self.chip.name
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
  """Returns the topology that a flag names.

  Raises:
    ConfigError: an unknown kind of chip, or a shape that a slice cannot have.
  """
  name, colon, shape = text.partition(":")
  if name not in CHIPS:
    raise ConfigError(
      f"--topology must name one of {', '.join(CHIPS)}, got {text!r} (examples: "
      "v5p:4x4x4, v6e:16x16); GPUs cannot be planned for."
    )
  chip = CHIPS[name]
  if not colon:
    return Topology(chip, None)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ConfigError(
      f"--topology must have sizes after the colon, as in v5p:4x4x4, got {text!r}."
    )
  sizes = tuple(int(size) for size in shape.split("x"))
  if len(sizes) != chip.axes:
    example = "x".join("4" * chip.axes)
    raise ConfigError(
      f"--topology must have {chip.axes} axes for {name}, as in {name}:{example}, got "
      f"{text!r}."
    )
  return Topology(chip, sizes)


def fit_to_mesh(topology: Topology, mesh: MeshConfig) -> Topology:
  """Returns the topology with a shape: its own, or one for the chips of the mesh.

  The latter is the slice nearest to a cube whose axes are powers of two.

  Raises:
    ConfigError: the mesh leaves the number of chips open, or no slice has that number.
  """
  if topology.shape is not None:
    return topology
  chip = topology.chip
  if mesh.data == -1:
    raise ConfigError(
      f"--topology={chip.name} takes as many chips as the mesh has, but mesh.data is "
      "-1 (the rest); name the chips (as in v5p:4x4x4) or set --config.mesh.data."
    )
  count = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor * mesh.context
  exponent = count.bit_length() - 1
  if count != 2**exponent or not 4 <= count <= chip.most:
    raise ConfigError(
      f"mesh must have a power of two of chips, 4 to {chip.most}, for "
      f"--topology={chip.name} without a shape, got {count}; name the shape."
    )
  each, more = divmod(exponent, chip.axes)
  sizes = [2 ** (each + (i >= chip.axes - more)) for i in range(chip.axes)]
  if sizes[0] == 1:  # Four chips or eight: a host is 2x2.
    sizes = [2, 2, count // 4][: chip.axes]
  return Topology(chip, tuple(sizes))


@functools.cache
def devices(topology: Topology) -> tuple[jax.Device, ...]:
  """Returns devices that programs can be compiled for, on any machine.

  Raises:
    ConfigError: libtpu is missing or does not know the topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "--topology of TPUs needs the package libtpu, which compiles for them: "
      "pip install -r requirements-plan.txt."
    )
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies

  # Its two cores act as one device, as on the machines that are rented out.
  options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
  try:
    return tuple(
      topologies.get_topology_desc(str(topology), platform="tpu", **options).devices
    )
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    raise ConfigError(
      f"--topology={topology}: libtpu cannot make it: {str(error).splitlines()[0]}"
    ) from error
