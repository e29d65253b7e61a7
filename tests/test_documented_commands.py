"""Every command of the documentation, up to where its work begins.

A server forks for each command, as in `tests.commands`, with what begins work replaced:
flags are parsed, configs and files are checked, sweeps are planned, scripts and
manifests are made.
"""

import functools
import json
import re
import shlex
import string
import textwrap
import tomllib

import pytest
import yaml

from experiments import base
from launch import words
from launch.cli import BAD_INPUT
from mtp_jax.config import from_config_dict, to_dict
from mtp_jax.data.tokenizers import ByteTokenizer, save_tokenizer
from tests import commands
from tests.commands import ROOT, Commands
from tests.test_readme import DOCUMENTS

_FORMS = r"\.\.\.|COMMAND|MODULE|\["  # These are no commands.
SKYPILOT = yaml.safe_load((ROOT / "launch/engines/skypilot.yaml").read_text())
# A block of code: its language, and its text.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STOP = "here the work would begin"
_STOPS = textwrap.dedent(f"""
  import os, sys
  import mtp_jax, launch.cli, launch.engines.local, mtp_jax.train, mtp_jax.saved_model
  import mtp_jax.interop, mtp_jax.data.prepare, launch.hub
  import mtp_jax.analysis.findings, mtp_jax.analysis.report, mtp_jax.analysis.runs
  import launch.planning.steps, launch.benchmarks.harness

  def stop(*_, **__):
    print({STOP!r})
    sys.stdout.flush()
    os._exit(0)

  mtp_jax.load = mtp_jax.train.fit = mtp_jax.train.evaluate_run = stop
  mtp_jax.interop.read_model = mtp_jax.data.prepare.prepare_folder = stop
  launch.engines.local.Sweep.run = launch.planning.steps.fitting_step = stop
  launch.benchmarks.harness.measure_all = stop
  launch.hub.local_folder = lambda *_: None  # Nothing is downloaded.
  mtp_jax.saved_model.check_source = lambda *_: None  # Of runs that are not there.
  mtp_jax.analysis.report.write_report = mtp_jax.analysis.runs.load = stop
  mtp_jax.analysis.findings.write_findings = stop
""")


def documented():
  """Returns the commands in blocks of code, and those between backticks, as words."""
  run = string.Template(SKYPILOT["run"]).substitute(SKYPILOT["envs"])
  found = {run: module_and_words(shlex.split(run))}
  for document in DOCUMENTS:
    text = (ROOT / document).read_text()
    lines = [line for _, code in BLOCK.findall(text) for line in joined(code)]
    # A name alone names a command.
    lines += re.findall(r"`((?:python -m|mtp-jax) [^`\s]+ [^`]+)`", text)
    for line in map(" ".join, map(str.split, lines)):
      is_command = line.startswith(("python -m launch.", "mtp-jax "))
      if is_command and not re.search(_FORMS, line):
        found[line] = module_and_words(shlex.split(line, comments=True))
  return found


def joined(code):
  """Returns the lines of a block, those that end in a backslash joined."""
  return [" ".join(x.split()) for x in re.sub(r"\\\n", " ", code).splitlines()]


def module_and_words(command):
  """Returns what `python -m` runs, and its words."""
  if command[0] == "mtp-jax":
    return f"launch.{words.COMMANDS[command[1]]}", *command[2:]
  return command[2:]


