"""Sweeps: names, plans and schedules as functions; the rest with real workers.

The trials are so small that starting workers and compiling is nearly all that the tests
of `Sweep` take: each of them does several things in one sweep.
"""

import csv
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import textwrap
import time
import types

import pytest
import rich.console

from experiments import base
from launch import jobs, results_csv, state_table, states, trials, words
from launch.engines import display, local, order, workers
from launch.engines.local import Sweep
from launch.engines.workers import Slot
from mtp_jax import run_folder
from mtp_jax.checkpoint import check_resumable
from mtp_jax.config import ConfigError, from_config_dict, to_dict, with_overrides
from tests.quick_xla import xla_flags

TINY = {
  "trunk.num_layers": 1,
  "trunk.embed_dim": 8,
  "trunk.mlp_dim": 8,
  "trunk.num_heads": 1,
  "trunk.num_kv_heads": 1,
  "data.source": "files",
  "data.seq_len": 16,
  "data.batch_size": 2,
  "data.validation_fraction": 0.4,
  "loss.block_tokens": 64,
  "train.num_steps": 40,
  "train.log_every": 10,
  "train.max_nonfinite_steps": 1,
  "eval.num_rows": 4,
  "eval.batch_size": 4,
  "eval.line_prompts": 0,
  "eval.function_prompts": 0,
}
SEEDS = [{"name": f"seed={seed}", "seed": seed} for seed in (0, 1)]
# After 20 of 40 steps.
STOPS = {
  "name": "stops", "train.stop_metric": "loss", "train.stop_value": 99.0,
  "train.eval_every": 10,
}
DIVERGES = {"name": "diverges", "optimizer.learning_rate": 1e30}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(20):
    (folder / f"{i}.txt").write_text(f"document {i} says {i * i}\n" * 10)
  return folder


@pytest.fixture
def one_device(monkeypatch):
  """Workers take the environment of this process, which asks for eight devices."""
  monkeypatch.setenv("XLA_FLAGS", xla_flags())
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def tiny(corpus, **overrides):
  values = TINY | {"data.path": str(corpus)} | overrides
  return with_overrides(from_config_dict(base.get_config()), values)


def plan(corpus, root, swept, **overrides):
  return trials.plan(tiny(corpus, **overrides), {}, swept, root)


def sweep_of(planned, root, cache="", kind=Sweep, **options):
  return kind(jobs.choose(planned, again=False), root, cache, **options)


def kinds(planned):
  return {trial.name: states.read_state(trial).kind for trial in planned}


