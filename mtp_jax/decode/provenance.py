"""Generated text, and which predictor each token of it is from.

Legend: n new tokens, K drafts.
"""

import dataclasses
import functools
import html
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.decode import stops
from mtp_jax.decode.acceptance import summarize
from mtp_jax.decode.generate import Completion
from mtp_jax.decode.loop import CORRECTION, OWN

# Lightness carries the depth, so that colour vision does not matter; black text on any
# of them has a contrast of more than 6 : 1. Corrections are underlined as well.
_DEPTH_COLOURS = ("#deebf7", "#b5d4ec", "#8fbfe0", "#66a9d3", "#4a95c7")
_CORRECTION_COLOUR = "#fdd0a2"
_ANSI_DEPTH_COLOURS = (195, 153, 117, 75, 39)
_ANSI_CORRECTION_COLOUR = 223
# A model of bytes may write anything: escape sequences for the terminal, and marks that
# turn the direction of writing around.
_CONTROLS = (
  *range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
)
_VISIBLE = {i: "\ufffd" for i in _CONTROLS if chr(i) not in "\t\n"}


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
  """The completion of one prompt. A notebook shows it coloured by `source`.

  prompt_tokens: what was continued.
  completion:    tokens, sources and counts; see `generate.Completion`.
  tokenizer:     turns them into text.
  stop_strings:  the text ends before the first of them.
  """

  prompt_tokens: np.ndarray
  completion: Completion
  tokenizer: Tokenizer
  stop_strings: tuple[str, ...] = ()

  @property
  def tokens(self) -> np.ndarray:
    """The new tokens [n]; the one that ended it, if one did, is the last."""
    return self.completion.tokens

  @property
  def source(self) -> np.ndarray:
    """Where each new token is from [n].

    k >= 1: drafted by depth k and accepted; 0: the next-token prediction, after all
    drafts were accepted (or none made); -1: the same in place of a rejected draft.
    """
    return self.completion.source

  @functools.cached_property
  def acceptance(self) -> dict[str, Any]:
    """How much of what was drafted was kept: `acceptance.summarize` of this alone."""
    return summarize([self.completion])

  @functools.cached_property
  def pieces(self) -> list[str]:
    """The text of each new token; see `token_texts`, and `stops.cut`."""
    pieces = self._all_pieces[len(self.prompt_tokens) :]
    return stops.cut(pieces, self.stop_strings, self.completion.is_finished)

  @property
  def text(self) -> str:
    """What the prompt was continued with; special tokens have no text."""
    return "".join(self.pieces)

  @property
  def prompt(self) -> str:
    return "".join(self._all_pieces[: len(self.prompt_tokens)])

  def to_ansi(self, legend: bool = True) -> str:
    """Returns the text for a terminal of 256 colours, coloured by source."""
    parts = [f"\x1b[2m{visible(self.prompt)}\x1b[0m"]
    for source, text in self._runs():
      parts.append(_ansi(source, text))
    if legend:
      marks = (
        f"{_ansi(source, ' a ')} {name}: {count}"
        for source, name, count in self._legend()
      )
      parts.append("\n\n" + "   ".join(marks))
    return "".join(parts)

  def to_marked(self) -> str:
    """Returns the text without colours: a line of marks, by source, below each line."""
    text = marks = ""
    for source, piece in [(None, self.prompt), *self._runs()]:
      piece = visible(piece).replace("\t", "    ")
      text += piece
      marks += re.sub(r"[^\n]", _mark(source), piece)
    shown = []
    for line, mark in zip(text.split("\n"), marks.split("\n"), strict=True):
      shown += [line, mark.rstrip()] if mark.strip() else [line]
    legend = (f"{_mark(source)} {name}: {n}" for source, name, n in self._legend())
    return "\n".join([*shown, "", "   ".join(legend)])

  def __repr__(self) -> str:
    return f"<Generation {self.text!r}: {self._summary()}>"

  def _repr_html_(self) -> str:
    """Returns the text as HTML that needs nothing else."""
    prompt = html.escape(visible(self.prompt))
    spans = "".join(_span(source, text) for source, text in self._runs())
    legend = " &nbsp; ".join(
      f"{_span(source, ' a ')} {html.escape(name)}: {count}"
      for source, name, count in self._legend()
    )
    return (
      '<div style="background:#fff;color:#000;padding:.5em;font-family:monospace">'
      '<pre style="white-space:pre-wrap;color:inherit;background:inherit;margin:0">'
      f'<span style="color:#595959">{prompt}</span>{spans}</pre>'
      f'<div style="border-top:1px solid #ccc;margin-top:.5em;padding-top:.5em">'
      f"{legend}<br>{html.escape(self._summary())}</div></div>"
    )

  @functools.cached_property
  def _all_pieces(self) -> list[str]:
    return token_texts(
      self.tokenizer, np.concatenate([self.prompt_tokens, self.tokens])
    )

  def _runs(self) -> Iterator[tuple[int, str]]:
    """Yields neighbouring tokens of one source as (source, text)."""
    pairs = zip(self.source.tolist(), self.pieces, strict=True)
    for source, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
      yield source, "".join(piece for _, piece in run)

  def _legend(self) -> Iterator[tuple[int, str, int]]:
    """Yields (source, name, tokens): the model's own first, then the drafts."""
    depths = range(1, 1 + len(self.completion.reached))
    for source in (OWN, CORRECTION, *depths) if len(depths) else (OWN,):
      yield source, _name(source), int(np.sum(self.source == source))

  def _summary(self) -> str:
    words = f"{len(self.tokens)} tokens in {self.completion.rounds} rounds"
    tau = self.acceptance["tau"]["mean"]
    if tau is not None:
      words += f" after the first, {tau:.2f} per round"
    return words + (", ended by a stop" if self.completion.is_stopped else "")


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
  """Returns the text of each token; joined, they are `tokenizer.decode(ids)`.

  A character that takes several tokens belongs to the last of them, and so do bytes
  before it that are no character; the other tokens have no text. (Where a model writes
  such bytes through the byte fallback of a SentencePiece tokenizer, they may differ
  from the decoded text in how many U+FFFD they become.)
  """
  ids, texts = np.asarray(ids), []
  # Text may depend on the token before (SentencePiece drops a first space, and decodes
  # neighbouring bytes together): decode from the character before, take what is new.
  before, start, known = 0, 0, ""
  for end in range(1, 1 + len(ids)):
    text = tokenizer.decode(ids[before:end])
    if text.endswith("\ufffd") and end < len(ids):
      texts.append("")
      continue
    texts.append(text[len(known) :])
    if texts[-1]:
      before, start = start, end
      known = tokenizer.decode(ids[before:end])
  return texts


