"""Chats: a list of messages as tokens, of which only the assistant's are targets.

The chat template of the tokenizer's folder renders the messages, as in transformers.
The assistant's text is what stands between the template's generation tags. Without such
tags it is what an assistant message adds to the text after the generation prompt, its
end included.
"""

import functools
import itertools
import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_jax import files
from mtp_jax.data.errors import DataError, require

# The chat format beside the tokenizer of a run or a prepared folder.
CHAT = "chat.json"
# Around the assistant's text while a template renders: no text has these characters.
_BEGIN, _END = "\ufdd0", "\ufdd1"


class ChatFormat(NamedTuple):
  """A chat template, and the names of the tokens that it may use."""

  template: str
  bos_token: str = ""
  eos_token: str = ""


def read_format(folder: Path) -> ChatFormat | None:
  """Returns the chat format of a model folder, or of `CHAT` beside our own copy.

  Raises:
    DataError: a file is damaged.
  """
  try:
    if (folder / CHAT).is_file():
      return ChatFormat(**files.read_json(folder / CHAT))
    config = folder / "tokenizer_config.json"
    values = files.read_json(config) if config.is_file() else {}
    file = folder / "chat_template.jinja"
    template = files.read_text(file) if file.is_file() else values.get("chat_template")
  except (OSError, ValueError, TypeError) as error:
    raise DataError(f"the chat template of {folder} cannot be read: {error}") from error
  if not isinstance(template, str):
    return None
  names = (values.get("bos_token"), values.get("eos_token"))
  texts = (x.get("content") if isinstance(x, dict) else x for x in names)
  return ChatFormat(template, *(x or "" for x in texts))


def render(chat: ChatFormat, messages: Any, where: str) -> tuple[str, list[tuple]]:
  """Returns the text of the messages, and [begin, end) of what the assistant wrote.

  Raises:
    DataError: the messages do not fit the template.
  """
  template = _compile(chat.template)
  names = {"bos_token": chat.bos_token, "eos_token": chat.eos_token}
  are_messages = [isinstance(x, dict) and "role" in x for x in messages]
  if not are_messages or not all(are_messages):
    raise DataError(
      f"{where}: every message must have a role, got {files.shortened(messages)}."
    )

  def text_of(count: int, is_prompt: bool = False) -> str:
    try:
      return template.render(
        messages=messages[:count], add_generation_prompt=is_prompt, **names
      )
    except Exception as error:  # A template is a program, which raises what it likes.
      raise DataError(
        f"{where}: must be messages that the chat template accepts ({error}), got "
        f"{files.shortened(messages)}."
      ) from error

  marked = text_of(len(messages))
  if _BEGIN in marked:
    pieces = marked.replace(_END, _BEGIN).split(_BEGIN)
    ends = [0, *itertools.accumulate(map(len, pieces))]
    return "".join(pieces), [*zip(ends[1:-1:2], ends[2::2], strict=False)]
  spans = []
  for i, message in enumerate(messages):
    if message["role"] == "assistant":
      prompt, whole = text_of(i, is_prompt=True), text_of(1 + i)
      if not (whole.startswith(prompt) and marked.startswith(whole)):
        raise DataError(
          f"{where}: the chat template must extend the text with every message, or "
          "have {% generation %} tags, so that the assistant's text can be found."
        )
      spans.append((len(prompt), len(whole)))
  return marked, spans


def encode(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple:
  """Returns `(text, ids)`: the rendered messages and their tokens, [n] int32.

  Tokens that are no targets are ~id, see `packing.TokenStore`.
  """
  if (chat := getattr(tokenizer, "chat", None)) is None:
    raise DataError(
      f"{where}: holds messages, for which tokenizer.path must name a tokenizer.json "
      "beside a chat_template.jinja or a tokenizer_config.json with a chat_template."
    )
  text, spans = render(chat, messages, where)
  ids, offsets_N2 = tokenizer.encode_marked(text)
  is_target = np.zeros(len(ids), bool)
  for begin, end in spans:
    is_target |= (offsets_N2[:, 1] > begin) & (offsets_N2[:, 0] < end)
  return text, np.where(is_target, ids, ~ids)


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> Any:
  """Returns a template in the environment that transformers gives it.

  Raises:
    DataError: it is no template, or jinja2 is not installed.
  """
  jinja2 = require("jinja2", "a chat")
  ext, nodes, sandbox = (
    require(f"jinja2.{name}", "a chat") for name in ("ext", "nodes", "sandbox")
  )

  class Generation(ext.Extension):
    """Marks what stands between the tags."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      call = self.call_method("_mark")
      return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
      return _BEGIN + caller() + _END

  def refuse(message: str) -> None:
    raise ValueError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True,
    extensions=[Generation, "jinja2.ext.loopcontrols"],
  )
  environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
  environment.globals |= {
    "raise_exception": refuse, "strftime_now": datetime.now().strftime
  }
  try:
    return environment.from_string(template)
  except jinja2.TemplateSyntaxError as error:
    raise DataError(
      f"tokenizer.path must have a chat template that Jinja reads ({error}), got "
      f"{files.shortened(template)}."
    ) from error
