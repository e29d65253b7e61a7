"""Text is shown as it was generated: whole, coloured by source, and never obeyed."""

import functools
import html
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.config import TokenizerConfig
from mtp_jax.data.tokenizers import ByteTokenizer, SubwordTokenizer, make_tokenizer
from mtp_jax.decode.generate import Completion
from mtp_jax.decode.loop import CORRECTION, OWN
from mtp_jax.decode.provenance import Generation, token_texts
from tests.test_tokenizers import sentencepiece_like

BYTES = ByteTokenizer()


def generation(text, sources, prompt="def ", num_drafts=2, tokenizer=BYTES):
  tokens = tokenizer.encode(text)
  counts = np.arange(num_drafts, 0, -1)
  completion = Completion(
    tokens, np.asarray(sources), False, 3, counts, counts, np.ones(1 + num_drafts, int)
  )
  return Generation(tokenizer.encode(prompt), completion, tokenizer)


@functools.cache
def bpe():
  texts = ["def f(x):\n  return x  # naïve café 漢字 🙂\n"] * 20
  return make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300, path=""), texts)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 257), max_size=12))
def test_joined_texts_of_any_bytes_are_the_decoded_text(ids):
  texts = token_texts(BYTES, ids)
  assert len(texts) == len(ids)
  assert "".join(texts) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_texts_of_any_subwords_are_the_decoded_text(data):
  ids = data.draw(st.lists(st.integers(0, bpe().vocab_size - 1), max_size=12))
  texts = token_texts(bpe(), ids)
  assert len(texts) == len(ids)
  assert "".join(texts) == bpe().decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab é漢🙂", max_size=12))
def test_joined_texts_with_a_space_in_front_and_byte_fallback(text):
  tokenizer = SubwordTokenizer(sentencepiece_like(), "sentencepiece")
  ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
  assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids) == text


def test_a_character_belongs_to_the_token_that_completes_it():
  ids = [BYTES.bos_id, *BYTES.encode("aé🙂b"), BYTES.eos_id]
  assert token_texts(BYTES, ids) == ["", "a", "", "é", "", "", "", "🙂", "b", ""]


def test_a_character_begun_by_the_prompt_is_new_text():
  tokens = BYTES.encode("é!")
  completion = Completion(
    tokens[1:], np.array([OWN, 1]), True, 1, np.ones(1), np.ones(1), np.array([0, 1])
  )
  shown = Generation(tokens[:1], completion, BYTES)
  assert shown.prompt == "" and shown.text == "é!"
  assert shown.pieces == ["é", "!"]


def test_html_shows_every_token_in_the_colour_of_its_source():
  text = "ab<c&d"
  shown = generation(text, [OWN, 1, 2, CORRECTION, 1, CORRECTION])._repr_html_()
  body, legend = re.fullmatch(r"(.*)</pre>(.*)", shown, re.DOTALL).groups()
  spans = re.findall(r'<span title="([^"]*)" style="([^"]*)">([^<]*)</span>', body)
  assert [html.unescape(content) for *_, content in spans] == list(text)
  titles = [title for title, *_ in spans]
  assert titles == [
    "next-token prediction", "draft of depth 1", "draft of depth 2",
    "correction of a draft", "draft of depth 1", "correction of a draft",
  ]
  looks = dict(zip(titles, (style for _, style, _ in spans), strict=True))
  assert len(set(looks.values())) == 4
  assert "underline" in looks["correction of a draft"]  # Not by colour alone.
  for title, count in (("draft of depth 1", 2), ("correction of a draft", 2)):
    assert f"{title}: {count}" in legend
  assert "6 tokens in 3 rounds after the first, 1.67 per round" in legend


def luminance(colour):
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in channels]
  return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_black_text_is_readable_on_every_colour():
  depths = range(1, 9)
  shown = generation("a" * 10, [OWN, CORRECTION, *depths], num_drafts=8)._repr_html_()
  backgrounds = set(re.findall(r"background:(#\w{6})", shown))
  assert len(backgrounds) == 6  # Five shades of depth, and the correction.
  for colour in backgrounds:
    assert (luminance(colour) + 0.05) / 0.05 > 6, colour


def without_escapes(text):
  return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_the_terminal_shows_the_text_and_nothing_happens():
  text = "a\n\n\tb\x1b[2J\x07c\x9b"
  sources = np.resize([1, CORRECTION, OWN, 2], len(text.encode()))
  shown = generation(text, sources).to_ansi(legend=False)
  assert without_escapes(shown) == "def " + "a\n\n\tb\ufffd[2J\ufffdc\ufffd"
  for line in shown.split("\n"):  # Colours end with the line.
    assert line.count("\x1b[0m") * 2 == line.count("\x1b[")


def test_without_colours_a_mark_stands_below_each_character():
  shown = generation("ab\n\tc\x1bd", [OWN, 1, 2, 2, CORRECTION, OWN, 1]).to_marked()
  assert shown.split("\n\n")[0].split("\n") == [
    "def ab", "    .1", "    c\ufffdd", "2222x.1"
  ]
  assert shown.endswith(
    "\n\n. next-token prediction: 2   x correction of a draft: 1   "
    "1 draft of depth 1: 2   2 draft of depth 2: 2"
  )


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_legend_names_what_can_occur(num_drafts):
  shown = generation("abc", [OWN] * 3, num_drafts=num_drafts)
  words = without_escapes(shown.to_ansi())
  assert "next-token prediction: 3" in words
  assert ("draft" in words) == (num_drafts > 0)
  assert repr(shown) == f"<Generation 'abc': {shown._summary()}>"


def test_figures_are_those_of_decoding():
  shown = generation("abcd", [OWN, 1, 2, OWN])
  assert shown.acceptance["tau"]["mean"] == pytest.approx(1.0)
  assert [x["mean"] for x in shown.acceptance["conditional"]] == [1.0, 1.0]
