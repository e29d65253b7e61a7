"""Ids that begin and end a text, from the files of a Hugging Face model folder.

As in transformers, the post-processor of `tokenizer.json`, or else
`tokenizer_config.json`, decides whether a text gets a begin token.
`generation_config.json`, or else `config.json`, names the tokens that end a generated
text.
"""

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from mtp_jax import files
from mtp_jax.data.errors import DataError

# Files that describe model and tokenizer, besides tokenizer.json and the weights.
MODEL_FILES = (
  "config.json", "generation_config.json", "tokenizer_config.json",
  "special_tokens_map.json", "added_tokens.json", "chat_template.json",
  "chat_template.jinja",
)
BOS, EOS = "<|bos|>", "<|eos|>"  # Begin and end of a document in our own tokenizers.
# (bos_token_id, eos_token_id) of a config.json that lacks the keys, by model_type.
_CLASS_DEFAULTS = {
  "gpt2": (50256, 50256), "llama": (1, 2), "deepseek_v3": (0, 1),
}


class SpecialTokens(NamedTuple):
  """Ids around a document, and ids that end a generated text.

  bos_id:  begins a document; None if documents have no begin token.
  eos_id:  ends a document; None if documents have no end token.
  end_ids: all tokens that end a generated text.
  """

  bos_id: int | None
  eos_id: int | None
  end_ids: tuple[int, ...]


def read_files(folder: Path) -> dict[str, Any] | None:
  """Returns `MODEL_FILES` by name, JSON parsed; None if `folder` is no model folder.

  Raises:
    DataError: a file is damaged.
  """
  found = {}
  for name in MODEL_FILES:
    file = folder / name
    if not file.is_file():
      continue
    try:
      found[name] = (
        files.read_json(file) if name.endswith(".json") else files.read_text(file)
      )
    except (OSError, ValueError) as error:
      raise DataError(f"{file} cannot be read: {error}") from error
  is_model = {"model_type", "architectures"} & found.get("config.json", {}).keys()
  return found if is_model else None


def special_tokens(
  model_files: dict[str, Any], model: tokenizers.Tokenizer, where: Path
) -> SpecialTokens:
  """Returns the special ids of a model folder.

  Ids outside the model's vocabulary are skipped: the model can neither read nor write
  them.

  Args:
    model_files: from `read_files`.
    model: the tokenizer of the folder.
    where: the folder, for messages.

  Raises:
    DataError: a value is no token id; names file, key and value.
  """
  config = model_files["config.json"]
  written = model_files.get("tokenizer_config.json", {})
  family = str(config.get("model_type"))
  default_bos, default_eos = _CLASS_DEFAULTS.get(family, (None, None))
  vocab_size = config.get("vocab_size")

  def ids(name: str, key: str, default: int | None = None) -> list[int]:
    value = model_files.get(name, {}).get(key, default)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for i in listed:
      if type(i) is not int or i < 0:
        raise DataError(
          f"{where / name}: {key} must be null, a token id or a list of them, got "
          f"{files.shortened(value)}."
        )
    return [i for i in listed if type(vocab_size) is not int or i < vocab_size]

  def named(key: str) -> list[int]:
    token = written.get(key)
    content = token.get("content") if isinstance(token, dict) else token
    i = model.token_to_id(content) if isinstance(content, str) else None
    return [] if i is None else [i]

  # Ends of a generated text may be several ids; a document ends with the first of them.
  ends = ids("config.json", "eos_token_id", default_eos)
  stops = ids("generation_config.json", "eos_token_id") or ends
  eos = [*ends, *stops, *named("eos_token")][:1]
  begins = ids("config.json", "bos_token_id", default_bos)
  front = first_ids(model)
  # `add_bos_token` counts as in transformers 4, with which such models were trained
  # (DeepSeek-V3); transformers 5 ignores the key beside a tokenizer.json.
  if not front and written.get("add_bos_token"):
    front = named("bos_token") or begins
  # Older exports of this package have no tokenizer_config.json.
  if not front and not written and begins == [model.token_to_id(BOS)]:
    front = begins
  return SpecialTokens(
    front[0] if front else None, eos[0] if eos else None, tuple(stops or eos)
  )


def first_ids(model: tokenizers.Tokenizer) -> list[int]:
  """Returns the ids that the post-processor puts before a text."""
  if model.post_processor is None:
    return []
  text = model.encode("a", add_special_tokens=True)
  marks = text.special_tokens_mask
  return text.ids[: marks.index(0) if 0 in marks else 0]
