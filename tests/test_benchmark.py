"""The harness of the benchmarks, and the benchmarks of training and of packs."""

import functools
import json
import os
import signal
import subprocess
import sys
import types

import pytest

from launch.benchmarks import gpu, harness, limits, pages, sanity, train
from mtp_jax import metrics
from mtp_jax.config import ConfigError
from mtp_jax.kernels.grouped_matmul import grouped_matmul
from mtp_jax.targets import future_targets
from tests import common
from tests.commands import ROOT

pytest_plugins = ("tests.commands",)


# Floors.


@pytest.fixture
def small_work(monkeypatch):
  monkeypatch.setattr(limits, "_SIZES", {"other": (128, 1 << 20)})


def test_products_are_as_many_operations_as_the_compiler_counts(small_work):
  work = limits.products("float32")
  assert work.amount == 8 * 2 * 128**3
  assert work.program.cost_analysis()["flops"] == pytest.approx(work.amount, rel=0.01)
  assert work.seconds() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_touch_as_many_bytes_as_they_count(small_work, dtype):
  work = limits.reads(dtype)
  assert work.amount == work.array.nbytes == 1 << 20
  assert work.program.cost_analysis()["bytes accessed"] >= work.amount


def test_the_floor_of_a_model_is_in_its_compute_dtype(small_work, monkeypatch):
  dtypes = []
  products = limits.products
  monkeypatch.setattr(
    limits, "products", lambda dtype: dtypes.append(dtype) or products(dtype)
  )
  config = common.tiny_config("none", 0, {"trunk.compute_dtype": "bfloat16"})
  step, facts = limits.build_products(config)
  step()
  assert facts["flops"] == 8 * 2 * 128**3 and dtypes == ["bfloat16"]


def test_every_target_of_the_benchmark_batch_counts():
  config = common.tiny_config("sequential", 3)
  _, mask_MBT = future_targets(harness.one_document_batch(config), 3)
  assert mask_MBT.all()


# Turns.


class _Planted:
  """A contestant in this process; it logs its turns and its end."""

  def __init__(self, build):
    self.name, self.log, self.facts = build

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.log.append(f"{self.name} ends")

  def wait_ready(self):
    if self.name == "bad":
      raise harness.Failed("no memory")
    return self.facts

  def run(self, num_steps):
    self.log.append(self.name)
    return [1.0] * num_steps


@pytest.mark.parametrize(("apart", "log"), [
  (False, ["a", "b", "b", "a", "b ends", "bad ends", "a ends"]),
  (True, ["a", "a", "a ends", "bad ends", "b", "b", "b ends"]),
])
def test_contestants_take_turns_or_come_one_by_one(apart, log, monkeypatch, capsys):
  monkeypatch.setattr(harness, "Contestant", _Planted)
  found = []
  builds = {name: (name, found, {}) for name in ("a", "bad", "b")}
  settings = types.SimpleNamespace(rounds=2, steps_per_round=3, apart=apart)
  measured = harness.measure(builds, settings)
  assert found == log
  assert measured["b"]["seconds"] == [[1.0] * 3] * 2
  assert measured["bad"] == {"error": "no memory"}
  assert "bad: no memory" in capsys.readouterr().out


def test_a_pack_of_n_takes_an_nth_of_the_steps(monkeypatch):
  monkeypatch.setattr(harness, "Contestant", _Planted)
  builds = {str(n): ("", [], {"trials": n}) for n in (1, 4, 30)}
  settings = types.SimpleNamespace(rounds=1, steps_per_round=60)
  measured = harness.measure(builds, settings)
  taken = [len(x["seconds"][0]) for x in measured.values()]
  assert taken == [60, 15, 3]  # Two steps would not have a median.


def test_a_contestant_that_cannot_be_built_gives_the_reason():
  config = common.tiny_config("none", 0, {"trunk.attention": "cudnn"})
  build = functools.partial(train.build_ours, config)
  with (
    harness.Contestant(build, huge_pages=False) as contestant,
    pytest.raises(harness.Failed, match=r"Error: .*(cudnn|cuDNN|GPU|gpu)"),
  ):
    contestant.wait_ready()


def _kill_me():
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_contestant_that_is_killed_gives_the_reason():
  with (
    harness.Contestant(_kill_me, huge_pages=False) as contestant,
    pytest.raises(harness.Failed, match="its process was killed"),
  ):
    contestant.wait_ready()


# Ratios.


def _row(contestants, **sizes):
  return {
    "model": "5M", "trunk": "gpt2", "V": 264, "D": 0, "flops": 800.0,
    "contestants": contestants,
  } | sizes


def _cells(rows):
  """Returns the lines of the table of some rows, as dicts."""
  head, _, *lines = pages.compare(rows).splitlines()
  names, *cells = ([x.strip() for x in y.split("|")[1:-1]] for y in (head, *lines))
  return [dict(zip(names, x, strict=True)) for x in cells]


def _figures(seconds, **facts):
  return {"hardware": "NVIDIA H200", "seconds": seconds} | facts


