"""Where numbers go: metrics.jsonl, TensorBoard, the terminal; and how fast we are."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

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
  done again, and are dropped first.
  """

  def __init__(self, workdir: Path, step: int):
    self._file = self._tensorboard = None
    if jax.process_index() != 0:
      return
    path = workdir / "metrics.jsonl"
    kept = [line for line in _complete_lines(path) if _precedes(json.loads(line), step)]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept))
    replacement.replace(path)
    self._file = path.open("a")
    self._tensorboard = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step + 1 if step else None
    )

  def write(self, record: dict[str, Any]) -> None:
    """Writes one record; lists become one TensorBoard scalar per depth."""
    if self._file is None:
      return
    record = plain(record)
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for key, value in record.items():
      if key in ("kind", "step") or value is None:
        continue
      name = f"{record['kind']}/{key}"
      if isinstance(value, list):
        for depth, entry in enumerate(value):
          self._tensorboard.add_scalar(f"{name}/{depth}", entry, record["step"])
      else:
        self._tensorboard.add_scalar(name, value, record["step"])

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


class Progress:
  """A bar with loss and time left on a terminal, a plain line per report elsewhere."""

  def __init__(self, name: str, num_steps: int, start: int, enabled: bool):
    self._name, self._num_steps, self._start = name, num_steps, start
    self._enabled = enabled and jax.process_index() == 0
    self._began = time.monotonic()
    self._bar = None
    if self._enabled and sys.stderr.isatty():
      self._bar = tqdm(
        total=num_steps, initial=start, desc=name, unit="step", dynamic_ncols=True
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
    done = max(step - self._start, 1)
    left = (time.monotonic() - self._began) / done * (self._num_steps - step)
    print(
      f"{self._name}: step {step}/{self._num_steps}, loss {loss:.4f}, "
      f"{tokens_per_second:,.0f} tokens/s, {left:.0f} s left",
      flush=True,
    )

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._enabled:
      tqdm.write(f"{self._name}: {text}")
      sys.stdout.flush()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def plain(value: Any) -> Any:
  """Returns arrays and numpy scalars as lists and Python numbers, for JSON."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return np.asarray(value).tolist()
  return value


def write_json(path: Path, value: Any) -> None:
  """Writes JSON in one piece: a reader sees the old file or the new one."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(plain(value), indent=1) + "\n")
  temporary.replace(path)


def _precedes(record: dict[str, Any], step: int) -> bool:
  """Whether a record was written before the checkpoint of `step` was taken.

  Diagnostics of a step are measured before it, all else after it.
  """
  return record["step"] < step + (record["kind"] != "diagnostics")


def _complete_lines(path: Path) -> list[str]:
  """The lines that were written to their end; a killed run may leave half a line."""
  if not path.exists():
    return []
  return [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
