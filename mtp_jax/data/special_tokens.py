"""Which ids begin and end a text, as the files of a Hugging Face model folder say.

The rules are those of transformers: the post-processor of `tokenizer.json` or
`tokenizer_config.json` says whether a text gets a begin token; `generation_config.json`
names the tokens that end a generated text, or `config.json` where that does not.
"""

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from mtp_jax import files
from mtp_jax.data.errors import DataError

# Of a folder, what describes its model and its tokenizer beside tokenizer.json.
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
  """Ids that are put around a document, and ids that end a generated text.

  bos_id: None where no text begins with one.
  eos_id: the separator of documents; None where there is none.
  end_ids: of all tokens that end a generated text.
  """

  bos_id: int | None
  eos_id: int | None
  end_ids: tuple[int, ...]


def read_files(folder: Path) -> dict[str, Any] | None:
  """Returns `MODEL_FILES` by name, JSON parsed; None where it is no model folder.

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

  Ids outside the vocabulary of the model are left out: it can neither read nor write
  them.

  Args:
    model_files: of `read_files`.
    model: the tokenizer of the folder.
    where: the folder, for messages.

  Raises:
    DataError: an id is no id; names file, key and value.
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

  ends = ids("config.json", "eos_token_id", default_eos)
  stops = ids("generation_config.json", "eos_token_id") or ends
  eos = [*ends, *stops, *named("eos_token")][:1]
  begins = ids("config.json", "bos_token_id", default_bos)
  front = first_ids(model)
  # Transformers 4 heeds the key, and so did whoever trained the model (DeepSeek-V3);
  # transformers 5 does not, if there is a tokenizer.json.
  if not front and written.get("add_bos_token"):
    front = named("bos_token") or begins
  # Folders that we wrote before tokenizer_config.json was among their files.
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
