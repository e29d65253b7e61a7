"""Traces of steps: which steps are in the trace, and which ranges are refused."""

import re
import warnings

import jax
import pytest

from experiments import base
from launch import train as train_command
from mtp_jax.config import ConfigError, from_config_dict, with_overrides
from mtp_jax.trace import Trace
from mtp_jax.train import fit
from tests.tiny_runs import run_config, write_texts


def traced_steps(folder):
  """Returns the numbers of the steps in the one trace below a folder."""
  (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
    if event.name == "train_step"
  ]
  return [dict(event.stats)["step_num"] for event in events]


def take_steps(trace, done, last):
  step = trace.of(jax.jit(lambda x: x + 1), done)
  x = jax.numpy.zeros(2)
  for _ in range(done, last):
    x = step(x)
  assert x.tolist() == [last - done] * 2


def test_a_trace_has_the_steps_that_are_asked_for(tmp_path):
  with Trace(tmp_path, (4, 6)) as trace:
    take_steps(trace, 2, 10)
  assert traced_steps(tmp_path) == [4, 5, 6]


def test_a_run_that_ends_early_leaves_a_whole_trace(tmp_path):
  with pytest.raises(KeyError), Trace(tmp_path, (2, 9)) as trace:
    take_steps(trace, 0, 3)
    raise KeyError
  assert traced_steps(tmp_path) == [2, 3]


def test_steps_that_were_taken_before_are_not_traced(tmp_path):
  reason = "no trace of steps 2 to 3 is written: the run continues after step 2."
  with pytest.warns(UserWarning, match=f"^{reason}$"), Trace(tmp_path, (2, 3)) as trace:
    take_steps(trace, 2, 5)
  with warnings.catch_warnings(action="error"), Trace(tmp_path, None) as trace:
    take_steps(trace, 0, 5)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_traces_into_its_folder_and_goes_on_without(tmp_path):
  texts = write_texts(tmp_path / "texts")
  off = ("eval.line_prompts", "eval.function_prompts", "train.diagnostics_every")
  config = run_config(texts, dict.fromkeys((*off, "mtp.depth"), 0) | {
    "mtp.kind": "none", "train.num_steps": 6
  })
  fit(config, tmp_path / "run", progress=False, profile=(3, 4))
  assert traced_steps(tmp_path / "run" / "profile") == [3, 4]
  with pytest.warns(UserWarning, match="steps 3 to 4 is written: the run is done"):
    fit(config, tmp_path / "run", progress=False, profile=(3, 4))


@pytest.mark.parametrize("text", [
  "", "5", "a:b", "0:3", "3:2", "1:8", "-1:2", "1:2:3", "1.0:2", "1:9999999999", "1: 2",
])
def test_what_is_no_range_of_steps_is_refused(monkeypatch, text):
  config = with_overrides(from_config_dict(base.get_config()), {"train.num_steps": 7})
  monkeypatch.setattr(train_command, "_PROFILE", type("", (), {"value": text}))
  rule = re.escape("two steps from 1 to train.num_steps (7) in their order, got")
  message = rf"^--profile must be FIRST:LAST, {rule} '{text}'\.$"
  with pytest.raises(ConfigError, match=message):
    train_command._profile(config)
  train_command._PROFILE.value = "1:7"
  assert train_command._profile(config) == (1, 7)
