"""lm-evaluation-harness: a model and its exported folder get the same answers."""

import csv
import json

import numpy as np
import pytest

from mtp_jax import interop
from tests import common
from tests.serving import model_of
from tests.untrained_runs import save_run

pytest_plugins = ("tests.commands",)
lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval")
LENGTH = 128  # Of the planted models; some texts below are longer.
DOCUMENTS = [
  {"question": "def f(", "options": ["x):", " y", ")"], "answer": 0},
  {"question": "", "options": ["The", "import os"], "answer": 1},
  {"question": "1 2 3 ", "options": ["4", "5 6"], "answer": 0},
  {"question": "long " * 40, "options": ["er", "é"], "answer": 1},
]
TASKS = {
  "local_choice": {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{options}}",
    "doc_to_target": "answer", "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
  },
  "local_rolling": {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "", "doc_to_target": "{{question}} of {{options | join(' ')}}" * 3,
    "metric_list": [{"metric": "bits_per_byte"}],
  },
  "local_text": {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}{{options[0]}}", "doc_to_target": "{{options[1]}}",
    "generation_kwargs": {"until": ["\n", "}"], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match"}],
  },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  """Returns a folder with tasks of one small file; nothing is downloaded."""
  folder = tmp_path_factory.mktemp("tasks")
  data = folder / "documents.jsonl"
  data.write_text("".join(json.dumps(x) + "\n" for x in DOCUMENTS))
  for name, task in TASKS.items():
    source = {
      "task": name, "dataset_path": "json", "test_split": "test",
      "dataset_kwargs": {"data_files": {"test": str(data)}},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(source | task))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    yield folder


@pytest.fixture(scope="module")
def model():
  return model_of("glm4_moe, D = 2")


def answers(lm, folder):
  """Returns what a model answers to every request, by task, and the scores."""
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(folder), include_defaults=False)
  found = lm_eval.simple_evaluate(
    lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0
  )
  samples = found["samples"]
  return {
    task: [x for s in samples[task] for r in s["resps"] for x in r] for task in TASKS
  }, found["results"]


def harness_model(model, **how):
  from launch.harness import HarnessModel

  return HarnessModel(model, batch_size=3, **how)


@pytest.mark.slow
def test_answers_equal_those_of_the_harness_on_the_exported_folder(
  model, tasks, tmp_path
):
  huggingface = pytest.importorskip("lm_eval.models.huggingface")
  interop.export_params(
    model.params, model.config, tmp_path / "out", "glm4_moe", tokenizer=model.tokenizer
  )
  theirs, scores = answers(
    huggingface.HFLM(str(tmp_path / "out"), dtype="float32", device="cpu"), tasks
  )
  ours = harness_model(model)
  found, our_scores = answers(ours, tasks)
  numbers = lambda x: np.array(x, float)  # noqa: E731
  for task in ("local_choice", "local_rolling"):
    np.testing.assert_allclose(
      numbers(found[task]), numbers(theirs[task]), rtol=1e-5, atol=1e-5
    )
  assert found["local_text"] == theirs["local_text"]
  assert len(set(found["local_text"])) > 1
  for task, values in scores.items():
    for key, value in values.items():
      if isinstance(value, float):
        assert our_scores[task][key] == pytest.approx(value, rel=1e-5), (task, key)
  # Drafts were made and some were kept; without drafts the texts are the same.
  (completions,) = ours.completions.values()
  assert len(completions) == len(DOCUMENTS)
  assert sum(int(x.accepted.sum()) for x in completions) > 5
  plain = harness_model(model, num_drafts=0)
  assert answers(plain, tasks)[0]["local_text"] == found["local_text"]
  assert {len(x.accepted) for x in plain.completions["local_text"]} == {0}


@pytest.mark.slow
def test_the_command_compares_runs_in_one_table(command, model, tasks, tmp_path):
  ntp = model.without_predictors()
  other = common.random_params(model.config, seed=1)
  save_run(tmp_path / "runs" / "ntp", ntp.config, ntp.params)
  save_run(tmp_path / "runs" / "mtp", model.config, model.params)
  save_run(tmp_path / "other", model.config, other)
  output = tmp_path / "out" / "table"
  result = command(
    "launch.eval_tasks", f"{tmp_path}/runs,{tmp_path}/other", "--batch_size=3",
    "--tasks=local_choice,local_text", f"--include_path={tasks}", f"--output={output}",
  )
  assert result.code == 0, result.output
  with open(f"{output}.csv") as file:
    rows = {(x["task"], x["metric"], x["run"]): x for x in csv.DictReader(file)}
  assert {key[2] for key in rows} == {"mtp", "ntp", "other"}
  page = output.with_suffix(".md").read_text()
  for row in rows.values():
    assert f"| {float(row['value']):.4f} " in page, row
  # The same trunk: no difference, but with drafts more tokens per verification.
  same = rows["local_choice", "acc", "ntp"]
  assert (float(same["difference"]), float(same["its stderr"])) == (0, 0)
  assert float(rows["local_text", "tau", "mtp"]["value"]) > 1.1
  assert float(rows["local_text", "tau", "ntp"]["value"]) == 1
  assert not rows["local_choice", "acc", "mtp"]["difference"]
  row = rows["local_choice", "acc", "other"]
  change = float(row["value"]) - float(same["value"])
  assert float(row["difference"]) == pytest.approx(change)
  record = json.loads(output.with_suffix(".json").read_text())
  assert record["versions"]["lm_eval"]
  assert record["runs"]["mtp"]["acceptance"]["local_text"]["num_drafts"] == 2


def test_differences_are_of_examples_and_have_their_own_standard_error():
  from launch.eval_tasks import table_rows

  def found(right, perplexity, tau):
    samples = [
      {"doc_id": i, "filter": "none", "acc": x, "ppl": (1.0, 2)}
      for i, x in enumerate(right)
    ]
    return {
      "results": {"t": {
        "alias": "t", "acc,none": sum(right) / 4, "acc_stderr,none": 0.25,
        "ppl,none": perplexity, "ppl_stderr,none": "N/A",
      }},
      "samples": {"t": samples[::-1]},
      "acceptance": {"t": {"tau": {"mean": tau}}},
    }

  rows = table_rows({
    "a": found([0, 1, 1, 0], 3.0, 1.0), "b": found([1, 1, 1, 0], 2.5, 2.0),
  })
  keys = [(row["metric"], row["run"]) for row in rows]
  assert keys == [(m, r) for m in ("acc", "ppl", "tau") for r in "ab"]
  assert [row["value"] for row in rows] == [0.5, 0.75, 3.0, 2.5, 1.0, 2.0]
  changes = [(row["difference"], row["its stderr"]) for row in rows]
  # Of one example in four: sqrt(variance / n) = sqrt((3 / 16 * 4 / 3) / 4).
  assert changes[1] == (0.25, pytest.approx(0.25))
  assert [x for i, x in enumerate(changes) if i != 1] == [(None, None)] * 5


@pytest.mark.parametrize("words, message", [
  ((), "--runs is required"),
  pytest.param(
    ("{runs}", "--tasks=no_such_task"), "--tasks must be known to lm_eval, got 'no_s",
    marks=pytest.mark.slow,  # All its tasks are read.
  ),
  (("{runs}/none", "--tasks=arc_easy"), "--runs must be run folders"),
])
def test_bad_input_is_refused(command, tmp_path, words, message):
  save_run(tmp_path / "runs" / "a", common.tiny_config())
  words = [word.format(runs=tmp_path / "runs") for word in words]
  result = command("launch.eval_tasks", *words)
  assert result.code == 2 and message in result.output, result.output
