"""The benchmark runs, writes what it measured, and reports what failed."""

import json

import pytest

from launch import benchmark
from launch.benchmarks import pack, train
from launch.benchmarks.contestants import Contestant, Failed, one_document_batch
from mtp_jax.targets import future_targets
from tests import common


@pytest.mark.slow
def test_quick_run_writes_table_and_figures(tmp_path, capsys):
  pytest.importorskip("torch", reason="the benchmark's peer needs torch")
  benchmark.main(["train", "--quick", "--output", str(tmp_path)])
  assert "left] llama V=264 D=1 jax: round 2" in capsys.readouterr().out
  record = json.loads((tmp_path / "train-quick.json").read_text())
  assert [row["depth"] for row in record["rows"]] == [0, 1]
  for row in record["rows"]:
    assert row["contestants"].keys() == {"jax", "torch eager"}
    for figures in row["contestants"].values():
      assert len(figures["seconds"]) == 2
      assert all(s > 0 for steps in figures["seconds"] for s in steps)
    assert row["contestants"]["jax"]["xla_memory"] > 0
  assert (tmp_path / "train-quick.md").read_text() == train.markdown(record)


@pytest.mark.slow
def test_quick_run_of_packs_writes_table_and_figures(tmp_path):
  benchmark.main(["pack", "--quick", "--output", str(tmp_path)])
  record = json.loads((tmp_path / "pack-quick.json").read_text())
  ((row),) = record["rows"]
  assert row["contestants"].keys() == {"alone", "1", "2"}
  for figures in row["contestants"].values():
    assert len(figures["seconds"]) == 2 and figures["memory"] > 0
  assert (tmp_path / "pack-quick.md").read_text() == pack.markdown(record)


def test_a_pack_is_compared_with_as_many_trials_one_by_one():
  figures = {"compile_seconds": 100.0, "memory": 2e6}
  row = {
    "size": "1", "parameters": 1_000_000, "hardware": "d", "contestants": {
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
    "| 1,000,000 | 4 | 100.0 | 2000.0 | 2 | 72.0 | 2.00 [2.00, 2.50] | 48.0 | 1.92 ["
    in table
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
    "trunk": "gpt2", "vocab": 264, "kind": "none", "depth": 0, "flops_per_token": 100.0,
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
  assert "| gpt2 | 264 | 0 | 1100 | 2000 | - | 0.50 [0.50, 0.55] |" in table
  assert (
    "| gpt2 | 264 | 1 | 1.50 | 1.50 [1.50, 1.50] | - | - | 1.00 [1.00, 1.00] |" in table
  )
  assert "- gpt2, vocabulary 264, D=0, torch.compile: Failed: no compiler" in table


def test_every_target_of_the_benchmark_batch_counts():
  config = common.tiny_config("sequential", 3)
  _, mask_MBT = future_targets(one_document_batch(config), 3)
  assert mask_MBT.all()


def _figures(seconds):
  sizes = {"peak_memory": None, "xla_memory": None}
  return {"seconds": seconds, "threads": 2, "build_seconds": 1.0} | sizes


def _record(rows):
  settings = {
    "embed_dim": 8, "num_layers": 1, "num_heads": 1, "seq_len": 8, "batch_size": 1,
    "kind": "sequential", "rounds": 3, "steps_per_round": 2, "huge_pages": True,
  }
  return {
    "command": "c", "date": "d", "commit": "0", "hardware": "h", "versions": {},
    "settings": settings, "rows": rows,
  }