COMMANDS = documented()
PLACES = {
  "FILE.py": "experiments/base.py", "EXPERIMENT": "depth_sweep", "RUNS": "runs/depth",
  "NAME": "gpt2", "NAMES": "arc_easy", "N": "5", "FILE.jsonl": "file.jsonl",
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """Runs commands in a folder that has what the documentation speaks of."""
  folder = tmp_path_factory.mktemp("documented")
  for name in ("experiments", "launch", "mtp_jax"):
    (folder / name).symlink_to(ROOT / name)
  config = json.dumps(to_dict(from_config_dict(base.get_config())))
  for run in ("RUN", "runs/seq2", "runs/ntp", "runs/gpt2_mtp", "runs/medusa",
              "runs/mine", "runs/qwen", "runs/self_speculation", "runs/smoke",
              "runs/seq1", "runs/tuned"):
    (folder / run).mkdir(parents=True)
    (folder / run / "config.json").write_text(config)
  (folder / "RUN" / "tree.json").write_text('{"paths": [[0], [1], [0, 0]]}')
  (folder / "start.py").write_text("def f():")
  (folder / "my_tasks").mkdir()
  (folder / "my_tasks" / "capitals.yaml").write_text("task: capitals\n")
  (folder / "text").mkdir()
  (folder / "input.txt").write_text("text\n" * 50)
  for kind in ("txt", "jsonl", "parquet", "bin"):
    (folder / "text" / f"a.{kind}").write_text("text\n" * 50)
  save_tokenizer(ByteTokenizer(), folder / "text" / "tokenizer.json")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(commands, "_SERVER", _STOPS + commands._SERVER)
    patch.setattr(commands, "ROOT", folder)
    patch.setenv("PYTHONPATH", str(ROOT))
    with Commands() as server:
      yield functools.partial(server, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_documented_command_begins_its_work(stopped, line):
  module, *arguments = COMMANDS[line]
  places = "|".join(rf"(?<![\w.]){re.escape(place)}(?![\w.])" for place in PLACES)
  arguments = [re.sub(places, lambda x: PLACES[x[0]], word) for word in arguments]
  if module == "launch.sweep" and any(x.startswith("--on=") for x in arguments):
    arguments += [] if "--dry_run" in arguments else ["--dry_run"]
  result = stopped(module, *arguments)
  if re.search("needs the package|eval needs pip install", result.output):
    pytest.skip(f"not installed, and looked for before the work: {result.output}")
  listing = module in ("launch.config", "launch.list_states")
  assert result.code in ({0, 1} if listing else {0}), result.output  # With --watch.
  ends = {"--help", "--dry_run", "--status"} & set(arguments) or listing
  if not ends:
    assert result.output.endswith(f"{STOP}\n"), result.output


@pytest.mark.slow
def test_the_kubernetes_example_fits_its_slice(stopped):
  (line,) = (x for x in COMMANDS if "--on=kubernetes" in x)
  module, *arguments = COMMANDS[line]
  result = stopped(module, *arguments)
  assert result.code == 0 and "15 trial(s) written as manifests" in result.output
  assert "given to" not in result.output
  wide = [argument.replace("hosts=4", "hosts=16") for argument in arguments]
  assert stopped(module, *wide).code == BAD_INPUT


def test_the_skypilot_task_is_whole():
  """Its fields are SkyPilot's, run folders outlive the machine, the extra is ours."""
  assert SKYPILOT.keys() == {
    "name", "resources", "envs", "workdir", "file_mounts", "setup", "run"
  }
  (mount, bucket), = SKYPILOT["file_mounts"].items()
  assert f'--workdir="{mount}/' in SKYPILOT["run"]
  assert bucket == {"name": "${BUCKET}", "mode": "MOUNT_CACHED"}
  (extra,) = re.findall(r"\.\[(\w+)\]", SKYPILOT["setup"])
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert extra in project["optional-dependencies"]
  page = (ROOT / "docs/how-to/clusters.md").read_text()
  names = set(re.findall(r"--env (\w+)=", page))
  assert names <= SKYPILOT["envs"].keys()


def test_there_are_commands_of_every_kind():
  modules = {command[0] for command in COMMANDS.values()}
  every = {f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py")}
  is_main = 'if __name__ == "__main__"'
  # launch.engine is run by `export --verify`, in the interpreter of another engine.
  inner = {"launch.__main__", "launch.engine"}
  commands_ = {x for x in every if is_main in _source(x)} - inner
  assert commands_ - modules == set() and len(COMMANDS) > 40


def _source(module):
  return (ROOT / f"{module.replace('.', '/')}.py").read_text()
