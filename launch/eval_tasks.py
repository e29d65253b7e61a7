r"""Evaluates runs on tasks of lm-evaluation-harness, several runs in one table.

  mtp-jax eval runs/ntp,runs/seq1 --tasks=arc_easy,lambada_openai --output=results/arc
  mtp-jax eval runs/seq1 --tasks=mine --include_path=my_tasks --limit=200

Needs pip install "mtp_jax[eval]". Answers are scored by the next-token predictor, and
texts are generated with the extra predictors' drafts: they do not change a greedy text.
Row `tau` of the table is the number of tokens per verification (1 without drafts).

A run is compared with the first one, example by example: `difference` is the mean of
the differences, with a standard error of its own, for metrics that are a mean over
examples.

--output=NAME also writes the table as NAME.csv and NAME.md, and NAME.json with all that
the harness returns but the examples.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from launch import cli, tables
from mtp_jax import run_folder
from mtp_jax.config import MOST_DRAFTS, ConfigError
from mtp_jax.decode.acceptance import summarize

_RUNS = flags.DEFINE_list(
  "runs", None, "run folders, or folders above some, separated by commas"
)
_TASKS = flags.DEFINE_list(
  "tasks", None, "names of tasks or groups, separated by commas"
)
cli.require("runs")
cli.require("tasks")
_INCLUDE_PATH = flags.DEFINE_string(
  "include_path", None, "folder with tasks of your own (YAML)"
)
_FEWSHOT = flags.DEFINE_integer(
  "num_fewshot", None, "examples before a question; by default as the task has it", 0
)
_LIMIT = flags.DEFINE_integer(
  "limit", None, "the first examples of every task alone", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 8, "texts that are computed at once", lower_bound=1,
  allow_override=True,
)
_DRAFTS = flags.DEFINE_integer(
  "drafts", None, "tokens drafted per round; by default one per extra predictor, 0 is "
  "plain decoding",
  lower_bound=0, upper_bound=MOST_DRAFTS, allow_override=True,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", None, "longest generated text, where a task allows longer ones",
  lower_bound=1, allow_override=True,
)
_STEP = cli.define_step()
_OUTPUT = flags.DEFINE_string(
  "output", None, "path without an ending for .csv, .md and .json", allow_override=True
)
_COMPILATION_CACHE = cli.define_compilation_cache()
# Columns of the comparison with the first run.
_CHANGES = ("difference", "its stderr")


def main() -> int:
  runs = _run_folders(_RUNS.value)
  try:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from launch.harness import HarnessModel
  except ImportError as error:
    raise ConfigError(f'eval needs pip install "mtp_jax[eval]": {error}.') from error
  # To read the thousands of tasks of the harness takes long: only if one is asked for.
  known: set[str] = set()
  for has_all in (False, True):
    manager = TaskManager(include_path=_INCLUDE_PATH.value, include_defaults=has_all)
    known |= {task for task in _TASKS.value if manager.match_tasks([task])}
    if len(known) == len(set(_TASKS.value)):
      break
  if unknown := set(_TASKS.value) - known:
    raise ConfigError(f"--tasks must be known to lm_eval, got {min(unknown)!r}.")
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  found: dict[str, Any] = {}
  for name, run in runs.items():
    print(f"{run} ...", file=sys.stderr, flush=True)
    harness = HarnessModel(
      cli.load_model(str(run), _STEP.value), num_drafts=_DRAFTS.value,
      batch_size=_BATCH_SIZE.value, max_new_tokens=_MAX_NEW_TOKENS.value,
    )
    with cli.as_bad_input():
      found[name] = lm_eval.simple_evaluate(
        harness, tasks=_TASKS.value, task_manager=manager, limit=_LIMIT.value,
        num_fewshot=_FEWSHOT.value,
      )
    found[name]["acceptance"] = {
      task: summarize(completions) for task, completions in harness.completions.items()
    }
  rows = table_rows(found)
  kept = {
    name: {key: result[key] for key in ("results", "n-shot", "n-samples", "acceptance")}
    for name, result in found.items()
  }
  record = tables.facts(["launch.eval_tasks"], ("lm_eval", "jax"))
  output = Path(_OUTPUT.value) if _OUTPUT.value else None
  tables.write_page(
    output, "Tasks", record | {"runs": kept}, [tables.markdown(map(_shown, rows))]
  )
  if output is not None:
    pd.DataFrame(rows).to_csv(f"{output}.csv", index=False)
  return 0


def _run_folders(named: list[str]) -> dict[str, Path]:
  """Returns the run folders by a name of their own: as short as tells them apart."""
  found: list[Path] = []
  for name in named:
    folder = Path(name)
    below = run_folder.folders_below(folder)
    if not run_folder.is_run(folder) and not below:
      raise ConfigError(
        f"--runs must be run folders, or folders above some, got {name!r}."
      )
    found += [folder] if run_folder.is_run(folder) else below
  names = [folder.name for folder in found]
  if len(set(names)) < len(names):
    names = list(map(str, found))
  return dict(zip(names, found, strict=True))


def table_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns a row per task, metric and run, of what the harness returned for each run.

  Numbers that do not exist are None: standard errors of a metric that has none, and
  differences from the first run where the metric is no mean over examples.
  """
  first = next(iter(found.values()))
  rows = []
  for name, result in found.items():
    for task, values in result["results"].items():
      for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
          row = {
            "task": task, "metric": metric if filtered == "none" else key, "run": name,
            "value": value, "stderr": values.get(f"{metric}_stderr,{filtered}"),
          }
          changes = (None, None)
          if result is not first:
            changes = _difference(first, result, task, metric, filtered)
          rows.append(row | dict(zip(_CHANGES, changes, strict=True)))
      if acceptance := result["acceptance"].get(task):
        tau = {"metric": "tau", "value": acceptance["tau"]["mean"], "stderr": None}
        rows.append({"task": task, "run": name} | tau | dict.fromkeys(_CHANGES))
  return sorted(rows, key=lambda row: (row["task"], row["metric"]))


def _difference(
  first: dict[str, Any], result: dict[str, Any], task: str, metric: str, filtered: str
) -> tuple[float | None, float | None]:
  """Returns mean and standard error of the differences of examples."""
  scores = []
  for x in (first, result):
    samples = [
      s for s in x["samples"].get(task, ()) if s["filter"] == filtered and metric in s
    ]
    values = [s[metric] for s in sorted(samples, key=lambda s: s["doc_id"])]
    mean = x["results"].get(task, {}).get(f"{metric},{filtered}")
    if (
      len(values) < 2 or not all(isinstance(v, int | float) for v in values)
      or not math.isclose(np.mean(values), mean)
    ):
      return None, None
    scores.append(np.array(values, float))
  differences = scores[1] - scores[0]
  error = differences.std(ddof=1) / math.sqrt(len(differences))
  return float(differences.mean()), float(error)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
  return {k: f"{x:.4f}" if isinstance(x, float) else x for k, x in row.items()}


if __name__ == "__main__":
  cli.run(main, first="runs")