# The second round was disturbed: all are ten times slower.
_FLOOR = _figures([[1.0], [10.0], [1.0]], flops=1000.0)


def test_ratios_are_formed_within_rounds():
  row = _row({
    "floor": _FLOOR,  # 800 FLOPs at 1000 a second, then at 100.
    "ours": _figures([[1.0, 1.0], [10.0, 10.0], [1.2, 1.0]]),
    "torch eager": _figures([[2.0, 2.0], [20.0, 20.0], [2.0, 2.0]]),
    "torch.compile": {"error": "Failed: no compiler"},
  })
  floor, ours, eager, compiled = _cells([row])
  assert [x["contestant"] for x in (floor, eager)] == ["floor", "torch eager"]
  times = [x["ms"] for x in (floor, ours, eager, compiled)]
  assert times == ["800", "1100", "2000", "-"]
  assert floor["ours / this"] == "1.25 [1.25, 1.38]"
  assert eager["ours / this"] == "0.50 [0.50, 0.55]"
  assert compiled["ours / this"] == "-" and compiled["failed"] == "Failed: no compiler"
  assert ours["MFU"] == f"{800 / 1.1 / metrics.peak_flops('NVIDIA H200'):.0%}"


def test_depth_costs_as_much_as_its_flops_or_more():
  plain = _row({"floor": _FLOOR, "ours": _figures([[1.0], [10.0]])})
  deeper = _row({"ours": _figures([[1.5], [18.0]])}, flops=1200.0, D=1)
  other = _row({"ours": _figures([[1.5], [18.0]])}, model="1M", D=1)
  (cost,) = train.depth_costs([plain, deeper, other])
  assert cost == {
    "model": "5M", "trunk": "gpt2", "V": 264, "D": 1,
    "FLOPs": "1.50", "ours": "1.65 [1.50, 1.80]", "ours / FLOPs": "1.10 [1.00, 1.20]"
  }


def test_a_pack_is_compared_with_as_many_trials_one_by_one():
  row = _row({
    "floor": _FLOOR | {"flops": 8000.0},  # 800 FLOPs take 0.1 s, then 1 s.
    "ours": _figures([[1.0, 1.0], [10.0, 10.0], [1.0, 1.0]], trials=1),
    "4": _figures([[2.0, 2.0], [20.0, 20.0], [1.6, 1.6]], trials=4, temporaries=2e6),
  })
  floor, _, pack = _cells([row])
  assert pack["ms"] == "500" and pack["ours / this"] == "2.00 [2.00, 2.50]"
  assert floor["ms"] == "100" and pack["temporaries MB"] == "2"


# Settings.


CONFIG = harness.make_config("tiny", "llama", 264, "sequential", 0, 64, 4)


def _settings(**changed):
  return types.SimpleNamespace(**train.PRESETS["quick"] | {"variants": []} | changed)


def test_variants_are_contestants_with_one_other_value():
  builds = train.builds(_settings(variants=["trunk.remat=full"]), CONFIG)
  assert list(builds) == ["floor", "ours", "torch eager", "trunk.remat=full"]
  (changed,) = builds["trunk.remat=full"].args
  assert (changed.trunk.remat, CONFIG.trunk.remat) == ("full", "auto")


@pytest.mark.parametrize(("variant", "message"), [
  ("trunk.remat", "--variants must be KEY=VALUE, got 'trunk.remat'."),
  ("trunk.remat=some", "trunk.remat must be one of"),
  ("trunk.rematt=full", "trunk.rematt"),
])
def test_a_variant_that_is_none_is_refused(variant, message):
  with pytest.raises(ConfigError) as error:
    train.builds(_settings(variants=[variant]), CONFIG)
  assert message in str(error.value)


@pytest.mark.parametrize(("arguments", "message"), [
  ("", "train, loss, decode, pack"),
  ("speed", "one of train, loss, decode, pack, sanity, gpu, got 'speed'."),
  ("train --rounds=0", "flag --rounds=0: 0 is not a positive integer"),
  ("pack --steps_per_round=0", "flag --steps_per_round=0: 0 is not a positive"),
  ("pack --packs=2,0", "flag --packs=2,0: must be numbers from 1 up, sep"),
  ("train --depths=0,x", "flag --depths=0,x: must be numbers from 0 up"),
  ("train --depths=-1", "flag --depths=-1: must be numbers from 0 up"),
  ("train --models=5M,7M", "flag --models=5M,7M: must be of tiny, 0.3M"),
  ("loss --contestants=liger", "--contestants=liger: must be of ours, plain JAX"),
  ("loss --contestants=tokamax", "--contestants must have ours, got tokamax."),
  ("loss --block_tokens=-1", "flag --block_tokens=-1: -1 is not a non-negative"),
  ("decode --batch_sizes=4,0", "flag --batch_sizes=4,0: must be numbers from 1"),
  ("decode --runs=no/run", "--runs must name run folders, 'no/run' is none."),
  ("decode --drafts=two", "--drafts must be whole numbers, got two."),
  ("train extra", "'extra': arguments must be flags"),
])
def test_bad_settings_are_refused_before_any_work(command, arguments, message):
  result = command("launch.benchmark", *arguments.split())
  assert result.code == (2 if arguments else 0)
  assert message in result.output and "Traceback" not in result.output
  assert not result.touched_backend


