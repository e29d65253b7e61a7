"""Reading run folders: the contract of their files, and clear words where it breaks."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest

from mtp_jax import evaluate, generative_metrics
from mtp_jax.analysis.published import published_gains
from mtp_jax.analysis.runs import RunsError, load
from mtp_jax.files import write_json
from tests.synthetic_runs import World, trial_config, write_trial

WORLD = World(gain={}, seed_noise=0.0, trial_noise=0.0)


@pytest.fixture
def run(tmp_path):
  return write_trial(tmp_path, WORLD, trial_config(16, "sequential", 2), name="a/b")


def test_reads_what_the_files_say(tmp_path, run):
  runs = load(tmp_path)
  trial = runs.trials.iloc[0]
  evaluation = json.loads((run / "eval.json").read_text())
  assert (trial["trial"], trial["status"], trial["step"]) == ("a/b", "finished", 100)
  assert trial["train_seconds"] == evaluation["train_seconds"]
  means = runs.metrics.set_index(["metric", "at_depth"])["mean"]
  assert means["main_loss", 0] == evaluation["main_loss"]["mean"]
  assert means["depth_loss", 2] == evaluation["depth_loss"][2]["mean"]
  # Drafts start at depth 1: the next token has nothing to agree with.
  agreement = evaluation["teacher_forced_agreement"]
  assert means["teacher_forced_agreement", 1] == agreement[0]["mean"]
  assert means["teacher_forced_agreement", 2] == agreement[1]["mean"]
  steps = runs.curves.groupby("split")["step"].apply(list)
  assert steps.to_dict() == {"train": [50, 100], "validation": [25, 50, 100]}


def test_a_trial_has_its_whole_name_in_a_folder_with_a_short_one(tmp_path):
  """So has a folder of an older sweep; other folders are called what they are."""
  whole = "width=16,seed=1"
  for folder in ("new/w16-s1", f"old/{whole}", "mine/elsewhere"):
    config = dataclasses.replace(trial_config(16, seed=1), name=whole)
    write_trial(tmp_path, WORLD, config, name=folder)
  assert sorted(load(tmp_path).trials["trial"]) == [
    "mine/elsewhere", f"new/{whole}", f"old/{whole}"
  ]
  assert load(tmp_path / "new/w16-s1").trials["trial"].item() == whole


def test_reads_what_evaluation_writes(tmp_path, run):
  """The real producer: any change of its names must break this test."""
  rng = np.random.default_rng(0)
  sums = {
    name: rng.uniform(1, 2, shape)
    for name, shape in {
      "nll": (4, 3), "correct": (4, 3), "count": (4, 3), "agree": (4, 2),
      "prefix": (4, 2), "reachable": (4,), "bytes": (4,),
    }.items()
  }
  summary = evaluate.summarize(sums)
  rest = {
    "step": 1, "tokens": 2, "train_flops": 3.0, "train_seconds": 4.0,
    "task_accuracy": None, "next_line_exact_match": None, "function_parses": None,
    **generative_metrics.acceptance_rates("decoded", []),
    **generative_metrics.acceptance_rates("sampled", []),
  }
  write_json(run / "eval.json", rest | summary)
  metrics = load(tmp_path).metrics.set_index(["metric", "at_depth"])
  assert metrics.loc[("main_loss", 0), "mean"] == summary["main_loss"]["mean"]
  assert metrics.loc[("main_loss", 0), "stderr"] == summary["main_loss"]["stderr"]
  joint = summary["joint_prefix_agreement"][1]["mean"]
  assert metrics.loc[("joint_prefix_agreement", 2), "mean"] == joint


def test_null_is_not_a_number(tmp_path, run):
  evaluation = json.loads((run / "eval.json").read_text())
  evaluation["main_loss"] = {"mean": None, "stderr": None}
  (run / "eval.json").write_text(json.dumps(evaluation))
  metrics = load(tmp_path).metrics
  assert math.isnan(metrics.loc[metrics["metric"] == "main_loss", "mean"].item())


def test_works_without_run_json_and_metrics(tmp_path, run):
  (run / "metrics.jsonl").unlink()
  trial = load(tmp_path).trials.iloc[0]
  assert (trial["status"], trial["hardware"]) == ("finished", "")


def test_what_lies_inside_a_run_folder_is_its_own(tmp_path, run):
  (run / "checkpoints").mkdir()
  (run / "checkpoints" / "config.json").write_text("not a run")
  assert load(tmp_path).trials["trial"].item() == "a/b"


def test_states(tmp_path):
  half = write_trial(tmp_path, WORLD, trial_config(16), name="half", finished=False)
  new = write_trial(tmp_path, WORLD, trial_config(16), name="new", finished=False)
  (new / "metrics.jsonl").unlink()
  trials = load(tmp_path).trials.set_index("trial")
  assert trials.loc["half", "status"] == "unfinished"
  assert trials.loc["half", "step"] == 50
  assert trials.loc["new", "status"] == "not started"
  assert load(half).trials["trial"].item() == "half"  # A run folder itself works too.


def test_half_a_last_line_is_passed_over(tmp_path, run):
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "st')
  assert load(tmp_path).trials["step"].item() == 100


def test_records_of_the_test_split_and_success_change_nothing(tmp_path, run):
  before = load(tmp_path)
  record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
  with (run / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(record | {"kind": "test", "bits_per_byte": 0.0}) + "\n")
  evaluation = json.loads((run / "eval.json").read_text())
  evaluation["stopped"] = {
    "step": 1, "tokens": 1, "metric": "loss", "value": 1.0, "last_step": 2
  }
  (run / "eval.json").write_text(json.dumps(evaluation))
  after = load(tmp_path)
  stopped = after.trials[["stopped_step", "stopped_tokens"]]
  assert stopped.iloc[0].tolist() == [1, 1]
  before.trials[stopped.columns] = stopped
  is_of_test = after.curves["split"] == "test"
  assert is_of_test.sum() == 1
  after = dataclasses.replace(after, curves=after.curves[~is_of_test])
  for name in ("trials", "metrics", "curves"):
    pd.testing.assert_frame_equal(getattr(after, name), getattr(before, name))
  assert after.trials["status"].item() == "finished"


def break_config_json(run):
  (run / "config.json").write_text('{"name": "x",\n"seed": }')


def break_config_key(run):
  config = json.loads((run / "config.json").read_text())
  config["mtp"]["dept"] = config["mtp"].pop("depth")
  (run / "config.json").write_text(json.dumps(config))


def break_metrics(run):
  lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  lines[1] = "{broken\n"
  (run / "metrics.jsonl").write_text("".join(lines))


def break_eval_json(run):
  (run / "eval.json").write_text("")


def break_eval_key(run):
  evaluation = json.loads((run / "eval.json").read_text())
  del evaluation["bits_per_byte"]
  (run / "eval.json").write_text(json.dumps(evaluation))


def break_validation_record(run):
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "validation", "step": 7}\n')


@pytest.mark.parametrize(
  "damage, words",
  [
    (break_config_json, "config.json, line 2: not JSON"),
    (break_config_key, "config.json: mtp.dept: unknown key"),
    (break_metrics, "metrics.jsonl, line 2: not a record"),
    (break_eval_json, "eval.json, line 1: not JSON"),
    (break_eval_key, "eval.json: key 'bits_per_byte' is missing"),
    (break_validation_record, "metrics.jsonl: key 'tokens' is missing"),
  ],
)
def test_damaged_files_are_named(tmp_path, run, damage, words):
  damage(run)
  with pytest.raises(RunsError, match=words) as error:
    load(tmp_path)
  assert str(run) in str(error.value)


@pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl", "run.json"])
@pytest.mark.parametrize(
  "content",
  [None, b"\xff\n", b"[1]\n", b"[" * 10**5 + b"\n", b"3\n",
   b'{"kind": "validation", "step": "x", "versions": 4}\n'],
)
def test_garbage_is_named(tmp_path, run, name, content):
  (run / name).unlink(missing_ok=True)
  if content is None:
    (run / name).mkdir()
  else:
    (run / name).write_bytes(content)
  with pytest.raises(RunsError) as error:
    load(tmp_path)
  assert str(run) in str(error.value)


def test_no_runs(tmp_path):
  with pytest.raises(RunsError, match="no run folder"):
    load(tmp_path)
  with pytest.raises(RunsError, match="no such folder"):
    load(tmp_path / "nowhere")


def test_published_points_give_the_published_headline():
  """The abstract: 12 % more HumanEval and 17 % more MBPP problems at 13B, n = 4."""
  rows = published_gains().set_index(["benchmark", "size", "n"])
  for benchmark, percent in (("HumanEval@1", 12), ("MBPP@1", 17)):
    row = rows.loc[(benchmark, 13e9, 4)]
    assert round(100 * (row["pass_rate"] / row["pass_rate_ntp"] - 1)) == percent
  assert len(rows) == 6 * 6 * 2
  small = rows.loc[("MBPP@100", 0.3e9, 4)]
  assert small["gain"] == pytest.approx(20.1 - 29.9)
