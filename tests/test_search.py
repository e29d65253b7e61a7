"""Searches: spaces in words, values from run folders, several processes, kills."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from experiments import base
from launch import search, states
from mtp_jax.config import ConfigError, from_config_dict
from tests.commands import ROOT

pytest_plugins = ("tests.commands",)

SPACE = ("optimizer.learning_rate=1e-4:1e-1:log", "train.num_steps=1:9")


class Suggestions:
  """An Optuna trial that notes what it is asked for."""

  def __init__(self):
    self.asked = {}

  def suggest_float(self, key, low, high, log):
    self.asked[key] = float, low, high, log
    return low

  def suggest_int(self, key, low, high, log):
    self.asked[key] = int, low, high, log
    return low

  def suggest_categorical(self, key, values):
    self.asked[key] = values
    return values[-1]


def test_a_space_in_words():
  trial = Suggestions()
  overrides = search.parse_space([
    *SPACE, "mtp.weight=0:1", "mtp.kind=parallel,sequential", "mtp.depth=1,2,4",
    "train.freeze_trunk=true,False",
  ])(trial)
  assert trial.asked == {
    "optimizer.learning_rate": (float, 1e-4, 1e-1, True),
    "train.num_steps": (int, 1, 9, False),
    "mtp.weight": (float, 0.0, 1.0, False),
    "mtp.kind": ["parallel", "sequential"],
    "mtp.depth": [1, 2, 4],
    "train.freeze_trunk": [True, False],
  }
  assert overrides["mtp.kind"] == "sequential" and overrides["train.num_steps"] == 1


@pytest.mark.parametrize("word", [
  "mtp.depth", "mtp.depth=", "mtp.depth=4:1", "mtp.depth=1:2:lin", "mtp.depth=0.5:2",
  "mtp.weight=0:1:log", "mtp.weight=a,b", "mtp.kind=a:b", "train.freeze_trunk=1,2",
  "mtp.depth=1:2:3:4", "mtp=1,2", "mtp.depth_weights=1,2", "mtp.weight=nan:1",
])
def test_what_is_no_space_is_refused(word):
  with pytest.raises(ConfigError, match=r"^--space must be KEY=LOW:HIGH, .*, got '"):
    search.parse_space([word])


def test_keys_of_a_space_are_keys_and_there_once():
  with pytest.raises(ConfigError, match=r"did you mean 'mtp\.depth'"):
    search.parse_space(["mtp.dept=1:2"])
  with pytest.raises(ConfigError, match="each key once"):
    search.parse_space(["mtp.depth=1:2", "mtp.depth=3,4"])


def test_the_flags_of_a_search(command, tmp_path):
  start = ("launch.sweep", "smoke", f"--workdir={tmp_path / 'runs'}", "--search=optuna")
  for more, message in (
    ([], "--space is required with --search: "),
    (["--space=mtp.depth=2:1"], "--space must be KEY=LOW:HIGH, "),
    (["--only=x"], "--only is for the trials of a sweep, not for --search."),
    (["--trials=0", "--space=seed=1:2"], "flag --trials=0: "),
  ):
    result = command(*start, *more)
    assert result.output.startswith(f"error: {message}"), result.output
    assert result.code == 2 and not result.touched_backend
  assert not (tmp_path / "runs").exists()


# With Optuna, and a stand-in for training: the objective is a quadratic.


def searched(root, *, space=SPACE, overrides=None, **how):
  pytest.importorskip("optuna")
  config = from_config_dict(base.get_config())
  return search.Search(root, config, overrides or {}, search.parse_space(space), **how)


def finish(trial, **more):
  """Does what training does, to the files that a search reads."""
  steps, rate = trial.num_steps, trial.config.optimizer.learning_rate
  loss = (steps - 4) ** 2 + (rate - 0.01) ** 2
  trial.workdir.mkdir(exist_ok=True)
  result = {"step": steps, "main_loss": {"mean": loss, "stderr": 0.1}} | more
  (trial.workdir / "eval.json").write_text(json.dumps(result))
  (trial.workdir / "run.json").write_text("{}")
  (trial.workdir / "DONE").touch()
  return loss


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_and_finds_the_best(tmp_path):
  losses = []
  for _ in range(13):  # To the journal, each is a new process.
    mine, ended = searched(tmp_path).next(number=24, at_once=2)
    assert len(ended) == len(losses)
    losses += [finish(trial) for trial in mine]
  assert not mine and len(losses) == 24
  found = searched(tmp_path)
  planned = found.planned()
  assert len({trial.workdir for trial in planned}) == 24
  assert planned[3].name.startswith("trial=3,learning_rate=")
  assert planned[3].workdir.name.startswith("t3-lr")
  assert min(losses) < 1 and f"best main_loss {min(losses):.6g}: " in found.summary()
  assert len({trial.config.optimizer.learning_rate for trial in planned}) == 24


def test_trials_that_fail_are_told_and_not_tried_again(tmp_path, monkeypatch):
  (first,), _ = searched(tmp_path).next(number=3, at_once=1)
  monkeypatch.setattr(
    search.jobs, "read_states",
    lambda planned: {x.name: states.State("failed", exit_class="diverged")
                     for x in planned},
  )
  (second,), ended = searched(tmp_path).next(number=3, at_once=1)
  assert second.name != first.name and ended == []
  assert "0 trial(s) done, 1 failed" in searched(tmp_path).summary()


def test_a_trial_whose_config_cannot_work_is_none(tmp_path, capsys):
  found = searched(tmp_path, space=["mtp.depth=1,2"])  # Not for plain next-token.
  assert found.next(number=3, at_once=2) == ([], [])
  shown = capsys.readouterr().out.splitlines()
  assert len(shown) == 3 and shown[0].startswith("not trained: trial=0,depth=")
  assert all("mtp.depth must be 0 for mtp.kind 'none'" in line for line in shown)
  assert found.planned() == [] and not list(tmp_path.glob("t*"))


def test_the_objective_is_a_column_and_stays(tmp_path):
  (trial,), _ = searched(tmp_path, objective="task_new").next(number=2, at_once=1)
  finish(trial)
  known = "main_loss, main_loss_stderr, step"
  with pytest.raises(ConfigError, match=f"must be one of {known}, got 'task_new'"):
    searched(tmp_path, objective="task_new").next(number=2, at_once=1)
  with pytest.raises(ConfigError, match=r"must be task_new \(minimize\), which the s"):
    searched(tmp_path, objective="main_loss")._study()
  finish(trial, task_new={"mean": None, "stderr": None})
  searched(tmp_path, objective="task_new").next(number=1, at_once=1)
  assert "0 trial(s) done, 1 failed" in searched(
    tmp_path, objective="task_new"
  ).summary()


def test_any_engine_trains_what_is_asked_for(command, tmp_path):
  """Each start hands over what is open, and tells what has ended since."""
  pytest.importorskip("optuna")
  root = tmp_path / "runs"
  start = ("launch.sweep", "--config=experiments/base.py", f"--workdir={root}",
           "--search=optuna", "--trials=3", "--at_once=2", f"--space={SPACE[0]}")
  for num_open, num_done in ((2, 0), (2, 0), (1, 2)):
    result = command(*start, "--on=print")
    assert result.code == 0, result.output
    assert result.output.count(" -m launch.train --workdir=") == num_open
    found = searched(root, space=SPACE[:1])
    planned = [x for x in found.planned() if not (x.workdir / "DONE").exists()]
    assert len(planned) == num_open and len(found.planned()) == num_done + num_open
    listed = command(*start, "--status").output.splitlines()
    assert listed[-1].startswith(f"{num_done + num_open} trial(s): ")
    assert command("launch.list_states", *start[1:3]).output.splitlines() == listed
    if num_done or (root / "asked").exists():
      for trial in planned:
        finish(trial)
    (root / "asked").touch()
  result = command(*start, "--on=print")
  assert result.code == 0 and "3 trial(s) done, 0 failed" in result.output
  assert "\nbest main_loss 2460" in result.output


def test_a_search_on_this_machine_trains(command, tmp_path):
  pytest.importorskip("optuna")
  texts, root = tmp_path / "texts", tmp_path / "runs"
  texts.mkdir()
  for i in range(20):
    (texts / f"{i}.txt").write_text(f"document {i} says {i * i}\n" * 10)
  file = tmp_path / "it.py"
  file.write_text(textwrap.dedent(f"""
    from experiments import base

    def get_config():
      config = base.get_config()
      config.trunk.update(num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1,
                          num_kv_heads=1)
      config.data.update(source="files", path={str(texts)!r}, seq_len=16, batch_size=2,
                         validation_fraction=0.4)
      config.eval.update(num_rows=4, batch_size=4, line_prompts=0, function_prompts=0)
      config.train.num_steps = 4
      return config

    def search(trial):
      rate = trial.suggest_float("rate", 1e-3, 1e-2, log=True)
      return {{"optimizer.learning_rate": rate, "seed": 1}}
  """))
  start = ("launch.sweep", f"--config={file}", f"--workdir={root}", "--search=optuna")
  result = command(*start, "--trials=2")
  assert result.code == 0, result.output
  assert "2 trial(s) done, 0 failed" in result.output
  folders = sorted(path.parent for path in root.glob("*/DONE"))
  assert [x.name.split("-lr")[0] for x in folders] == ["t0", "t1"]
  again = command(*start, "--trials=2")
  assert again.code == 0 and again.output.splitlines() == [
    line for line in result.output.splitlines() if line.startswith(("2 trial", "best"))
  ]


WORKER = textwrap.dedent("""
  import os, pathlib, sys, time
  from mtp_jax import run_folder
  from tests.test_search import finish, searched

  root, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
  found = searched(root)
  while mine := found.next(number=10, at_once=2)[0]:
    for trial in mine:
      with run_folder.exclusive(trial.workdir):
        assert not run_folder.is_done(trial.workdir), "a trial twice"
        with (trial.workdir / "begun").open("a") as file:
          file.write(f"{os.getpid()} ")
        time.sleep(seconds)
        finish(trial)