def metrics(trial):
  lines = (trial.workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


# Names and points


def experiment(source):
  module = types.ModuleType("experiment")
  exec(textwrap.dedent(source), vars(module))
  return module


CROSSED = experiment("""
  def sweep_depth():
    yield {"mtp.depth": 0}
    yield {"mtp.depth": 2, "mtp.weight": 0.5}
  def sweep_seed():
    for seed in (0, 1):
      yield {"seed": seed}
  def sweep_seed_of_data():
    yield {"seed": 7}
""")


def names(points):
  return [point["name"] for point in points]


def test_generators_are_crossed_by_name():
  found = trials.points(CROSSED, None, ["seed", "depth"])
  assert names(found) == [
    "seed=0,depth=0",
    "seed=0,depth=2,weight=0.5",
    "seed=1,depth=0",
    "seed=1,depth=2,weight=0.5",
  ]
  assert found[3] == {
    "seed": 1, "mtp.depth": 2, "mtp.weight": 0.5, "name": "seed=1,depth=2,weight=0.5"
  }
  assert names(trials.points(CROSSED, None, ["depth"])) == [
    "depth=0", "depth=2,weight=0.5"
  ]


def test_clashing_and_unknown_sweeps_are_refused():
  with pytest.raises(ConfigError, match=r"^seed: set by two of the sweeps; choose"):
    trials.points(CROSSED, None)
  with pytest.raises(ConfigError, match=r"--sweep must name some of depth, .*'x'"):
    trials.points(CROSSED, None, ["x"])


def test_sweep_function_names_its_trials_and_gets_the_preset():
  module = experiment("""
    def sweep(preset):
      yield {"name": preset + ",a", "seed": 1}
      yield {"seed": 2}
  """)
  assert trials.points(module, "cpu") == [
    {"name": "cpu,a", "seed": 1}, {"name": "seed=2", "seed": 2}
  ]


@pytest.mark.parametrize("overrides, name", [
  ({"mtp.kind": "parallel"}, "kind=parallel"),
  ({"trunk.kind": "gpt2"}, "trunk.kind=gpt2"),
  ({"trunk.embed_dim": 64}, "embed_dim=64"),
  ({"data.seed": 1}, "data.seed=1"),
  ({"optimizer.learning_rate": 0.00003}, "learning_rate=3e-05"),
  ({"mtp.share_modules": True}, "share_modules=True"),
  ({"mtp.depth_weights": (1.0, 0.5)}, "depth_weights=1+0.5"),
  ({"data.path": "a b/c:d"}, "data.path=a-b-c-d"),
  ({}, "default"),
])
def test_names_depend_on_what_is_set_alone(overrides, name):
  assert trials._named([overrides])["name"] == name


# Folders


@pytest.mark.parametrize("name, folder", [
  ("embed_dim=64,kind=sequential,depth=3,arm=added,seed=0",
   "e64-sequential-d3-added-s0"),
  ("width=64,passes=1,n=4,seed=0", "w64-p1-n4-s0"),
  ("width=8,train=endless,n=2,seed=100,rate=x0.5,decay=1",
   "w8-train_endless-n2-s100-rate_x0.5-decay1"),
  ("arms=3,kind=eagle3,seed=1,reversed", "arms3-eagle3-s1-reversed"),
  ("learning_rate=3e-05", "lr3e-05"),
  ("beta1=0.9", "beta1_0.9"),  # Not what `beta=10.9` is called.
  ("kind=3", "kind3"),
  ("depth_weights=1+0.5,share_modules=True", "depth_weights1+0.5-share_modules_True"),
  ("a=b=c", "a_b_c"),
  ("default", "default"),
  ("gains_with_scale_cpu", "gains_with_scale_cpu"),
])
def test_folders_of_trials_have_short_names(name, folder):
  assert run_folder.folder_name(name) == folder
  assert run_folder.folder_name(folder) == folder


SHIPPED = [
  (name, preset)
  for name in words.experiments()
  for preset in (None, "cpu", "gpu", "cluster", "cpu_trunks", "gpu_trunks")
]


def test_shipped_trials_have_folders_of_their_own_that_need_no_quotes():
  """In every experiment and preset; `plan` refuses two trials with one folder."""
  num_trials = 0
  for name, preset in SHIPPED:
    experiment = importlib.import_module(f"experiments.{name}")
    try:
      experiment.get_config(*(() if preset is None else (preset,)))
    except (TypeError, ValueError):  # It has no such preset.
      continue
    found = names(trials.points(experiment, preset))
    folders = [run_folder.folder_name(x) for x in found]
    assert len(set(folders)) == len(found)
    assert all(shlex.quote(x) == x and not set("=,") & set(x) for x in folders)
    num_trials += len(found)
  assert num_trials > 1000


def test_a_trial_keeps_its_folder_whatever_other_trials_there_are(corpus, tmp_path):
  swept = [{"name": f"width={x},seed={x}", "seed": x} for x in range(3)]
  more = [{"name": "weight=1", "seed": 7}, *reversed(swept)]
  before, after = plan(corpus, tmp_path, swept), plan(corpus, tmp_path, more)
  assert {t.name: t.workdir for t in before}.items() <= {
    t.name: t.workdir for t in after
  }.items()


def test_two_trials_with_one_folder_are_refused(corpus, tmp_path):
  swept = [{"name": "seed=0"}, {"name": "s0", "seed": 1}]
  with pytest.raises(ConfigError, match=r"got 'seed=0' and 's0', both 's0'\.$"):
    plan(corpus, tmp_path, swept)


def test_an_older_sweep_goes_on_in_its_folders(corpus, tmp_path):
  """They have the whole name; a trial that is new gets a short one beside them."""
  (tmp_path / "seed=0").mkdir()
  old, new = plan(corpus, tmp_path, SEEDS)
  assert (old.workdir.name, new.workdir.name) == ("seed=0", "s1")
  done(old), done(new)
  assert kinds(plan(corpus, tmp_path, SEEDS)) == {"seed=0": "done", "seed=1": "done"}
  with results_csv.collect(tmp_path).open() as file:
    rows = [(row["trial"], row["folder"]) for row in csv.DictReader(file)]
  assert rows == [("seed=1", "s1"), ("seed=0", "seed=0")]
  trials.check_folders(plan(corpus, tmp_path, SEEDS))


# Plans


def test_plan_names_every_trial_that_cannot_run(corpus, tmp_path):
  swept = [*SEEDS, *({"name": f"d{d}", "mtp.depth": d} for d in (1, 2))]
  with pytest.raises(ConfigError) as caught:
    plan(corpus, tmp_path, [*swept, {"name": "x/y"}, {"name": "z", "seed": "0"}])
  assert str(caught.value).splitlines() == [
    "d1: mtp.depth must be 0 for mtp.kind 'none', got 1.",
    "d2: mtp.depth must be 0 for mtp.kind 'none', got 2.",
    "x/y: name must be 1 to 200 letters, digits or any of '=,._+-', got 'x/y'.",
    "z: seed must be of type int, got '0'.",
  ]


def test_command_line_wins_but_for_what_names_the_trials(corpus, tmp_path):
  config = tiny(corpus)
  swept = [point | {"train.num_steps": 5} for point in SEEDS]
  planned = trials.plan(config, {"train.num_steps": 7}, swept, tmp_path)
  assert [trial.num_steps for trial in planned] == [7, 7]
  with pytest.raises(ConfigError, match=r"^seed=0 and 1 more: seed: set by the sweep"):
    trials.plan(config, {"seed": 3}, swept, tmp_path)


def test_names_are_distinct(corpus, tmp_path):
  config = tiny(corpus)
  with pytest.raises(ConfigError, match=r"name must be different .* got 'a' 2 times"):
    trials.plan(config, {}, [{"name": "a", "seed": s} for s in (0, 1)], tmp_path)


def test_an_experiment_without_sweeps_is_one_trial(corpus, tmp_path):
  (trial,) = plan(corpus, tmp_path, [])
  assert trial.workdir == tmp_path / "base"


def test_missing_files_are_named_once(corpus, tmp_path):
  planned = plan(corpus, tmp_path, SEEDS, **{"data.path": str(tmp_path / "nothing")})
  with pytest.raises(ConfigError, match=r"^seed=0 and 1 more: data.path must be"):
    trials.check_folders(planned)


def test_a_folder_with_another_run_is_refused(corpus, tmp_path):
  (trial,) = plan(corpus, tmp_path, SEEDS[:1])
  trial.workdir.mkdir()
  saved = with_overrides(trial.config, {"train.num_steps": 41, "eval.num_rows": 5})
  write_config(trial, saved)
  (trial.workdir / "checkpoints/4").mkdir(parents=True)
  with pytest.raises(ConfigError, match=r"train.num_steps: 41 there, 40 now"):
    trials.check_folders([trial])
  write_config(trial, with_overrides(trial.config, {"eval.num_rows": 5}))
  trials.check_folders([trial])
  (trial.workdir / "DONE").touch()
  with pytest.raises(ConfigError, match=r"seed=0: eval.num_rows must be 5, .* got 4;"):
    trials.check_folders([trial])


def test_a_config_may_be_corrected_until_there_is_work(corpus, tmp_path):
  """Engines write configs ahead: one that is refused in its job is put right."""
  (trial,) = plan(corpus, tmp_path, SEEDS[:1])
  trials.prepare(trial)
  (longer,) = plan(corpus, tmp_path, SEEDS[:1], **{"train.num_steps": 41})
  trials.check_folders([longer])
  with pytest.raises(ConfigError, match=r"train.num_steps: 40 there, 41 now"):
    trials.check_active([longer])  # Its job would train what was written.


def write_config(trial, config):
  values = to_dict(config)
  (trial.workdir / "config.json").write_text(json.dumps(values))


def test_only_selects_by_parts_of_the_name(corpus, tmp_path):
  swept = trials.points(experiment("""
    def sweep_weight():
      for weight in (0.1, 0.5):
        yield {"mtp.weight": weight}
    def sweep_seed():
      for seed in (1, 10):
        yield {"seed": seed}
  """), None)
  planned = plan(corpus, tmp_path, swept)

  def only(pattern):
    return [trial.name for trial in trials.select(planned, pattern)]

  assert len(only(None)) == 4
  assert only("seed=1") == ["weight=0.1,seed=1", "weight=0.5,seed=1"]
  assert only("weight=0.5,seed=1*") == ["weight=0.5,seed=1", "weight=0.5,seed=10"]
  with pytest.raises(ConfigError, match="no trial matches 'seed=2'; there are"):
    only("seed=2")


# Equal runs

GRID = experiment("""
  def sweep_depth():
    for depth in (0, 1):
      yield {"mtp.kind": "sequential", "mtp.depth": depth, "name": f"depth={depth}"}
  def sweep_weight():
    for weight in (0.1, 0.3):
      yield {"mtp.weight": weight}
  def sweep_schedule():
    yield {"mtp.schedule": "constant"}
    yield {"mtp.schedule": "linear", "mtp.final_weight": 0.0}
""")


def done(trial):
  """Fills the run folder of a trial as training does."""
  (trial.workdir / "checkpoints" / "40").mkdir(parents=True)
  (trial.workdir / "checkpoints" / "40" / "x").write_text("weights")
  write_config(trial, trial.config)
  result = {"main_loss": {"mean": 1.5, "stderr": 0.1}, "step": 40}
  for name, value in (("run", {"commit": "abc"}), ("eval", result)):
    (trial.workdir / f"{name}.json").write_text(json.dumps(value))
  (trial.workdir / "log.txt").write_text("mine")
  (trial.workdir / "DONE").touch()


def share(planned):
  jobs.share(planned, jobs.read_states(planned))


def test_equal_runs_are_trained_once_and_reported_for_each(corpus, tmp_path):
  planned = plan(corpus, tmp_path, trials.points(GRID, None))
  assert len(planned) == 8
  first, *others = (trial for trial in planned if trial.config.mtp.depth == 0)
  expected = {trial.name: first for trial in others}
  assert states.copies(planned) == expected
  choice = jobs.choose(planned, again=False)
  assert choice.copies == expected
  assert [t.name for t in choice.todo] == [
    t.name for t in planned if t is first or t.config.mtp.depth
  ]
  assert choice.states[others[0].name].reason == f"the same run as {first.name}"
  assert not list(tmp_path.iterdir())

  done(first)
  with run_folder.exclusive(others[0].workdir):
    share(planned)
  found = kinds(planned)
  assert [found[trial.name] for trial in (first, *others)] == [
    "done", "waiting", "done", "done"
  ]
  share(planned)
  for trial in others:
    assert states.read_state(trial).eval_loss == 1.5
    run = json.loads((trial.workdir / "run.json").read_text())
    assert run == {"commit": "abc", "same_run_as": first.name}
    assert (trial.workdir / "checkpoints" / "40" / "x").read_text() == "weights"
    assert not (trial.workdir / "log.txt").exists()
  trials.check_folders(planned)  # Each holds its own config.
  # What was trained is resumable under the weights of any of them.
  check_resumable(first.resolved, others[-1].resolved)
  with pytest.raises(ConfigError, match=r"mtp\.weight"):
    check_resumable(planned[-1].resolved, planned[-3].resolved)


def test_a_copy_names_the_tokenizer_in_its_own_folder(corpus, tmp_path):
  outside = {"tokenizer.kind": "file", "tokenizer.path": str(tmp_path / "outside.json")}
  one, two = plan(corpus, tmp_path, [{"name": x} | outside for x in ("one", "two")])
  done(one)
  share([one, two])
  saved = run_folder.read_config(two.workdir)
  assert (saved.name, saved.tokenizer.path) == ("two", "tokenizer.json")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 20_000, b"\xff", None])
