"""The benchmark of the start: its arithmetic, its tables, its refusals."""

import json
import sys

import pytest

from experiments import base
from launch import benchmark
from launch.benchmarks import startup
from launch.benchmarks.contestants import Failed
from mtp_jax.config import from_config_dict, with_overrides


@pytest.mark.slow
def test_quick_run_writes_tables_and_figures(tmp_path, capsys, monkeypatch):
  pytest.importorskip("torch", reason="the benchmark's peer needs torch")
  monkeypatch.setenv("XLA_FLAGS", "")  # Only the tests have eight devices.
  benchmark.main(["startup", "--quick", "--output", str(tmp_path)])
  assert "left] 230,976 parameters, D=0: round 1" in capsys.readouterr().out
  record = json.loads((tmp_path / "startup-quick.json").read_text())
  (start,), (saves,) = record["starts"], record["saves"]
  assert start["errors"] == saves["errors"] == {}
  assert start["figures"].keys() == {
    "ours cold", "ours warm", "floor cold", "floor warm", "torch eager"
  }
  for ((figures),) in start["figures"].values():
    # The parent waits a little longer than the process knows of, which knows its own
    # start to a hundredth of a second.
    assert 0 < sum(figures["seconds"].values()) < figures["total"] + 0.01
  (ours,), (peer,) = saves["figures"]["ours"], saves["figures"]["torch.save"]
  for name in ("copy", "blocked", "without", "with"):
    assert len(ours[name]) == 2 and all(x > 0 for x in ours[name])
  assert len(peer["blocked"]) == 2
  # Parameters and two moments in float32, and a few counters.
  assert ours["bytes"] == pytest.approx(12 * 230_976, rel=0.01)
  assert (tmp_path / "startup-quick.md").read_text() == startup.markdown(record)


def test_ratios_are_formed_within_rounds_and_phases_are_medians():
  def start(total, **seconds):
    return {"total": total, "seconds": seconds}

  row = {
    "parameters": 1_000_000, "depth": 1, "hardware": "d",
    "errors": {"torch.compile warm": "process ended with code 1: no compiler"},
    "figures": {
      # The second round was disturbed: all are ten times slower.
      "ours cold": [start(x, imports=x / 4, data=x / 2) for x in (8.0, 80.0, 6.0)],
      "ours warm": [start(x, imports=x / 4, data=x / 2) for x in (4.0, 40.0, 4.0)],
      "floor cold": [start(9.0, jax=1.0 * x, program=3.0 * x) for x in (1, 10, 1)],
      "floor warm": [start(9.0, jax=1.0 * x, program=1.0 * x) for x in (1, 10, 1)],
      "torch eager": [start(x) for x in (2.0, 20.0, 2.0)],
      "torch.compile cold": [start(x) for x in (16.0, 160.0, 24.0)],
      "torch.compile warm": [start(8.0)],
    },
  }
  text = startup.markdown(_record(starts=[row]))
  assert (
    "| 1,000,000 | 1 | cold | 4.0 | 8.0 | 2.0 | 4.0 | 2.0 | 24.0 | 2.00 [1.50, 2.00] "
    "| 4.00 [3.00, 4.00] | 0.50 [0.25, 0.50] |" in text
  )
  assert (
    "| 1,000,000 | 1 | warm | 2.0 | 4.0 | 1.0 | 2.0 | 2.0 | - | 2.00 [2.00, 2.00] "
    "| 2.00 [2.00, 2.00] | - |" in text
  )
  assert "- 1,000,000 parameters, D=1, torch.compile warm: process ended" in text


def test_what_a_save_costs_is_a_share_of_100_steps():
  run = {
    "bytes": 12e6, "first": 0.5, "copy": [0.01, 0.01], "blocked": [0.2, 0.3],
    # Windows of 50 steps; the second pair was disturbed.
    "without": [5.0, 50.0], "with": [5.5, 60.0], "written": 0.75, "total": 200.0,
  }
  row = {
    "parameters": 1_000_000, "depth": 1, "hardware": "d", "errors": {},
    "figures": {"ours": [run], "torch.save": [{"blocked": [0.4, 0.3]}]},
  }
  text = startup.markdown(_record(saves=[row]))
  # 0.2 s of 10 s, 0.3 s of 100 s; 0.5 s of 10 s, 10 s of 100 s.
  assert (
    "| 1,000,000 | 1 | 12.0 | 550.0 | 10.0 | 500.0 | 250.0 | 1.15 [0.30, 2.00] "
    "| 7.50 [5.00, 10.00] | 0.75 | 350.0 | 25.00 [20.00, 30.00] | 0.75 [0.50, 1.00] |"
    in text
  )


def test_windows_with_and_without_a_save_alternate():
  config = startup.config_that_saves(_base(), window=10, saves=2)
  every, last = config.checkpoint.every_steps, config.train.num_steps
  begins_with_save = [step % every == 0 for step in range(10, last, 10)]
  assert begins_with_save == [False, True] * 3  # The first pair does not count.


def test_the_command_says_what_differs_from_the_base(tmp_path):
  config = with_overrides(_base(), {"mtp.kind": "sequential", "mtp.depth": 1})
  command = startup.train_command(config, tmp_path / "run", tmp_path / "cache")
  assert command[1:] == [
    "-m", "launch.train", "--config=experiments/base.py",
    f"--workdir={tmp_path / 'run'}", f"--compilation_cache={tmp_path / 'cache'}",
    "--config.mtp.kind=sequential", "--config.mtp.depth=1",
  ]


def test_a_process_is_left_at_the_line_that_is_wanted():
  code = (
    "import os, time; print('x', os.environ['WHO'], flush=True); print('y', flush=True)"
    "; time.sleep(60)"
  )
  command = [sys.executable, "-c", code]
  seconds, line = startup.seconds_to_line(command, lambda x: x == "y\n", WHO="me")
  assert line == "y\n" and 0 < seconds < 30
  assert startup.seconds_to_line(command, lambda x: x == "x me\n", WHO="me")[1]


def test_a_process_that_ends_before_says_why():
  code = "import sys; print('x'); sys.exit('first\\nno memory')"
  with pytest.raises(Failed, match=r"^process ended with code 1: no memory$"):
    startup.seconds_to_line([sys.executable, "-c", code], lambda line: line == "y\n")


@pytest.mark.parametrize("flag", ["rounds", "window", "saves"])
def test_nothing_to_measure_is_refused(flag, capsys):
  with pytest.raises(SystemExit) as caught:
    benchmark.main(["startup", f"--{flag}", "0"])
  assert caught.value.code == 2
  assert capsys.readouterr().err == f"error: --{flag} must be at least 1, got 0.\n"


def _base():
  return from_config_dict(base.get_config())


def _record(starts=(), saves=()):
  settings = {"seq_len": 8, "batch_size": 1, "vocab": 264, "rounds": 3, "window": 50}
  return {
    "command": "c", "date": "d", "commit": "0", "hardware": "h", "versions": {},
    "settings": settings, "starts": list(starts), "saves": list(saves),
  }
