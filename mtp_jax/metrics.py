"""Records in metrics.jsonl, TensorBoard and other trackers; peaks of devices."""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from mtp_jax import files, run_folder
from mtp_jax.files import plain
from mtp_jax.trackers import Sink, Trackers, named_scalars

# Dense bfloat16 peak in FLOP/s (products summed in float32) of one JAX device, by the
# whole `device_kind`: a variant (PCIe, a MIG slice, a laptop's) has another peak. From
# the makers' data sheets, where NVIDIA's figures with sparsity are twice as high.
PEAK_FLOPS = {
  # NVIDIA A100, A10, A30, A40 data sheets; RTX 3090, A6000: GA102 white paper.
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA A10": 125e12,
  "NVIDIA A30": 165e12,
  "NVIDIA A40": 149.7e12,
  "NVIDIA GeForce RTX 3090": 71e12,
  "NVIDIA RTX A6000": 154.8e12,
  # L4, L40, L40S data sheets; RTX 4090, 6000: Ada white paper; 5090: RTX Blackwell's.
  "NVIDIA L4": 121e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
  "NVIDIA RTX 6000 Ada Generation": 364.2e12,
  "NVIDIA GeForce RTX 5090": 209.5e12,
  # H100 data sheet (SXM 1,979, PCIe 1,513 and NVL 1,671 TFLOP/s with sparsity), and
  # data sheets of H200 (SXM 1,979, NVL 1,671) and GH200 (1,979).
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA GH200 480GB": 989e12,
  "NVIDIA GH200 144G HBM3e": 989e12,
  # HGX B200 and HGX B300 (36 PFLOP/s of 8 with sparsity), GB200 NVL72 and GB300 NVL72
  # (360 PFLOP/s of 72) data sheets.
  "NVIDIA B200": 2250e12,
  "NVIDIA B300 SXM6 AC": 2250e12,
  "NVIDIA GB200": 2500e12,
  "NVIDIA GB300": 2500e12,
  # Google Cloud documentation, per chip. A chip is one device, but each of the two
  # cores of a TPU7x chip (2,307 TFLOP/s) is one.
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the bfloat16 peak of a device; None where it is unknown, as of a CPU."""
  return PEAK_FLOPS.get(device_kind)


def model_flop_utilisation(
  flops_per_token: float, tokens_per_second: float
) -> float | None:
  """Returns model FLOPs per second over the peak of all devices; None: unknown."""
  peaks = [peak_flops(device.device_kind) for device in jax.devices()]
  if None in peaks:
    return None
  return flops_per_token * tokens_per_second / sum(peaks)


class MetricsWriter:
  """Appends records to metrics.jsonl, then hands them to TensorBoard and trackers.

  Only process 0 writes. A resumed run continues the file. Records after `step` were
  written by work that is done again, and are dropped first; so is half a line that a
  killed run left.

  Args:
    workdir: the run folder.
    step: where training continues.
    repeats: the records of this very step are written again.
  """

  def __init__(self, workdir: Path, step: int, repeats: bool = False):
    self._file = None
    if jax.process_index() != 0:
      return
    path = workdir / run_folder.METRICS
    kept = _lines_before(path, step, repeats)
    files.write_whole(path, kept)
    trackers = Trackers(workdir)
    for line in kept.splitlines():
      trackers.write(json.loads(line))
    self._tensorboard = _Tensorboard(workdir / run_folder.TENSORBOARD, step, repeats)
    self._sinks: tuple[Sink, ...] = (self._tensorboard, trackers)
    self._file = path.open("a")

  def write(self, record: dict[str, Any]) -> None:
    """Writes one record; every entry of a list becomes a TensorBoard scalar."""
    if self._file is None:
      return
    record = plain(record)
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for sink in self._sinks:
      sink.write(record)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    value: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._file is None:
      return
    try:
      self._file.close()
      for sink in self._sinks:
        sink.close()
    except OSError:  # A full disk, where that has been raised already.
      if kind is None:
        raise


class _Tensorboard:
  """An event file of TensorBoard, written in this thread.

  tensorboardX's own writer has a thread behind a queue of ten events. On a full disk
  that thread ends, and the next write to the queue blocks for ever.
  """

  def __init__(self, folder: Path, step: int, repeats: bool):
    writer, self._event = _import_tensorboard()
    folder.mkdir(exist_ok=True)
    # The library tells files of one folder apart by the second they were opened.
    self._writer = writer(str(folder / "events"), f".{os.getpid()}.{step}")
    # Hides what an earlier start wrote about steps that are done again.
    first = step + (not repeats) if step else 0
    self._add(first, session_log={"status": "START"})

  def write(self, record: dict[str, Any]) -> None:
    values = [
      {"tag": tag, "simple_value": scalar}
      for tag, scalar in named_scalars(record).items()
    ]
    self._add(record["step"], summary={"value": values})
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def _add(self, step: int, **what: Any) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), step=step, **what))


def _import_tensorboard() -> tuple[Any, Any]:
  """Returns `(EventsWriter, Event)`, without importing PyTorch, which takes seconds.

  tensorboardX imports PyTorch, if installed, to accept its tensors, which are not used
  here. The entry None in `sys.modules` makes that import fail, which it tolerates.
  """
  hides_torch = "torch" not in sys.modules
  if hides_torch:
    sys.modules["torch"] = None
  try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
  finally:
    if hides_torch:
      del sys.modules["torch"]
  return EventsWriter, Event


def _lines_before(path: Path, step: int, repeats: bool) -> bytes:
  """Returns the whole lines of work that is not done again; reports damaged ones.

  Diagnostics of a step are measured before the step, and so after the checkpoint of
  `step` was taken; all other records of `step` come before that checkpoint.
  """
  kept = []
  content = path.read_bytes() if path.exists() else b""
  for number, line in enumerate(content.splitlines(keepends=True), start=1):
    if not line.endswith(b"\n"):
      break
    try:
      record = json.loads(line)
      includes_step = record["kind"] != "diagnostics" and not repeats
      if record["step"] < step + includes_step:
        kept.append(line)
    except (ValueError, KeyError, TypeError, RecursionError):
      warnings.warn(f"{path}, line {number} is damaged and dropped.", stacklevel=3)
  return b"".join(kept)