def test_a_copy_of_a_run_that_cannot_be_read_is_not_made(
  corpus, tmp_path, capsys, content
):
  one, two = plan(corpus, tmp_path, [{"name": "one"}, {"name": "two"}])
  done(one)
  run = one.workdir / "run.json"
  run.unlink()
  if content is not None:
    run.write_bytes(content if isinstance(content, bytes) else content.encode())
  share([one, two])
  shown = capsys.readouterr().err
  assert f"warning: two gets no results: {run} cannot be read (" in shown
  assert kinds([one, two]) == {"one": "done", "two": "waiting"}
  run.write_text("{}")
  share([one, two])
  assert kinds([one, two]) == {"one": "done", "two": "done"}


def test_of_equal_runs_the_one_that_is_furthest_goes_on(corpus, tmp_path):
  one, two, three, other = plan(corpus, tmp_path, [
    {"name": "one", "mtp.weight": 0.1}, {"name": "two", "mtp.weight": 0.2},
    {"name": "three", "mtp.weight": 0.3}, {"name": "other", "seed": 5},
  ])
  two.workdir.mkdir()
  record = {"kind": "train", "step": 20, "seconds": 1.0, "loss": [2.0]}
  (two.workdir / "metrics.jsonl").write_text(
    json.dumps(record | {"tokens_per_second": 9.0}) + "\n"
  )
  choice = jobs.choose([one, two, three, other], again=False)
  assert choice.todo == [two, other]
  with run_folder.exclusive(three.workdir):
    choice = jobs.choose([one, two, three, other], again=False)
  assert (choice.active, choice.todo) == ([three], [other])
  done(one)
  choice = jobs.choose([one, two, three, other], again=False)
  assert choice.todo == [other] and choice.copies == {"two": one, "three": one}


