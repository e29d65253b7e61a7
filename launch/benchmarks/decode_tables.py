"""The tables of `launch.benchmark decode`."""

from typing import Any

import numpy as np

from launch.benchmarks.decode_peers import NAMES
from launch.benchmarks.records import heading, spread, table


def markdown(record: dict[str, Any]) -> str:
  """Returns the tables of a record, with what is needed to read them."""
  rows, settings = record["rows"], record["settings"]
  parts = [
    *heading(
      "Decoding with drafts",
      record, record["device"], f"; seed {settings['seed']}",
    ),
    "Greedy. Ratios: median over "
    f"{settings['rounds']} interleaved rounds [least, greatest]. Acceptance: mean "
    "[95 % bootstrap interval over prompts]. All figures are defined in the JSON file "
    "beside this one.",
  ]
  if "acceptance" in record:
    parts += ["", "## Acceptance", "", *_acceptance_table(record["acceptance"])]
  parts += [
    "",
    "## Costs and speed-up",
    "",
    "Floor: the bytes that a 1-row step must read, at the rate measured in every "
    "round. In units of a 1-row step (T_1): v, the verification of K + 1 rows (N + 1 "
    "of a tree); sum c, all K drafts; overhead of the loop. Predicted speed-up: batch "
    "tau / (v + sum c); measured: against plain decoding of the same prompts in the "
    "same run.",
    "",
    *table(
      (
        "model", "B", "drafter", "floor ms", "T_1 ms", "floor / T_1", "v", "sum c",
        "overhead", "plain overhead", "tau", "batch tau", "predicted", "measured",
        "measured / predicted", "identical",
      ),
      [
        (
          r["model"], r["batch_size"], r["drafter"],
          f"{1e3 * np.median(r['seconds']['floor']):.3f}",
          f"{1e3 * np.median(r['seconds']['step']):.3f}",
          spread(r["floor_over_step"]), spread(r["v"]), spread(r["sum_c"]),
          spread(r.get("overhead", [])), spread(r["plain_overhead"]),
          f"{r['tau']:.2f}", f"{r['batch_tau']:.2f}",
          spread(r["predicted"]), spread(r["measured"]),
          spread(r["measured_over_predicted"]),
          f"{r['identical']}/{r['num_prompts']}",
        )
        for r in rows
      ],
    ),
  ]
  against_torch = {
    (r["model"], r["batch_size"]): r for r in rows if r["plain_over_torch"]
  }
  if against_torch:
    parts += [
      "",
      "## Plain decoding against PyTorch",
      "",
      "Greedy, KV cache, no drafts, prefill excluded; ms per round; below 1 ours is "
      "the faster.",
      "",
      *table(
        ("model", "B", "plain", *NAMES, *(f"plain / {n}" for n in NAMES)),
        [
          (
            *key, _milliseconds(r, "plain"), *(_milliseconds(r, n) for n in NAMES),
            *(spread(r["plain_over_torch"].get(n, [])) for n in NAMES),
          )
          for key, r in against_torch.items()
        ],
      ),
    ]
  return "\n".join(parts) + "\n"


def _acceptance_table(entries: list[dict[str, Any]]) -> list[str]:
  lines = []
  for entry in entries:
    figures = entry["decoding"]
    agreement = entry["teacher_forced_agreement"] or []
    lines += [
      f"{entry['model']}, {entry['drafter']}: {figures['num_prompts']} prompts "
      f"of the {entry['split']} split, {figures['tokens']} tokens in "
      f"{figures['rounds']} rounds; tau {_interval(figures['tau'])}, accepted / "
      f"drafted {_interval(figures['accepted_per_drafted'])}; rounds by drafts "
      f"emitted: {figures['histogram']}. Teacher-forced agreement is that of the run's "
      f"eval.json ({entry['teacher_forced_split']} split) [mean +- 2 standard errors].",
      "",
      *table(
        ("draft", "S_k", "alpha_k", "teacher-forced agreement"),
        [
          (
            k + 1, _interval(figures["survival"][k]),
            _interval(figures["conditional"][k]),
            _two_errors(agreement[k]) if k < len(agreement) else "-",
          )
          for k in range(figures["num_drafts"])
        ],
      ),
      "",
    ]
  return lines[:-1]


def _interval(figure: dict[str, float | None]) -> str:
  if figure["mean"] is None:
    return "-"
  return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**figure)


def _two_errors(figure: dict[str, float | None]) -> str:
  mean, error = figure["mean"], figure["stderr"]
  if mean is None or error is None:
    return "-"
  return f"{mean:.3f} [{mean - 2 * error:.3f}, {mean + 2 * error:.3f}]"


def _milliseconds(row: dict[str, Any], name: str) -> str:
  if name not in row["seconds"]:
    return "-"
  return f"{1e3 * np.median(row['seconds'][name]) / row['plain_rounds']:.2f}"
