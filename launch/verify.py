"""Verification of an exported folder: an engine decodes prompts as this project does.

The engine runs in a process of its own (`launch/engine.py`). Equal must be: the token
ids of the prompts, the tokens that end a text, the greedy continuations, and, with
drafts, how many of them were accepted in how many rounds.
"""

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import with_overrides
from mtp_jax.interop import serving
from mtp_jax.interop.hf_config_writing import longest_text
from mtp_jax.interop.layouts import NUMBERED
from mtp_jax.trained_model import TrainedModel

PROMPTS = ("def f(", "The ", "import os\n", "0 1 2 ")
NEW_TOKENS = 48
_ENGINE = Path(__file__).with_name("engine.py")


class Row(NamedTuple):
  """One prompt. `differs`: what is not equal; empty: nothing. ours, theirs: counts."""

  prompt: str
  differs: str
  ours: str
  theirs: str


class Verification(NamedTuple):
  """What an engine made of a folder; `differs`: what is not equal for any prompt."""

  engine: str
  version: str
  drafts: int
  differs: str
  rows: list[Row]

  @property
  def is_equal(self) -> bool:
    return not self.differs and not any(row.differs for row in self.rows)

  def __str__(self) -> str:
    lines = [
      f"{self.engine} {self.version}, {self.drafts} drafts a round",
      f"{'prompt':14} {'accepted/rounds':>15} {'there':>8}  text",
    ]
    for row in self.rows:
      text = row.differs or "equal"
      lines.append(f"{row.prompt!r:14} {row.ours:>15} {row.theirs:>8}  {text}")
    return "\n".join(lines + ([self.differs] if self.differs else []))


def verify(
  model: TrainedModel,
  folder: Path,
  layout: str,
  engine: str,
  python: str,
  *,
  base_model: str = "",
  dtype: str = "float32",
  trunk_only: bool = False,
) -> Verification:
  """Decodes with the engine and with `model`, of which `folder` is an export.

  Args:
    model: the trained model. folder, layout, base_model, dtype, trunk_only: as they
      were exported.
    engine: one of `serving.ENGINES`. python: an interpreter that has the engine.

  Raises:
    RuntimeError: the engine does not open the folder; with the end of what it printed.
  """
  model = _as_written(model, dtype, trunk_only)
  if engine == "vllm" and serving.VLLM_METHODS.get(layout) == "mtp":
    # vLLM does so whether modules were trained so or not, and its MiMo reads the state
    # before the final norm.
    there = {"mtp.zero_first": True}
    there |= {"mtp.hidden_norm": "before"} if layout == "mimo" else {}
    config = with_overrides(model.config, there)
    model = dataclasses.replace(model, config=config)
  drafts = serving.drafts_of(model.config, layout, engine)
  prompts = [model.encode(text) for text in PROMPTS]
  longest = longest_text(model.config)
  new = min(NEW_TOKENS, longest - max(map(len, prompts)) - drafts - 1)
  is_drafter = layout in serving.DRAFTERS
  answer = _ask(python, {
    "engine": engine,
    "trunk": base_model if is_drafter else str(folder),
    "drafter": str(folder) if is_drafter else "",
    "is_served_alone": layout in serving.SERVED_ALONE,
    "method": serving.VLLM_METHODS.get(layout, ""),
    "drafts": drafts,
    "prompts": PROMPTS,
    "max_new_tokens": new,
    "max_length": longest,
  })
  if answer["first_alone"] and drafts > 1 and layout in NUMBERED:
    model = _first_module(model)
  ours = model.generate(
    prompts, new, num_drafts=drafts, recurse=drafts > model.config.mtp.depth, stop=[]
  )
  differs = ""
  if answer["end_ids"] != sorted(model.tokenizer.end_ids):
    differs = f"the texts end at {answer['end_ids']}, here {model.tokenizer.end_ids}"
  rows = []
  for prompt, generation, theirs in zip(PROMPTS, ours, answer["results"], strict=True):
    counts = ["-", "-"]
    if drafts:
      counts = _counts(generation.tokens, int(generation.completion.rounds))
      their_counts = _counts(theirs["tokens"], theirs["rounds"])
    else:
      their_counts = counts
    rows.append(Row(
      prompt,
      _difference(generation.prompt_tokens, theirs["prompt_tokens"], "the prompt")
      or _difference(generation.tokens, theirs["tokens"], "the text")
      or ("" if counts == their_counts else "other drafts are accepted"),
      "/".join(map(str, counts)),
      "/".join(map(str, their_counts)),
    ))
  return Verification(engine, answer["version"], drafts, differs, rows)


def _as_written(model: TrainedModel, dtype: str, trunk_only: bool) -> TrainedModel:
  """Returns the model that the folder has: in float32, of values that `dtype` has."""
  model = model.without_predictors() if trunk_only else model
  params = model.params
  if dtype != "float32":
    params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
  config = with_overrides(model.config, {"trunk.compute_dtype": "float32"})
  return dataclasses.replace(model, params=params, config=config)


def _first_module(model: TrainedModel) -> TrainedModel:
  """Returns the model without the modules after the first."""
  params, config = model.params, with_overrides(model.config, {"mtp.depth": 1})
  if not config.mtp.share_modules:
    first = jax.tree.map(lambda x: x[:1], params["mtp"]["modules"])
    params = params | {"mtp": params["mtp"] | {"modules": first}}
  return dataclasses.replace(model, params=params, config=config)


def _counts(tokens: Any, rounds: int) -> list[int]:
  """Returns how many of the tokens were drafts, and the rounds.

  The prompt's pass gives one token, every round gives one that was no draft.
  """
  return [len(tokens) - 1 - rounds, rounds]


def _difference(ours: np.ndarray, theirs: list[int], what: str) -> str:
  """Returns where two lists of token ids differ first, or ""."""
  ours = ours.tolist()
  if ours == theirs:
    return ""
  at = next(
    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
    min(len(ours), len(theirs)),
  )
  return f"{what} differs at token {at}: {ours[at:][:3]} here, {theirs[at:][:3]} there"


def _ask(python: str, job: dict[str, Any]) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder:
    question, answer = Path(folder, "job.json"), Path(folder, "answer.json")
    question.write_text(json.dumps(job))
    done = subprocess.run(
      [python, str(_ENGINE), str(question), str(answer)], capture_output=True, text=True
    )
    if done.returncode:
      said = (done.stdout + done.stderr)[-3000:]
      raise RuntimeError(f"{job['engine']} failed:\n{said}")
    return json.loads(answer.read_text())
