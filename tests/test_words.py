"""`mtp-jax`: commands, experiments by name, short overrides, help, the list of keys."""

import os
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

import mtp_jax
from launch import config as config_command
from launch import words
from mtp_jax.config import keys
from mtp_jax.predictors import KINDS
from tests.commands import ROOT

pytest_plugins = ("tests.commands",)


@pytest.fixture
def flag_values(monkeypatch):
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  flags.DEFINE_bool("again", False, "", flag_values=values)
  monkeypatch.setattr(flags, "FLAGS", values)
  return values


@pytest.mark.parametrize("short, long", [
  ("smoke mtp.depth=2",
   "--config=experiments/smoke.py --config.mtp.depth=2"),
  ("mtp.depth=2 siblings:cpu --workdir=x",
   "--config.mtp.depth=2 --config=experiments/siblings.py:cpu --workdir=x"),
  ("--config smoke seed=1", "--config experiments/smoke.py --config.seed=1"),
  ("--workdir a=1 smoke", "--workdir a=1 --config=experiments/smoke.py"),
  ("--workdir x --again smoke", "--workdir x --again --config=experiments/smoke.py"),
  ("--noagain smoke", "--noagain --config=experiments/smoke.py"),
  ("--config.mtp.depth 2 smoke",
   "--config.mtp.depth 2 --config=experiments/smoke.py"),
  ("--config.train.eval_test smoke",
   "--config.train.eval_test --config=experiments/smoke.py"),
  ("--config=base smoke", "--config=experiments/base.py smoke"),
  ("smoke base", "--config=experiments/smoke.py base"),
  ("tests/common.py", "--config=tests/common.py"),
])
def test_short_words(monkeypatch, flag_values, short, long):
  monkeypatch.chdir(ROOT)
  assert words.expand(short.split(), "config") == long.split()


def test_a_command_without_a_config_takes_a_folder(flag_values):
  del flag_values.config
  run = "depth=2,seed=0"
  assert words.expand([run, "more"], "workdir") == [f"--workdir={run}", "more"]


@pytest.mark.parametrize("value", ["smoke:cpu", "experiments/smoke.py:cpu"])
def test_a_shipped_experiment_is_found_from_any_folder(monkeypatch, tmp_path, value):
  monkeypatch.chdir(tmp_path)
  found = words.experiment_file(value)
  assert found == f"{ROOT}/experiments/smoke.py:cpu"
  own = tmp_path / "smoke.py"
  own.write_text("")
  assert words.experiment_file("smoke.py") == "smoke.py"


def test_names_are_those_of_experiments():
  names = words.experiments()
  assert {"base", "smoke", "siblings"} <= set(names)
  assert not {"text_setup", "task_setup", "__init__"} & set(names)


def test_every_command_is_listed(command):
  result = command("launch")
  assert command("launch", "--help") == result
  assert result.code == 0
  lines = filter(None, result.output.splitlines()[2:])
  listed = [line.split()[0] for line in lines]
  assert listed[: len(words.COMMANDS)] == list(words.COMMANDS)
  modules = {
    path.stem for path in (ROOT / "launch").glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
  }
  # engine.py is started by verify.py, with the Python of an engine.
  assert modules - {"__main__", "engine"} == set(words.COMMANDS.values())


def test_other_names_are_refused(command):
  result = command("launch", "trian")
  assert result.output == "error: 'trian' is no command; did you mean 'train'?\n"
  assert result.code == 2
  assert command("launch", "--version").output == f"{mtp_jax.__version__}\n"


@pytest.mark.parametrize("name", [x for x in words.COMMANDS if x != "config"])
def test_help_begins_with_what_is_required(command, name):
  result = command("launch", name, "--help")
  assert result.code == 0 and not result.touched_backend
  assert str(ROOT) not in result.output
  lines = [x.strip() for x in result.output.splitlines() if x.startswith("  --")]
  is_required = ["(required)" in part for part in result.output.split("\n  --")[1:]]
  assert is_required == sorted(is_required, reverse=True)
  if name in ("train", "sweep", "prepare", "plan", "import"):
    common, other = (result.output.index(x) for x in ("Common keys", "Other flags"))
    assert common < other
    assert "mtp.depth (int, 0): D extra tokens" in result.output
  assert name == "bench" or result.output.startswith(f"usage: mtp-jax {name} ")
  assert name == "bench" or lines
  # Commands are called what they are called here, as the first line of its text is.
  assert "python -m" not in result.output


def test_the_states_have_a_help_of_their_own(command):
  text = command("launch", "status", "--help").output
  summary = "Lists the state of every trial of a sweep."
  assert text.splitlines()[2] == summary
  assert f"  status        {summary}\n" in command("launch").output
  assert "\n  --watch: " in text.replace("--[no]watch", "--watch")
  assert "--parallel" not in text and "--on:" not in text


def test_help_of_a_sweep_has_the_flags_of_one_engine(command):
  for on, own, others in (
    ([], "--parallel", "--slurm"), (["--on=slurm"], "--slurm", "--kubernetes"),
    (["--on=kubernetes"], "--kubernetes", "--parallel"),
  ):
    text = command("launch", "sweep", *on, "--help").output
    assert f"\n  {own}: " in text and f"\n  {others}: " not in text
    assert "\n  --only: " in text


@pytest.mark.slow
def test_the_list_of_keys_comes_without_jax():
  """Its import takes most of the time that the whole command may take."""
  program = "import sys, launch.config as c; c.main(); sys.exit('jax' in sys.modules)"
  found = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  assert found.returncode == 0 and found.stdout.count("\n") > 200
  assert config_command._kinds() == tuple(KINDS)


def test_the_list_of_keys_has_all_of_each_line(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["config"])
  assert config_command.main() == 0
  text = capsys.readouterr().out
  for name, key in keys().items():
    assert f"\n{name} (" in f"\n{text}"
    entry = " ".join(config_command.describe(name).split())
    assert repr(key.default) in entry and key.meaning in entry
    assert all(x.text in entry for x in key.ranges)
  assert "one of 'mean', 'sum'" in config_command.describe("mtp.weighting")
  assert "trunk.kind is 'llama'" in config_command.describe("trunk.qk_norm")


@pytest.mark.parametrize("words_, code, output", [
  (["mtp.fed"], 0, "mtp.fed (str) = 'true'"),
  (["nothing"], 2, "error: no key has 'nothing' in its name."),
  (["--key"], 2, "error: one pattern at most"),
])
def test_patterns_of_keys(capsys, monkeypatch, words_, code, output):
  monkeypatch.setattr(sys, "argv", ["config", *words_])
  assert config_command.main() == code
  assert "".join(capsys.readouterr()).startswith(output)


def test_the_folder_of_a_run_is_that_of_its_experiment(command, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("from experiments import smoke\n"
                  "def get_config(preset=None): return smoke.get_config()\n")
  for word, folder in (
    (f"{file}:small", "runs/mine_small"), ("smoke", "runs/smoke"),
    (f"{file} --workdir=a", "a"),
  ):
    result = command("launch", "sweep", *word.split(), "--on=print", "--dry_run")
    assert result.code == 0, result.output
    assert f"--workdir={ROOT}/{folder}/" in result.output


@pytest.mark.slow
def test_commands_work_in_any_folder(tmp_path):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  found = subprocess.run(
    [sys.executable, "-m", "launch", "sweep", "smoke", "--dry_run"],
    cwd=tmp_path, env=environment, capture_output=True, text=True,
  )
  assert found.returncode == 0, found.stderr
  assert "trial(s) of" in found.stdout
