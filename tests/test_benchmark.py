"""The benchmark runs, writes what it measured, and reports what failed."""

import json

import pytest

from launch import benchmark
from launch.benchmarks import limits, pack, train
from launch.benchmarks.contestants import Contestant, Failed, Turns
from launch.benchmarks.rows import one_document_batch
from mtp_jax import metrics
from mtp_jax.targets import future_targets
from tests import common


@pytest.mark.slow
def test_quick_run_writes_table_and_figures(tmp_path, capsys):
  pytest.importorskip("torch", reason="the benchmark's peer needs torch")
  variant = "loss.block_tokens=64"
  benchmark.main(
    [
      "train", "--quick", "--variants", variant, "--output", str(tmp_path),
      "--trace", str(tmp_path / "profiles"),
    ]
  )
  assert "left] tiny llama V=264 D=1 jax: round 2" in capsys.readouterr().out
  record = json.loads((tmp_path / "train-quick.json").read_text())
  assert [row["depth"] for row in record["rows"]] == [0, 1]
  for row in record["rows"]:
    assert row["contestants"].keys() == {"jax", f"jax {variant}", "torch eager"}
    assert len(row["floor"]["seconds"]) == 2 and row["floor"]["flops"] > 0
    for figures in row["contestants"].values():
      assert len(figures["seconds"]) == 2
      assert all(s > 0 for steps in figures["seconds"] for s in steps)
    assert row["contestants"]["jax"]["xla_memory"] > 0
  assert (tmp_path / "train-quick.md").read_text() == train.markdown(record)
  profiled = {path.parents[3].name for path in tmp_path.rglob("*.xplane.pb")}
  expected = {f"tiny-llama-v-264-d-{depth}-jax" for depth in (0, 1)}
  assert expected < profiled and not any("torch" in name for name in profiled)


@pytest.mark.slow
def test_quick_run_of_packs_writes_table_and_figures(tmp_path):
  benchmark.main(["pack", "--quick", "--no-torch", "--output", str(tmp_path)])
  record = json.loads((tmp_path / "pack-quick.json").read_text())
  ((row),) = record["rows"]
  assert row["contestants"].keys() == {"alone", "1", "2"}
  for figures in row["contestants"].values():
    assert len(figures["seconds"]) == 2 and figures["memory"] > 0
  assert (tmp_path / "pack-quick.md").read_text() == pack.markdown(record)


def test_a_pack_is_compared_with_as_many_trials_one_by_one():
  figures = {"compile_seconds": 100.0, "memory": 2e6}
  row = {
    "size": "1M", "parameters": 1_000_000, "hardware": "d", "flops_per_step": 10.0,
    # 100 FLOPs a second, then 10.
    "floor": {"flops": 100.0, "seconds": [[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]]},
    "contestants": {
      # The second round was disturbed: both are ten times slower.
      "alone": figures | {"seconds": [[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]]},
      "4": figures | {"seconds": [[2.0, 2.0], [20.0, 20.0], [1.6, 1.6]]},
      "8": {"error": "Failed: no memory"},
    },
  }
  settings = {"seq_len": 8, "batch_size": 1, "rounds": 3, "steps_per_round": 2}
  table = pack.markdown(
    _record([row]) | {"settings": settings | {"num_steps": 100}}
  )
  # 100 steps of 1 s; of 4 trials, 50 s each. Compiled: 125 s and 75 s each.
  assert (
    "| 1,000,000 | 4 | 100.0 | 2000.0 | 0.20 [0.20, 0.25] | 2 | 72.0 | "
    "2.00 [2.00, 2.50] | 48.0 | 1.92 [" in table
  )
  assert "- 1,000,000 parameters, 8: Failed: no memory" in table


def test_a_pack_without_trials_is_refused(capsys):
  with pytest.raises(SystemExit) as caught:
    benchmark.main(["pack", "--packs", "0"])
  assert caught.value.code == 2
  assert capsys.readouterr().err == "error: --packs must be at least 1, got 0.\n"


def test_a_contestant_that_cannot_be_built_says_why():
  config = common.tiny_config("none", 0, {"trunk.attention": "cudnn"})
  contestant = Contestant("jax", config, huge_pages=False)
  with pytest.raises(Failed, match=r"Error: .*(cudnn|cuDNN|GPU|gpu)"):
    contestant.wait_ready()
  contestant.close()


