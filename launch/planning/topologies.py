"""TPU slices and GPUs that train steps can be compiled for, on any machine.

A topology is written `v5p:4x4x4`, the chips along each axis of a slice, or `h200:8`,
the number of GPUs. The bare name, `v5p`, leaves the number to the mesh of every trial.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from unittest import mock

import jax

from launch.planning.chips import CHIPS, Chip, Gpu
from mtp_jax.config import ConfigError, MeshConfig
from mtp_jax.kernels.attention import import_tokamax

# The cuDNN of `Gpu.target`, as cuDNN writes its own version.
CUDNN_VERSION = 91000
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
      "v5p:4x4x4, v6e:16x16, h200:8)."
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
  if isinstance(chip, Gpu):
    _check_nodes(chip, sizes[0], text)
  return Topology(chip, sizes)


def _check_nodes(gpu: Gpu, count: int, text: str) -> None:
  if count > gpu.most and count % gpu.most:
    raise ConfigError(
      f"--topology must have up to {gpu.most} GPUs or whole nodes of {gpu.most} for "
      f"{gpu.name}, got {count} in {text!r}."
    )


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
  if isinstance(chip, Gpu):
    _check_nodes(chip, count, chip.name)
    return Topology(chip, (count,))
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
    ConfigError: the compiler is missing or does not know the topology.
  """
  return (_gpus if isinstance(topology.chip, Gpu) else _tpus)(topology)


def _tpus(topology: Topology) -> tuple[jax.Device, ...]:
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


def _gpus(topology: Topology) -> tuple[jax.Device, ...]:
  """Returns GPUs of nodes that hold up to `most` each; no driver is needed."""
  gpu, count = topology.chip, topology.num_chips
  if not any(importlib.util.find_spec(f"jax_cuda{x}_plugin") for x in (12, 13)):
    version = importlib.metadata.version("jaxlib")
    raise ConfigError(
      f"--topology={topology} needs the package jax-cuda12-plugin, which compiles for "
      f"GPUs, and none that it needs to run: pip install --no-deps "
      f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}. No GPU and no driver "
      "is needed."
    )
  from jax.experimental import topologies

  per_node = min(count, gpu.most)
  shape = f"1x{count // per_node}x{per_node}"  # Partitions, processes, GPUs of each.
  try:
    return tuple(
      topologies.get_topology_desc(
        platform="cuda", target_config=gpu.target(), topology=shape
      ).devices
    )
  except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
    raise ConfigError(
      f"--topology={topology}: XLA cannot make it: {str(error).splitlines()[0]}"
    ) from error


@contextlib.contextmanager
def kernels_of(chip: Chip) -> Iterator[None]:
  """Lets JAX and tokamax choose kernels for a GPU that is not there.

  When JAX traces attention of cuDNN it asks the installed cuDNN and the first GPU what
  they can do. This machine may have neither. tokamax asks the first device.
  """
  if not isinstance(chip, Gpu):
    yield
    return
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  def is_at_least(capability: str) -> bool:
    return chip.capability >= tuple(map(int, capability.split(".")))

  has_tokamax = importlib.util.find_spec("tokamax") is not None
  with (
    import_tokamax().config.cross_compile(True) if has_tokamax
    else contextlib.nullcontext(),
    mock.patch.object(cudnn, "check_cudnn_version", lambda: CUDNN_VERSION),
    mock.patch.object(cudnn, "check_compute_capability", is_at_least),
    mock.patch.object(cudnn, "is_cuda_compute_capability_equal", lambda _: False),
  ):
    yield
