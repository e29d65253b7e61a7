"""The accelerators that train steps can be compiled for, from their makers' sheets."""

import dataclasses

from mtp_jax.metrics import peak_flops

# JAX reserves this share of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
POOL = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU chip.

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
    """Dense bfloat16 FLOP/s of one device; see `metrics.PEAK_FLOPS`."""
    return peak_flops(self.device_kind)

  @property
  def source(self) -> str:
    return f"Google Cloud documentation, TPU {self.name}"


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
  """One kind of NVIDIA GPU; `most` are the GPUs of one node.

  capability:     compute capability.
  cores:          streaming multiprocessors.
  lanes:          float32 units of a multiprocessor.
  bandwidth:      bytes per second of the memory.
  link:           bytes per second to other GPUs of the node, in one direction.
  l2_bytes:       of the second-level cache.
  clock_ghz:      of the multiprocessors, at most.
  shared_kb:      shared memory of a multiprocessor; a block can have 1 KB less.
  """

  capability: tuple[int, int]
  cores: int
  lanes: int
  bandwidth: float
  link: float
  l2_bytes: int
  clock_ghz: float
  shared_kb: int

  @property
  def source(self) -> str:
    return f"NVIDIA {self.name.upper()} data sheet"

  def target(self) -> str:
    """Returns the description that XLA compiles for: a `GpuTargetConfigProto`.

    Limits of blocks and multiprocessors hold for all compute capabilities from 8.0
    to 10.0 (CUDA C++ Programming Guide, technical specifications).
    """
    major, minor = self.capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_kb * 1024}
  shared_memory_per_block_optin: {(self.shared_kb - 1) * 1024}
  core_count: {self.cores} fpus_per_core: {self.lanes}
  memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.hbm_bytes:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.device_kind}"
"""


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", "TPU v4", 32e9, 4096, axes=3),
    Chip("v5e", "TPU v5 lite", 16e9, 256, axes=2),
    Chip("v5p", "TPU v5", 95e9, 8960, axes=3),
    Chip("v6e", "TPU v6 lite", 32e9, 256, axes=2),
    # Also: A100 and H100 architecture white papers, and the HGX B200 data sheet.
    Gpu(
      "a100", "NVIDIA A100-SXM4-80GB", 80e9, 8, 1, capability=(8, 0), cores=108,
      lanes=64, bandwidth=2.039e12, link=300e9, l2_bytes=40 << 20, clock_ghz=1.41,
      shared_kb=164,
    ),
    Gpu(
      "h100", "NVIDIA H100 80GB HBM3", 80e9, 8, 1, capability=(9, 0), cores=132,
      lanes=128, bandwidth=3.35e12, link=450e9, l2_bytes=50 << 20, clock_ghz=1.98,
      shared_kb=228,
    ),
    Gpu(
      "h200", "NVIDIA H200", 141e9, 8, 1, capability=(9, 0), cores=132, lanes=128,
      bandwidth=4.8e12, link=450e9, l2_bytes=50 << 20, clock_ghz=1.98, shared_kb=228,
    ),
    Gpu(
      "b200", "NVIDIA B200", 180e9, 8, 1, capability=(10, 0), cores=148, lanes=128,
      bandwidth=7.7e12, link=900e9, l2_bytes=126 << 20, clock_ghz=1.965, shared_kb=228,
    ),
  )
}
