"""Accelerators that can be planned for: TPU slices, and GPUs in nodes.

A topology is written `v5p:4x4x4` (chips along each axis of a TPU slice), `h100:8` (GPUs
of one node) or `h100:8x16` (GPUs of a node, nodes). The bare name, `v5p` or `h100`,
leaves the number of chips to the mesh of every trial.
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
  most:      chips of the largest TPU slice, or GPUs of a node.
  axes:      axes of a TPU slice; 0 for GPUs.
  """

  name: str
  platform: str
  device_kind: str
  hbm_bytes: float
  source: str
  most: int
  axes: int = 0

  @property
  def peak_flops(self) -> float:
    """Dense bfloat16 FLOP/s; see `metrics.PEAK_FLOPS`."""
    return peak_flops(self.device_kind)


def _tpu(name: str, device_kind: str, gigabytes: int, most: int, axes: int) -> Chip:
  source = f"Google Cloud documentation, TPU {name}"
  return Chip(name, "tpu", device_kind, gigabytes * 1e9, source, most, axes)


def _gpu(name: str, device_kind: str, gigabytes: int, sheet: str) -> Chip:
  source = f"NVIDIA data sheet, {sheet}"
  return Chip(name, "gpu", device_kind, gigabytes * 1e9, source, most=8)


CHIPS = {
  chip.name: chip
  for chip in (
    _tpu("v4", "TPU v4", 32, 4096, axes=3),
    _tpu("v5e", "TPU v5 lite", 16, 256, axes=2),
    _tpu("v5p", "TPU v5", 95, 8960, axes=3),
    _tpu("v6e", "TPU v6 lite", 32, 256, axes=2),
    _gpu("a100", "NVIDIA A100-SXM4-80GB", 80, "A100 80GB SXM"),
    _gpu("h100", "NVIDIA H100 80GB HBM3", 80, "H100 SXM"),
    _gpu("h200", "NVIDIA H200", 141, "H200 SXM"),
  )
}
# Read by libtpu when it is loaded: it need not be alone, and looks for no TPUs.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
_INSTALL = "pip install -r requirements-plan.txt"


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of a kind; `shape` is None where the mesh decides."""

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
    ConfigError: an unknown kind of chip, or a shape that it cannot have.
  """
  name, colon, shape = text.partition(":")
  if name not in CHIPS:
    raise ConfigError(
      f"--topology must name one of {', '.join(CHIPS)}, got {text!r} (examples: "
      "v5p:4x4x4, v6e:16x16, h100:8, h100:8x16)."
    )
  chip = CHIPS[name]
  if not colon:
    return Topology(chip, None)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ConfigError(
      f"--topology must have sizes after the colon, as in v5p:4x4x4, got {text!r}."
    )
  sizes = tuple(int(size) for size in shape.split("x"))
  _check(chip, sizes, text)
  return Topology(chip, sizes)


def _check(chip: Chip, sizes: tuple[int, ...], text: str) -> None:
  if chip.platform == "tpu":
    if len(sizes) != chip.axes:
      example = "x".join("4" * chip.axes)
      raise ConfigError(
        f"--topology must have {chip.axes} axes for {chip.name}, as in "
        f"{chip.name}:{example}, got {text!r}."
      )
    if min(sizes[:2]) < 2 or math.prod(sizes) % 4:
      raise ConfigError(f"--topology must be whole hosts of 2x2 chips, got {text!r}.")
    if math.prod(sizes) > chip.most:
      raise ConfigError(
        f"--topology must have at most {chip.most} chips for {chip.name}, got {text!r}."
      )
  elif len(sizes) > 2 or sizes[0] > chip.most:
    raise ConfigError(
      f"--topology must be GPUs of a node (at most {chip.most}), and perhaps nodes, as "
      f"in {chip.name}:8x16, got {text!r}."
    )


def fit_to_mesh(topology: Topology, mesh: MeshConfig) -> Topology:
  """Returns the topology with a shape: its own, or one for the chips of the mesh.

  Of a TPU that is the slice nearest to a cube whose axes are powers of two; of GPUs,
  full nodes.

  Raises:
    ConfigError: the mesh does not say how many chips it wants, or no slice has so many.
  """
  if topology.shape is not None:
    return topology
  chip = topology.chip
  if mesh.data == -1:
    raise ConfigError(
      f"--topology={chip.name} takes as many chips as the mesh has, but mesh.data is "
      "-1 (the rest); name the chips (as in v5p:4x4x4 or h100:8) or "
      "set --config.mesh.data."
    )
  count = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor * mesh.context
  if chip.platform == "gpu":
    nodes, rest = divmod(count, chip.most)
    if nodes and rest:
      raise ConfigError(
        f"mesh must fill whole nodes of {chip.most} GPUs, got {count} devices."
      )
    shape = (count,) if nodes <= 1 else (chip.most, nodes)
    return Topology(chip, shape)
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


def check_compiler() -> None:
  """Checks that the compiler for TPUs is installed.

  Raises:
    ConfigError: says what to install.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"--topology of TPUs needs the package libtpu, which compiles for them:"
      f" {_INSTALL}."
    )


@functools.cache
def tpu_devices(topology: Topology) -> tuple[jax.Device, ...]:
  """Returns devices that programs can be compiled for, on any machine.

  Raises:
    ConfigError: libtpu is missing or does not know the topology.
  """
  check_compiler()
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
