"""Logits of a drafter's folder by the modules of vLLM's project speculators (0.9.0).

  python tests/speculators_logits.py FOLDER GIVEN ANSWER

Runs with a Python that has nothing of this project. GIVEN (npz): tokens [T + D + 1]
of one document, streams [T, 3 D'] of its trunk. ANSWER (npy): logits_KTV of every row.
Exit status 77: that Python has no speculators.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("speculators") is None:
  sys.exit(77)

import numpy as np
import torch
from safetensors import safe_open
from speculators import SpeculatorModelConfig
from speculators.models.dflash import core as dflash
from speculators.models.peagle import core as peagle


class _Found(Exception):
  """The logits."""


def peagle_logits(model, streams_1SX, tokens_1S, depth, length):
  """Every row drafts at every depth, in the place of speculators' sample of rows."""
  later = torch.arange(length).repeat(depth - 1)
  rows = torch.cat([torch.arange(tokens_1S.shape[1] - 1), later])
  depths = torch.cat([
    torch.zeros(tokens_1S.shape[1] - 1, dtype=torch.long),
    torch.arange(1, depth).repeat_interleave(length),
  ])
  peagle.generate_cod_sample_indices = lambda **_: (rows, depths)

  def stop(module, inputs, output):
    raise _Found(output[0])  # The loss after it needs a GPU.

  model.lm_head.register_forward_hook(stop)
  ids = tokens_1S[:, 1:]  # Beside a feature is the token after it.
  try:
    model(
      streams_1SX[:, : ids.shape[1]], ids, torch.zeros_like(ids), num_depths=depth,
      verifier_last_hidden_states=torch.zeros(*ids.shape, model.hidden_size),
    )
  except _Found as found:
    (logits,) = found.args
  return torch.cat([logits[:length], logits[ids.shape[1] :]]).reshape(depth, length, -1)


def dflash_logits(model, streams_1SX, tokens_1S, depth, length):
  is_anchor = torch.zeros(tokens_1S.shape)
  is_anchor[:, 1 : 1 + length] = 1
  _, logits, *_ = model._backbone_forward(
    streams_1SX, tokens_1S, is_anchor, torch.zeros(*tokens_1S.shape, model.hidden_size),
    torch.zeros_like(tokens_1S), max_anchors=length,
  )
  return logits.reshape(length, 1 + depth, -1)[:, 1:].swapaxes(0, 1)


def main():
  folder, given, answer = sys.argv[1:]
  data = np.load(given)
  length, depth = len(data["streams"]), len(data["tokens"]) - len(data["streams"]) - 1
  config = SpeculatorModelConfig.from_pretrained(folder)
  config.transformer_layer_config._attn_implementation = "eager"
  if config.speculators_model_type == "dflash":
    # With the trunk's name the embedding, and so the mask, is replaced by the trunk's.
    config.speculators_config.verifier.name_or_path = None
  logits_of, cls = {
    "peagle": (peagle_logits, peagle.PEagleDraftModel),
    "dflash": (dflash_logits, dflash.DFlashDraftModel),
  }[config.speculators_model_type]
  model = cls.from_pretrained(folder, config=config)
  with safe_open(Path(folder, "model.safetensors"), "pt") as file:
    written = set(file.keys())
  wanted = {x for x in model.state_dict() if not x.startswith("verifier_")}
  assert written == wanted, written ^ wanted
  # Blocks of the last rows run over the end.
  streams_SX = np.pad(data["streams"], [(0, 2 * depth + 1), (0, 0)])
  tokens_S = np.pad(data["tokens"], (0, depth))
  with torch.no_grad():
    logits_KTV = logits_of(
      model.float(), torch.tensor(streams_SX, dtype=torch.float32)[None],
      torch.tensor(tokens_S, dtype=torch.long)[None], depth, length,
    )
  np.save(answer, logits_KTV.numpy())


main()