def test_ratios_are_formed_within_rounds_against_the_faster_peer():
  row = {
    "model": "5M", "trunk": "gpt2", "vocab": 264, "kind": "none", "depth": 0,
    "parameters": 5_000_000, "flops_per_token": 100.0, "hardware": "NVIDIA H200",
    # 8 tokens of 100 FLOPs at 1000 a second, then at 100.
    "floor": {"flops": 1000.0, "seconds": [[1.0], [10.0], [1.0]]},
    "contestants": {
      # The second round was disturbed: all are ten times slower.
      "jax": _figures([[1.0, 1.0], [10.0, 10.0], [1.2, 1.0]]),
      "torch eager": _figures([[2.0, 2.0], [20.0, 20.0], [2.0, 2.0]]),
      "torch.compile": {"error": "Failed: no compiler"},
    },
  }
  deeper = row | {
    "kind": "sequential", "depth": 1, "flops_per_token": 150.0,
    "contestants": {"jax": _figures([[1.5], [15.0], [1.65]])},
  }
  table = train.markdown(_record([row, deeper]))
  middle = "| 800.0 | 1100 | 2000 | - | 0.80 [0.73, 0.80] |"
  peak = metrics.peak_flops("NVIDIA H200")
  assert (
    f"| 5M | gpt2 | 264 | 0 {middle} {800 / 1.1 / peak:.0%} | 0.50 [0.50, 0.55] |"
    in table
  )
  depth = "| 1.50 | 1.50 [1.50, 1.50] | - | - | 1.00 [1.00, 1.00] |"
  assert f"| 5M | gpt2 | 264 | 1 {depth}" in table
  assert (
    "- 5M gpt2, vocabulary 264, D=0, torch.compile: Failed: no compiler" in table
  )


def test_variants_are_held_against_the_step_without_them():
  row = {
    "model": "5M", "trunk": "gpt2", "vocab": 264, "kind": "none", "depth": 0,
    "parameters": 5_000_000, "flops_per_token": 100.0, "hardware": "cpu",
    "floor": {"error": "Failed: no memory"},
    "contestants": {
      "jax": _figures([[1.0], [10.0]]),
      "jax trunk.remat=full": _figures([[1.5], [15.0]]),
    },
  }
  table = train.markdown(_record([row]))
  assert "| 5M | gpt2 | 264 | 0 | 1.50 [1.50, 1.50] |" in table
  assert "| 5M | gpt2 | 264 | 0 | - | 5500 | 8250 | - | - | - |" in table
  assert "- 5M gpt2, vocabulary 264, D=0, floor: Failed: no memory" in table


@pytest.mark.parametrize("key", ["rounds", "steps_per_round"])
@pytest.mark.parametrize("name", ["train", "pack", "input"])
def test_turns_without_steps_are_refused(name, key, capsys):
  with pytest.raises(SystemExit) as caught:
    benchmark.main([name, f"--{key}=0"])
  assert caught.value.code == 2
  assert capsys.readouterr().err == f"error: --{key} must be at least 1, got 0.\n"


@pytest.mark.parametrize(
  ("variant", "message"),
  [
    ("trunk.remat", "--variants must be KEY=VALUE, got 'trunk.remat'."),
    ("trunk.remat=some", "trunk.remat must be one of"),
    ("trunk.rematt=full", "trunk.rematt"),
  ],
)
def test_a_variant_that_is_none_is_refused(variant, message, capsys):
  with pytest.raises(SystemExit) as caught:
    benchmark.main(["train", "--quick", "--variants", variant])
  assert caught.value.code == 2
  assert message in capsys.readouterr().err


class _Planted:
  """A contestant of a test: it says how often it was asked, and whether it ended."""

  def __init__(self, name, log):
    self.name, self._log = name, log

  def wait_ready(self):
    return limits.Ready("cpu", 1.0)

  def run(self, num_steps):
    self._log.append(self.name)
    return [1.0] * num_steps

  def close(self):
    self._log.append(f"{self.name} ends")


@pytest.mark.parametrize(
  ("apart", "log"),
  [
    (False, ["a", "b", "b", "a", "a ends", "b ends"]),
    (True, ["a", "a", "a ends", "b", "b", "b ends"]),
  ],
)
def test_contestants_take_turns_or_come_one_by_one(apart, log):
  found, row = [], {"contestants": {}}
  with Turns(2, 3, lambda *_: None, apart) as turns:
    for name in "ab":
      turns.enter(name, _Planted(name, found), row)
    turns.take()
  assert found == log
  assert row["contestants"]["b"]["seconds"] == [[1.0] * 3] * 2


def test_every_target_of_the_benchmark_batch_counts():
  config = common.tiny_config("sequential", 3)
  _, mask_MBT = future_targets(one_document_batch(config), 3)
  assert mask_MBT.all()


def _figures(seconds):
  sizes = {"peak_memory": None, "xla_memory": None}
  return {"seconds": seconds, "threads": 2, "build_seconds": 1.0} | sizes


def _record(rows):
  settings = {
    "seq_len": 8, "batch_size": 1, "kind": "sequential", "rounds": 3,
    "steps_per_round": 2, "huge_pages": True, "apart": False,
  }
  return {
    "command": "c", "date": "d", "commit": "0", "hardware": "h", "versions": {},
    "settings": settings, "rows": rows,
  }
