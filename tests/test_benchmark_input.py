"""The benchmark of the input: its contestants, its arithmetic, its refusals."""

import json
import time

import numpy as np
import pytest

from launch import benchmark
from launch.benchmarks import input as input_benchmark
from tests.common import tiny_config


@pytest.mark.slow
def test_quick_run_writes_table_and_figures(tmp_path, capsys):
  pytest.importorskip("torch", reason="the benchmark's peer needs torch")
  benchmark.main(["input", "--quick", "--output", str(tmp_path)])
  assert "left] 1M D=0 prepared loop: round 2" in capsys.readouterr().out
  record = json.loads((tmp_path / "input-quick.json").read_text())
  ((row),) = record["rows"]
  names = {"floor", "ours, 0 workers", "torch, 0 workers", "step", "loop"}
  assert row["contestants"].keys() == names
  for figures in row["contestants"].values():
    # Whole batches of 2 rows of 32 tokens, in two rounds of one turn.
    assert figures["tokens"] % 64 == 0 and figures["tokens"] > 0
    assert np.shape(figures["seconds"]) == (2, 1)
    assert np.all(np.array(figures["seconds"]) > 0)
  assert (tmp_path / "input-quick.md").read_text() == input_benchmark.markdown(record)


def test_ratios_are_formed_within_rounds():
  row = {
    "size": "1", "parameters": 1_000_000, "depth": 1, "source": "bytes", "seq_len": 100,
    "batch_size": 10, "hardware": "cpu", "contestants": {
      # 2000 tokens, two batches, a turn; the second round was disturbed: all are ten
      # times slower.
      "step": _figures(2000, [[1.0, 1.0, 9.0], [10.0], [1.0]]),
      "loop": _figures(1000, [[0.5], [5.0], [0.75]]),
      "floor": _figures(8_000_000, [[1.0], [10.0], [1.0]]),
      "ours, 0 workers": _figures(4_000_000, [[1.0], [10.0], [2.0]]),
      "torch, 0 workers": _figures(1_000_000, [[1.0], [10.0], [1.0]]),
      "ours, 2 workers": _figures(12_000_000, [[1.0], [10.0], [1.0]]),
      "torch, 2 workers": {"error": "Failed: no workers"},
    },
  }
  text = input_benchmark.markdown(_record([row]))
  # A step of 1000 tokens takes 500 ms, in the loop 500 or 750.
  assert (
    "| 1,000,000 | 1 | 100 | 10 | bytes | 500.0 | 750.0 | 1.00 [1.00, 1.50] | 0.002 | "
    "2000.00 [1000.00, 2000.00] | 500.00 [500.00, 500.00] |" in text
  )
  assert (
    "| 100 | 10 | 1 | bytes | 0 | 8 | 2 | 1 | 2.00 [2.00, 4.00] | 4.00 [2.00, 4.00] |"
    in text
  )
  assert (
    "| 100 | 10 | 1 | bytes | 2 | 8 | 12 | - | 0.67 [0.67, 0.67] | - |" in text
  )
  assert (
    "- 1,000,000 parameters, D=1, bytes, torch, 2 workers: Failed: no workers" in text
  )


def test_a_turn_takes_as_many_batches_as_fill_its_time(monkeypatch):
  # Of 1 batch, 0.2 s, since it was read ahead; of 2 and 4, 0.5 s and 1.5 s.
  clock = iter(np.cumsum([0.0, 0.2, 0.0, 0.5, 0.0, 1.5]))
  monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
  taken = []
  step, ready = input_benchmark._build(
    lambda config: lambda: taken.append(config), 1.0, _config(), "any"
  )
  assert len(taken) == 2 + 1 + 2 + 4
  step()
  assert len(taken) == 9 + 4 and ready.tokens == 4 * 3 * 5


def test_peer_and_floor_read_the_tokens_of_the_rows(tmp_path, monkeypatch):
  np.arange(16, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
  crops = input_benchmark.Crops(tmp_path / "tokens.bin", 5)
  found = [crops[index] for index in range(60)]
  assert {int(tokens[0]) for tokens, _ in found} == set(range(11))
  for tokens, targets in found:
    assert tokens.tolist() == list(range(tokens[0], tokens[0] + 5))
    assert targets.tolist() == (tokens + 1).tolist()

  copied = []
  monkeypatch.setattr(np, "array", lambda x: copied.extend(x.tolist()))
  take = input_benchmark._copies(_config(batch_size=1), file=tmp_path / "tokens.bin")
  for _ in range(4):
    take()
  assert copied == [*range(15), *range(5)]


@pytest.mark.parametrize("flags, message", [
  (["--seq_lens", "8"], "--seq_lens must be one for each of the 2 --models, got [8]."),
  (
    ["--models", "1M", "--seq_lens", "8", "--batch_sizes", "2", "3"],
    "--batch_sizes must be one for each of the 1 --models, got [2, 3].",
  ),
])
def test_sizes_without_a_batch_are_refused(flags, message, capsys):
  with pytest.raises(SystemExit) as caught:
    benchmark.main(["input", *flags])
  assert caught.value.code == 2
  assert capsys.readouterr().err == f"error: {message}\n"


def _config(batch_size=3):
  return tiny_config("none", 0, {"data.seq_len": 5, "data.batch_size": batch_size})


def _figures(tokens, seconds):
  return {"hardware": "cpu", "tokens": tokens, "seconds": seconds}


def _record(rows):
  settings = {
    "workers": [0, 2], "text": "stdlib", "rounds": 3, "steps_per_round": 1,
    "least_seconds": 0.3,
  }
  return {
    "command": "c", "date": "d", "commit": "0", "hardware": "h", "versions": {},
    "settings": settings, "rows": rows,
  }
