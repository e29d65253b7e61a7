"""README.md of an exported folder: what it is, how it was made, how it is served."""

import shlex
from typing import Any

from mtp_jax.config import Config, flatten, keys, to_dict
from mtp_jax.interop.layouts import DRAFTERS
from mtp_jax.interop.serving import engine_obstacle, vllm_line

# Facts of the run, in whose files they are, and not of its model.
_LEFT_OUT = ("data.path", "data.train_on", "tokenizer.path")
# Lists of eval.json with one entry per depth, from depth 1.
_MEASURES = {
  "decoded_survival": "verifications that keep this draft",
  "teacher_forced_agreement": "agrees with the next-token prediction on true text",
}


def model_card(
  config: Config,
  layout: str,
  step: int,
  run: dict[str, Any],
  evaluation: dict[str, Any],
  base_model: str = "",
) -> str:
  """Returns a model card in Markdown.

  Args:
    config, layout: of what is exported. step: of the checkpoint.
    run, evaluation: run.json and eval.json of the run folder; {}: there is none.
    base_model: folder or name of the trunk of drafters.
  """
  mtp = config.mtp
  front = ["library_name: transformers", "tags: [mtp-jax, multi-token-prediction]"]
  if base_model:
    front.append(f"base_model: {base_model}")
  what = f"{mtp.kind} predictors of {mtp.depth} further tokens" if mtp.depth else (
    "the trunk alone, for next-token prediction"
  )
  parts = [
    "---", *front, "---", "",
    f"# {config.name}", "",
    f"Layout `{layout}`: {what}. Exported by mtp_jax from step {step:,}.", "",
  ]
  if mtp.depth:
    parts += _acceptance(evaluation)
  commit = run.get("commit")
  parts += ["## Training", "", "```", _command(config), "```", ""]
  if commit:
    parts += [f"Commit {commit}.", ""]
  if start := run.get("trunk_from") or run.get("start_from"):
    parts += [f"It began with the weights of another run: {start}.", ""]
  parts += ["## Serving", ""]
  if reason := engine_obstacle(config, layout, "vllm"):
    return "\n".join([*parts, f"Not with vLLM: {reason}.", ""])
  folder = "DRAFTER" if layout in DRAFTERS else "FOLDER"
  return "\n".join(
    [*parts, "```", vllm_line(config, layout, folder, base_model), "```", ""]
  )


def _command(config: Config) -> str:
  """Returns the command that trains this config, all of whose values it has."""
  values, facts = flatten(to_dict(config)), keys()
  changed = [
    shlex.quote(f"{key}={value}") for key, value in values.items()
    if key not in _LEFT_OUT and value != facts[key].default
  ]
  return " \\\n  ".join(["mtp-jax train base", *changed])


def _acceptance(evaluation: dict[str, Any]) -> list[str]:
  """Returns the lines about how many drafts are kept, if that was measured."""
  columns = [
    (name, [measure["mean"] for measure in evaluation[key]])
    for key, name in _MEASURES.items()
    if evaluation.get(key)
  ]
  if not columns:
    return ["Its acceptance was not measured.", ""]
  rows = zip(*(means for _, means in columns), strict=True)
  return [
    "| depth | " + " | ".join(name for name, _ in columns) + " |",
    "|---|" + "---|" * len(columns),
    *(
      f"| {k} | " + " | ".join(f"{mean:.1%}" for mean in means) + " |"
      for k, means in enumerate(rows, start=1)
    ),
    "",
    f"Measured on the split `{evaluation['split']}` at step {evaluation['step']:,}, "
    "drafts decoded greedily.",
    "",
  ]
