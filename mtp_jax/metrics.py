"""Where numbers go: metrics.jsonl, TensorBoard, the terminal; and how fast we are."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mtp_jax import files

# Dense bfloat16 peak of one chip in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the chip's bfloat16 peak, or None where it is not known (a CPU, say)."""
  matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
  return PEAK_FLOPS[max(matches, key=len)] if matches else None


def model_flop_utilisation(
  flops_per_token: float, tokens_per_second: float
) -> float | None:
  """Returns model FLOPs per second over the peak of all devices, or None."""
  peak = peak_flops(jax.devices()[0].device_kind)
  if peak is None:
    return None
  return flops_per_token * tokens_per_second / (peak * jax.device_count())


class MetricsWriter:
  """Appends records to metrics.jsonl and TensorBoard; only process 0 writes.

  A resumed run continues the file: records after `step` were written by work that is
  done again, and are dropped first; so is half a line that a killed run left.
  """

  def __init__(self, workdir: Path, step: int):
    self._file = self._tensorboard = None
    if jax.process_index() != 0:
      return
    path = workdir / "metrics.jsonl"
    replacement = path.with_suffix(".tmp")
    replacement.write_bytes(_lines_before(path, step))
    replacement.replace(path)
    self._file = path.open("a")
    self._tensorboard = _import_summary_writer()(
      str(workdir / "tensorboard"),
      purge_step=step + 1 if step else 0,
      # The library tells files of one folder apart by the second they were opened.
      filename_suffix=f".{os.getpid()}.{step}",
    )

  def write(self, record: dict[str, Any]) -> None:
    """Writes one record; every entry of a list becomes a TensorBoard scalar."""
    if self._file is None:
      return
    record = plain(record)
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for key, value in record.items():
      if key in ("kind", "step"):
        continue
      for name, scalar in _scalars(key, value):
        tag = f"{record['kind']}/{name}"
        self._tensorboard.add_scalar(tag, scalar, record["step"])
    self._tensorboard.flush()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    value: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._file is not None:
      self._file.close()
      self._tensorboard.close()


def _import_summary_writer() -> Any:
  """Returns tensorboardX's writer, imported without PyTorch, which takes seconds.

  It imports that, where there is one, to accept tensors, and nobody gives it any. It
  also does without; None makes it believe that there is none.
  """
  hides_torch = "torch" not in sys.modules
  if hides_torch:
    sys.modules["torch"] = None
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hides_torch:
      del sys.modules["torch"]
  return SummaryWriter


class Progress:
  """A bar with loss and time left on a terminal, a plain line per report elsewhere."""

  def __init__(self, name: str, num_steps: int, enabled: bool):
    self._name, self._num_steps = name, num_steps
    self._enabled = enabled and jax.process_index() == 0
    self._bar = None

  def start(self, step: int) -> None:
    """Starts the clock at `step`; compilation does not count as its time."""
    self._first, self._began = step, time.monotonic()
    if self._enabled and sys.stderr.isatty():
      self._bar = tqdm(
        total=self._num_steps,
        initial=step,
        desc=self._name,
        unit="step",
        dynamic_ncols=True,
      )

  def advance(self, step: int) -> None:
    """Moves the bar; cheap enough for every step."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def report(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Shows the loss of the interval that ended at `step`."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")
      return
    per_step = (time.monotonic() - self._began) / (step - self._first)
    left = per_step * (self._num_steps - step)
    print(
      f"{self._name}: step {step}/{self._num_steps}, loss {loss:.4f}, "
      f"{tokens_per_second:,.0f} tokens/s, {left:.0f} s left",
      flush=True,
    )

  def ends(self, step: int) -> None:
    """Makes `step` the last one."""
    self._num_steps = step
    if self._bar is not None:
      self._bar.total = step

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._enabled:
      tqdm.write(f"{self._name}: {text}")
      sys.stdout.flush()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def plain(value: Any) -> Any:
  """Returns arrays as lists and numbers as Python's, for JSON; NaN becomes None."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
  """Yields the numbers in nested lists and dicts, named by the way to them."""
  if isinstance(value, (dict, list)):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
      yield from _scalars(f"{name}/{key}", entry)
  elif value is not None:
    yield name, value


def write_json(path: Path, value: Any) -> None:
  """Writes JSON in one piece: a reader sees the old file or the new one."""
  files.write_whole(path, (json.dumps(plain(value), indent=1) + "\n").encode())


def _precedes(record: dict[str, Any], step: int) -> bool:
  """Whether a record was written before the checkpoint of `step` was taken.

  Diagnostics of a step are measured before it, all else after it.
  """
  return record["step"] < step + (record["kind"] != "diagnostics")


def _lines_before(path: Path, step: int) -> bytes:
  """Returns the whole lines that `_precedes` keeps; reports those that are damaged."""
  kept = []
  content = path.read_bytes() if path.exists() else b""
  for number, line in enumerate(content.splitlines(keepends=True), start=1):
    if not line.endswith(b"\n"):
      break
    try:
      if _precedes(json.loads(line), step):
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      warnings.warn(f"{path}, line {number} is damaged and dropped.", stacklevel=3)
  return b"".join(kept)