# Schedules


def trial_of(name, program, flops):
  return types.SimpleNamespace(name=name, program=program, flops=flops)


def test_next_trial_keeps_programs_together_and_begins_with_the_most_work():
  waiting = [
    trial_of("a1", "a", 1), trial_of("a2", "a", 2), trial_of("b", "b", 2.5),
    trial_of("c", "c", 9),
  ]
  fresh = types.SimpleNamespace(program=None)

  def pick(program, *busy):
    worker = types.SimpleNamespace(program=program)
    others = [types.SimpleNamespace(program=other) for other in busy]
    return order.next_trial(waiting, worker, others).name

  assert pick("b") == "b"
  assert pick("a") == "a2"
  assert pick(fresh.program) == "c"
  assert pick(None, "c") == "a2"
  assert pick("gone", "a", "c") == "b"
  assert pick(None, "a", "b", "c") == "c"


def test_time_left_is_at_the_speed_so_far(corpus, tmp_path, monkeypatch):
  planned = plan(corpus, tmp_path, [*SEEDS, {"name": "wide", "trunk.mlp_dim": 64}])
  sweep = sweep_of(planned[:2], tmp_path)
  sweep._workers = [types.SimpleNamespace(trials=[])]
  monkeypatch.setattr(sweep, "_began", time.monotonic() - 30)
  assert sweep._progress() == (0, "0/2 trials, 0% of the FLOPs")
  sweep._states["seed=0"] = states.State("running", step=20)
  # No trial has ended and one waits: what takes long is still unknown.
  assert sweep._progress() == (0.25, "0/2 trials, 25% of the FLOPs")
  sweep._waiting.clear()
  text = "0/2 trials, 25% of the FLOPs, about 90 s left"
  assert sweep._progress() == (0.25, text)
  # Twice the FLOPs of one token take the root of 2 as long.
  small, _, wide = planned
  ratio = sweep._work(wide) / sweep._work(small)
  assert ratio == pytest.approx((wide.cost / small.cost) ** 0.5) and ratio > 1