""")


@pytest.mark.slow
def test_of_two_processes_one_is_killed(tmp_path):
  """No trial is trained twice, and the other process takes over what was begun."""
  pytest.importorskip("optuna")

  def start(seconds):
    return subprocess.Popen(
      [sys.executable, "-c", WORKER, str(tmp_path), str(seconds)], cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True,
    )

  one, two = start(2.0), start(0.2)
  deadline = time.monotonic() + 200
  begun = lambda: [x.read_text().split() for x in tmp_path.glob("*/begun")]  # noqa: E731
  while [str(one.pid)] not in begun() and time.monotonic() < deadline:
    time.sleep(0.05)
  one.send_signal(signal.SIGKILL)
  one.wait()
  assert two.wait(timeout=200) == 0, two.stderr.read()
  last = start(0.0)  # Takes over what was left, if two ended before it was.
  assert last.wait(timeout=200) == 0, last.stderr.read()
  folders = sorted(path.parent for path in tmp_path.glob("*/DONE"))
  assert len(folders) == 10
  # The trial that was cut short was begun again, all others once.
  (again,) = [pids for pids in begun() if len(pids) > 1]
  assert again[0] == str(one.pid) and len(again) == 2 and len(begun()) == 10
  assert "10 trial(s) done, 0 failed" in searched(tmp_path).summary()
