"""Records, TensorBoard events, the terminal, and model FLOP utilisation."""

import contextlib
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from launch.planning.chips import CHIPS
from mtp_jax import files, metrics, progress
from mtp_jax.metrics import MetricsWriter
from mtp_jax.progress import Progress


def read_records(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def read_events(folder):
  """Every scalar event as (tag, step) -> value, and the steps purged at each start."""
  scalars, purged = {}, []
  for file in sorted((folder / "tensorboard").iterdir()):
    data = file.read_bytes()
    while data:
      # A record is its length, a checksum of that, the event, and its checksum.
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      if event.HasField("session_log"):
        purged.append(event.step)
      for value in event.summary.value:
        scalars[value.tag, event.step] = value.simple_value
  return scalars, purged


def train_record(step, **values):
  return {"kind": "train", "step": step} | values


def test_records_are_strict_json(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    writer.write(
      train_record(
        np.int32(1),
        scalar=np.float32(0.5),
        per_depth=np.array([1.0, np.nan]),
        device=jax.numpy.arange(2),
        none=None,
        infinite=math.inf,
      )
    )
  assert read_records(tmp_path) == [
    train_record(
      1, scalar=0.5, per_depth=[1.0, None], device=[0, 1], none=None, infinite=None
    )
  ]


def test_tensorboard_holds_the_same_values(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    for step in (1, 2):
      writer.write(train_record(step, loss=[step + 0.5, math.nan], rate=step, mfu=None))
    writer.write({"kind": "validation", "step": 2, "bits_per_byte": 3.0})
  scalars, _ = read_events(tmp_path)
  assert scalars == {
    ("train/loss/0", 1): 1.5,
    ("train/loss/0", 2): 2.5,
    ("train/rate", 1): 1.0,
    ("train/rate", 2): 2.0,
    ("validation/bits_per_byte", 2): 3.0,
  }


def test_logging_does_not_import_torch_and_leaves_it_importable(tmp_path):
  code = (
    "import pathlib, sys; from mtp_jax.metrics import MetricsWriter; "
    "writer = MetricsWriter(pathlib.Path(sys.argv[1]), 0); "
    "writer.write({'kind': 'train', 'step': 1, 'loss': [1.5]}); "
    "assert 'tensorboardX' in sys.modules and 'torch' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
  assert read_events(tmp_path)[0] == {("train/loss/0", 1): 1.5}


def test_a_resumed_run_drops_what_will_be_done_again(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    for step in range(0, 6):
      writer.write({"kind": "diagnostics", "step": step})
      writer.write(train_record(step + 1))
  path = tmp_path / "metrics.jsonl"
  before = path.read_text().splitlines()
  with path.open("a") as file:
    file.write('{"kind": "train", "st')
  with MetricsWriter(tmp_path, 4) as writer:
    pass
  # Diagnostics of step 4 are measured after the checkpoint of step 4.
  assert path.read_text().splitlines() == before[:8]
  assert json.loads(before[7]) == train_record(4)
  assert read_events(tmp_path)[1] == [0, 5]
  with MetricsWriter(tmp_path, 0):
    pass
  assert path.read_text() == ""


def test_a_damaged_line_is_reported(tmp_path):
  path = tmp_path / "metrics.jsonl"
  whole = [json.dumps(train_record(step)) for step in (1, 2)]
  path.write_text(f"{whole[0]}\n\0\0\0\n{whole[1]}\n")
  with pytest.warns(UserWarning, match="line 2 is damaged"), MetricsWriter(tmp_path, 9):
    pass
  assert read_records(tmp_path) == [train_record(1), train_record(2)]


def test_progress_prints_lines_where_there_is_no_terminal(capsys, monkeypatch):
  clock = iter([100.0, 101.0, 104.0, 120.0, 121.0])
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
  bar = Progress("steps")
  bar.say("run: resumed at step 10")
  bar("run", 10, 50)
  bar("run", 15, 50)
  bar("run", 20, 50, "loss 1.2346")
  bar("run", 30, 50)  # No line for 16 seconds.
  bar("run", 31, 50)
  assert capsys.readouterr().out == (
    "run: resumed at step 10\n"
    "run: 20 of 50 steps, loss 1.2346, 12 s left\n"
    "run: 30 of 50 steps, 20 s left\n"
  )


def test_progress_reports_a_record_that_a_resumed_run_makes_up_for(capsys):
  Progress("steps")("run", 20, 50, "loss 1.2346")
  assert capsys.readouterr().out == "run: 20 of 50 steps, loss 1.2346\n"


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
  reader, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, 120))
  with os.fdopen(terminal, "w") as stderr:
    monkeypatch.setattr(sys, "stderr", stderr)
    bar = Progress("steps")
    for step in range(10, 21):
      bar("run", step, 50)
    bar("run", 20, 50, "loss 1.2346")
    bar.close()
  written = b""
  with contextlib.suppress(OSError):  # How a terminal says that nothing is left.
    while chunk := os.read(reader, 1 << 16):
      written += chunk
  os.close(reader)
  shown = written.decode()
  assert "run:" in shown
  assert "20/50" in shown
  assert "loss 1.2346" in shown
  assert "<" in shown, "tqdm writes elapsed<left"


def test_progress_can_be_silent(capsys):
  bar = Progress("steps", enabled=False)
  bar.say("x")
  bar("run", 0, 2)
  bar("run", 1, 2, "loss 1.0")
  bar.close()
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind, teraflops", [
  ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-80GB", 312),
  ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
  ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
  ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989),
  ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
  ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA GB300", 2500),
  ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
  ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX 6000 Ada Generation", 364.2),
  ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165.2),
  ("NVIDIA GeForce RTX 5090", 209.5),
  ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459),
  ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 1153.5),
])
def test_peak_of_known_devices(kind, teraflops):
  assert metrics.peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize("kind", [
  "cpu", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
  "NVIDIA H20", "NVIDIA L40G", "NVIDIA GeForce RTX 4090 D",
  "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU v4 lite", "TPU v3", "TPU8i", "gfx942",
])
def test_what_only_begins_like_a_known_device_has_no_peak(kind):
  assert metrics.peak_flops(kind) is None


def test_every_chip_that_can_be_planned_for_has_a_peak():
  assert all(chip.peak_flops for chip in CHIPS.values())


def test_model_flop_utilisation(monkeypatch):
  assert metrics.model_flop_utilisation(1e9, 1e3) is None
  monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e12)
  # 8 devices could do 8e12 FLOP/s.
  assert metrics.model_flop_utilisation(2e9, 1e3) == pytest.approx(0.25)
  kinds = [types.SimpleNamespace(device_kind=kind) for kind in ("known", "unknown")]
  monkeypatch.setattr(jax, "devices", lambda: kinds)
  monkeypatch.setattr(metrics, "peak_flops", {"known": 1e12}.get)
  assert metrics.model_flop_utilisation(2e9, 1e3) is None


def test_json_files_are_replaced_in_one_piece(tmp_path):
  path = tmp_path / "x.json"
  files.write_json(path, {"a": np.float32(1), "b": [np.nan]})
  assert json.loads(path.read_text()) == {"a": 1.0, "b": [None]}
  with pytest.raises(TypeError):
    files.write_json(path, {"a": object()})
  assert json.loads(path.read_text())["a"] == 1.0