def simulate(trials, num_workers):
  """Returns the seconds of a sweep, and `(estimate, truth)` once a trial has ended.

  `trials` are (shape, cost, flops, startup, seconds of training, of evaluation), in the
  order in which they are taken; the first of a shape compiles for 20 s more, and its
  evaluation for 10 s.
  """
  clock, begun, plan_ = [0.0] * num_workers, set(), []
  for shape, cost, flops, startup, training, evaluation in trials:
    worker = clock.index(min(clock))
    began, is_first = clock[worker], shape not in begun
    begun.add(shape)
    parts = [startup + 20 * is_first, training, evaluation + 10 * is_first]
    clock[worker] += sum(parts)
    plan_.append((began, flops / math.sqrt(cost), parts))
  end, found = max(clock), []
  for now in range(1, int(end)):
    done, left, has_ended = 0.0, [], False
    for began, work, parts in plan_:
      at = now - began
      has_ended |= at >= sum(parts)
      trained = min(max(at - parts[0], 0.0), parts[1])
      logged = trained - trained % 3 if trained < parts[1] else trained
      done += work * logged / parts[1]
      left.append(work * (1 - logged / parts[1]))
    if has_ended:
      found.append((display.seconds_left(now, done, left, num_workers), end - now))
  return end, found


@pytest.mark.parametrize("num_workers, near", [(1, 15), (2, 15), (3, 28)])
def test_time_left_falls_with_the_time_and_does_not_jump(num_workers, near):
  small = [("small", 100.0, 3e4, 2.0, 30.0, 12.0)] * 6
  large = [("large", 1000.0, 1e6, 3.0, 200.0, 25.0)] * 4
  total, found = simulate(large + small, num_workers)
  assert len(found) > 0.2 * total
  for (before, _), (after, truth) in itertools.pairwise(found):
    assert after <= before + 0.06 * total
    assert abs(after - truth) <= 0.25 * total
  # Near the end it is nearly right, with one worker still at work.
  assert all(abs(left - truth) < near for left, truth in found[-30:])