def _name(source: int) -> str:
  names = {OWN: "next-token prediction", CORRECTION: "correction of a draft"}
  return names.get(source, f"draft of depth {source}")


def _mark(source: int | None) -> str:
  """Returns the one character that stands for a source, a blank for the prompt."""
  return {None: " ", OWN: ".", CORRECTION: "x"}.get(source, f"{source}"[-1])


def _span(source: int, text: str) -> str:
  style = {OWN: "", CORRECTION: f"background:{_CORRECTION_COLOUR};"}.get(source)
  if style is None:
    style = f"background:{_shade(_DEPTH_COLOURS, source)};"
  if source == CORRECTION:
    style += "text-decoration:underline dotted;"
  return (
    f'<span title="{_name(source)}" style="white-space:pre-wrap;{style}">'
    f"{html.escape(visible(text))}</span>"
  )


def _ansi(source: int, text: str) -> str:
  text = visible(text)
  if source == OWN:
    return text
  if source == CORRECTION:
    start = f"\x1b[4;38;5;16;48;5;{_ANSI_CORRECTION_COLOUR}m"
  else:
    start = f"\x1b[38;5;16;48;5;{_shade(_ANSI_DEPTH_COLOURS, source)}m"
  # A line break in colour would colour the rest of the line in some terminals.
  lines = (f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))
  return "\n".join(lines)


def _shade(colours: tuple, depth: int):
  return colours[min(depth, len(colours)) - 1]


def visible(text: str) -> str:
  """Returns the text with what a terminal might obey replaced by U+FFFD."""
  return text.translate(_VISIBLE)