def test_help_is_that_of_the_benchmark(command):
  result = command("launch.benchmark", "train", "--help")
  assert result.code == 0 and train.__doc__.splitlines()[0] in result.output
  assert "--[no]apart" in result.output and "--variants" in result.output
  assert "264,50304 (cpu), 50304 (gpu)" in result.output


# Whole runs.


@pytest.mark.slow
def test_a_quick_run_measures_all_and_writes_the_page(command, tmp_path):
  pytest.importorskip("torch", reason="the benchmark's peer needs torch")
  variant = "loss.block_tokens=64"
  result = command(
    "launch.benchmark", "train", "--preset=quick", f"--variants={variant}",
    f"--output={tmp_path}",
  )
  assert result.code == 0, result.output
  assert "tiny llama V=264 D=1 ours: ready after" in result.output
  record = json.loads((tmp_path / "train-quick.json").read_text())
  assert record["command"].startswith("python -m launch.benchmark train --preset=quick")
  assert record["commit"] and record["versions"].keys() == {"python", "jax", "torch"}
  assert [row["D"] for row in record["rows"]] == [0, 1]
  for row in record["rows"]:
    assert list(row["contestants"]) == ["floor", "ours", "torch eager", variant]
    for figures in row["contestants"].values():
      assert len(figures["seconds"]) == 2
      assert all(s > 0 for steps in figures["seconds"] for s in steps)
    assert row["contestants"]["ours"]["xla_memory"] > 0
  assert (tmp_path / "train-quick.md").read_text() in result.output


@pytest.mark.slow
def test_a_quick_run_of_packs_measures_all(command, tmp_path):
  result = command(
    "launch.benchmark", "pack", "--preset=quick", "--notorch", f"--output={tmp_path}"
  )
  assert result.code == 0, result.output
  ((row),) = json.loads((tmp_path / "pack-quick.json").read_text())["rows"]
  assert list(row["contestants"]) == ["floor", "ours", "pack of 1", "pack of 2"]
  for name in ("ours", "pack of 1", "pack of 2"):
    figures = row["contestants"][name]
    assert len(figures["seconds"]) == 2 and figures["temporaries"] > 0


@pytest.mark.slow
def test_all_of_a_gpu_is_measured_in_parts_killed_and_resumed(tmp_path):
  """By its quick preset: what is done stays, and the next start does the rest."""
  state, name = tmp_path / "gpu-quick-parts.json", "gpu-quick-sanity.json"
  words = [
    sys.executable, "-m", "launch.benchmark", "gpu", "--preset=quick",
    f"--output={tmp_path}",
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(
    words, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, text=True,
  )
  for line in process.stdout:
    if line.startswith("layouts:"):  # The second part has begun.
      break
  process.terminate()
  assert process.wait(60) != 0
  process.stdout.close()
  before = json.loads(state.read_text())
  assert before["sanity"]["ended"] == "done" and "pack" not in before
  written = (tmp_path / name).stat().st_mtime_ns
  stopped = subprocess.run(
    [*words, "--seconds=1"], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert stopped.returncode == 1, stopped.stdout + stopped.stderr
  assert json.loads(state.read_text())["layouts"]["ended"] == "stopped: no time left"
  result = subprocess.run(
    words, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout + result.stderr
  done = json.loads(state.read_text())
  assert [x["ended"] for x in done.values()] == ["done"] * 3
  assert (tmp_path / name).stat().st_mtime_ns == written
  assert "| pack " in (tmp_path / "gpu-quick.md").read_text()
  checks = json.loads((tmp_path / name).read_text())["rows"]
  assert len(checks) > 5 and {x["ended"] for x in checks} == {"right"}
  assert "products of experts, blocked" in {x["check"] for x in checks}


def test_sanity_finds_products_with_the_wrong_experts(monkeypatch):
  assert sanity._experts("blocked") < sanity._WIDE

  def wrong(x_QD, w_EDF, expert_G, plan):
    return grouped_matmul(x_QD, w_EDF, (expert_G + 1) % 4, plan)

  monkeypatch.setattr(sanity, "grouped_matmul", wrong)
  assert sanity._experts("blocked") > 0.5


def test_predictions_stand_beside_what_was_measured():
  row = _row({
    "ours": _figures([[0.2], [0.3]], roofline_seconds=0.1),
    "pack": _figures([[0.4], [0.4]], roofline_seconds=0.2, trials=4),
    "floor": _FLOOR,
  })
  ours, pack = gpu.predictions("depths", [row])
  assert ours == {
    "part": "depths", "model": "5M", "V": 264, "D": 0, "contestant": "ours",
    "predicted ms": "100", "measured ms": "250",
    "measured / predicted": "2.50 [2.00, 3.00]",
  }
  assert (pack["predicted ms"], pack["measured ms"]) == ("50", "100")