def test_a_terminal_shows_what_is_at_work_and_prints_only_news(monkeypatch):
  file = io.StringIO()
  console = rich.console.Console(file=file, force_terminal=True, width=80)
  monkeypatch.setattr(display, "Console", lambda **_: console)
  with display.Display("runs/x") as shown:
    shown.say("a: starts", False)
    shown.say("b: FAILED: it broke")
    shown.show(0.25, "1/4 trials", ["c: step 3 of 10"])
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
  assert "a: starts" not in text and "b: FAILED: it broke\n" in text
  assert re.search(r"runs/x .*━+.* 1/4 trials *\n  c: step 3 of 10", text)


def test_elsewhere_every_line_is_printed_and_the_progress_now_and_then(
  monkeypatch, capsys
):
  now = [0.0]
  monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
  with display.Display("runs/x") as shown:
    for now[0] in (10.0, 70.0, 80.0):
      shown.show(0.25, f"at {now[0]:.0f} s", ["c: step 3 of 10"])
    shown.say("a: starts", False)
  assert capsys.readouterr().out == "at 70 s\na: starts\n"


def test_workers_share_the_cores(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 5, 7})
  assert workers.slots(2) == [Slot([0, 2]), Slot([3, 5, 7])]
  assert workers.slots(1) == [Slot([0, 2, 3, 5, 7])]
  for number in (0, 6):
    with pytest.raises(ConfigError, match=rf"from 1 to .* \(5\), got {number}\."):
      workers.slots(number)


