"""The stopwatch of a start, and where its time begins."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtp_jax import stopwatch
from mtp_jax.stopwatch import Stopwatch, process_age


def test_phases_follow_each_other_without_a_gap(monkeypatch):
  times = iter([100.0, 103.0, 103.5, 105.0, 105.25])
  monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(times))
  watch = Stopwatch(age=2.0)
  watch.ends("imports")
  watch.ends("data")
  watch.ends("state")
  watch.ends("data")  # Of the next run of a pack.
  assert watch.record(7) == {
    "step": 7, "total": 7.25, "seconds": {"imports": 5.0, "data": 0.75, "state": 1.5}
  }
  said = "first step after 7.2 s: imports 5.0, data 0.8, state 1.5"
  assert watch.describe() == said


def test_a_process_knows_its_age():
  code = (
    "import time; time.sleep(0.3); from mtp_jax.stopwatch import process_age; "
    "print(process_age())"
  )
  start = time.monotonic()
  said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
  passed = time.monotonic() - start
  # The kernel counts in hundredths of a second.
  assert 0.29 <= float(said.stdout) <= passed + 0.02


def test_without_the_kernels_word_time_begins_with_the_import(monkeypatch):
  if sys.platform == "linux":
    assert process_age() > time.monotonic() - stopwatch._IMPORTED - 0.02

  def fail(_):
    raise FileNotFoundError

  monkeypatch.setattr(Path, "read_text", fail)
  before = time.monotonic() - stopwatch._IMPORTED
  assert process_age() == pytest.approx(before, abs=0.1)