@pytest.mark.parametrize("platform, before, at_start", [
  ("linux", None, "glibc.malloc.hugetlb=1"),
  ("linux", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
  ("darwin", None, None),
])
def test_workers_start_with_huge_pages(monkeypatch, platform, before, at_start):
  class Pool:
    def __init__(self, *_, **__):
      pass

    def submit(self, _):
      assert os.environ.get("GLIBC_TUNABLES") == at_start

  children = iter([[], ["worker"]])
  monkeypatch.setattr(multiprocessing, "active_children", lambda: next(children))
  monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
  monkeypatch.setattr(sys, "platform", platform)
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  if before is not None:
    monkeypatch.setenv("GLIBC_TUNABLES", before)
  workers.Worker(Slot(None), "")
  assert os.environ.get("GLIBC_TUNABLES") == before


# Real workers


@pytest.mark.slow
def test_goes_past_a_failure_shares_programs_and_skips_what_is_done(
  corpus, tmp_path, one_device, monkeypatch, capfd
):
  monkeypatch.setenv("JAX_LOG_COMPILES", "1")  # Into each trial's log.txt.
  planned = plan(corpus, tmp_path, [SEEDS[0], DIVERGES, SEEDS[1], STOPS])
  sweep = sweep_of(planned, tmp_path)
  assert sweep.run([Slot(None)]) == 1
  assert kinds(planned) == {
    "seed=0": "done", "diverges": "failed", "seed=1": "done", "stops": "done"
  }
  shown = capfd.readouterr().out
  assert "diverges: FAILED: Diverged: loss or gradient was not finite" in shown
  assert "1 of 4 trial(s) failed:\n  diverges: Diverged: loss" in shown
  error = (tmp_path / "diverges" / "error.txt").read_text()
  assert "Lower optimizer.learning_rate (1e+30)" in error

  compiled = [
    log.read_text().count("Finished XLA compilation of jit(train_step)")
    for log in tmp_path.glob("*/log.txt")
  ]
  assert sorted(compiled) == [0, 0, 0, 1]  # Four trials of one program, one worker.

  # Success ends a trial: what it did not do counts as done.
  # The diverged one was noticed after 10 of its steps.
  assert sweep._progress() == (3.25 / 4, "3/4 trials, 81% of the FLOPs")
  assert "  20/40 " in state_table.table(planned, jobs.read_states(planned))
  with (tmp_path / "results.csv").open() as file:
    rows = {row["trial"]: row for row in csv.DictReader(file)}
  assert rows["stops"]["complete"] == "True" and rows["stops"]["step"] == "20"
  columns = ("stopped_step", "stopped_last_step", "stopped_metric")
  assert [rows["stops"][name] for name in columns] == ["10", "20", "loss"]
  assert [rows["seed=0"][name] for name in columns] == [""] * 3

  done = [planned[0], planned[2], planned[3]]
  assert sweep_of(done, tmp_path).run([Slot(None)]) == 0
  assert capfd.readouterr().out == f"all 3 trial(s) are done in {tmp_path}.\n"


class Meddled(Sweep):
  """A sweep to which things are done while it runs: each until it returns True."""

  def __init__(self, *args, steps, **options):
    super().__init__(*args, **options)
    self.steps = list(steps)

  def _show(self):
    super()._show()
    pids = {t.name: w.process.pid for w in self._workers for t in w.trials}
    if self.steps and self.steps[0](pids):
      self.steps.pop(0)


@pytest.mark.slow
def test_killed_worker_and_stopped_sweep_are_continued(
  corpus, tmp_path, one_device, monkeypatch, capfd
):
  monkeypatch.setattr(local, "_SECONDS_BETWEEN_LOOKS", 0.05)
  steps = {"train.num_steps": 2000, "train.log_every": 100}
  long = steps | {"checkpoint.every_steps": 500}
  planned = plan(corpus, tmp_path, [point | long for point in SEEDS])
  held = set()

  def hold_both_at_work(pids):
    for trial in planned:
      state = states.read_state(trial)
      if trial.name not in held and state.kind == "running" and state.step:
        os.kill(pids[trial.name], signal.SIGSTOP)
        held.add(trial.name)
    return len(held) == 2

  def kill_one(pids):
    os.kill(pids["seed=0"], signal.SIGKILL)
    return True

  def stop_the_sweep(pids):
    if kinds(planned) == {"seed=0": "failed", "seed=1": "running"}:
      os.kill(os.getpid(), signal.SIGTERM)
      os.kill(pids["seed=1"], signal.SIGCONT)
      return True

  cache = str(tmp_path / "cache")
  both = workers.slots(2) if (os.cpu_count() or 1) > 1 else [Slot(None)] * 2
  steps = [hold_both_at_work, kill_one, stop_the_sweep]
  assert sweep_of(planned, tmp_path, cache, Meddled, steps=steps).run(both) == 143
  assert kinds(planned) == {"seed=0": "failed", "seed=1": "stopped"}
  shown = capfd.readouterr().out
  assert "seed=0: FAILED: the worker was ended by SIGKILL (out of memory" in shown
  assert "SIGTERM: the sweep has stopped; the same command continues it." in shown
  assert list((tmp_path / "s1" / "checkpoints").iterdir())

  assert sweep_of(planned, tmp_path, cache).run(both) == 0
  assert kinds(planned) == {"seed=0": "done", "seed=1": "done"}
  assert not (tmp_path / "s0" / "error.txt").exists()
  assert "seed=1: continues near step" in capfd.readouterr().out
  for trial in planned:
    steps = [line["step"] for line in metrics(trial) if line["kind"] == "train"]
    assert steps == list(range(100, trial.num_steps + 1, 100))


@pytest.mark.slow
def test_a_pack_goes_past_a_failure(
  corpus, tmp_path, one_device, monkeypatch, capfd
):
  monkeypatch.setenv("JAX_LOG_COMPILES", "1")  # Into log.txt.
  planned = plan(corpus, tmp_path, [SEEDS[0], DIVERGES, SEEDS[1]])
  assert sweep_of(planned, tmp_path, pack=3).run([Slot(None)]) == 1
  assert kinds(planned) == {"seed=0": "done", "diverges": "failed", "seed=1": "done"}
  shown = capfd.readouterr().out
  assert "seed=1: starts in a pack of 3\n" in shown
  assert "diverges: FAILED: Diverged: loss or gradient was not finite" in shown
  # One program takes the steps of all three.
  logs = [log.read_text() for log in tmp_path.glob("*/log.txt")]
  assert len(logs) == 3
  assert "Finished XLA compilation of jit(train_step)" not in "".join(logs)


@pytest.mark.slow
def test_trials_of_a_pack_that_dies_are_tried_alone(
  corpus, tmp_path, one_device, monkeypatch, capfd
):
  monkeypatch.setattr(local, "_SECONDS_BETWEEN_LOOKS", 0.05)
  planned = plan(corpus, tmp_path, SEEDS)

  def kill(pids):
    if len(pids) == 2 and (tmp_path / "s1" / "log.txt").exists():
      os.kill(pids["seed=1"], signal.SIGKILL)
      return True

  cache = str(tmp_path / "cache")
  sweep = sweep_of(planned, tmp_path, cache, Meddled, pack=2, steps=[kill])
  assert sweep.run([Slot(None)]) == 0
  assert kinds(planned) == {"seed=0": "done", "seed=1": "done"}
  shown = capfd.readouterr().out
  assert "a pack of 2 failed, each is tried alone: the worker was ended by" in shown
  assert "seed=0: starts\n" in shown and "seed=1: starts\n" in shown
  log = (tmp_path / "s1" / "log.txt").read_text()
  assert log.startswith(f"trained in a pack: see {tmp_path / 's0' / 'log.txt'}\n")
