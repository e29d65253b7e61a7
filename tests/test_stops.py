"""The automaton that finds stop strings, against a search in the decoded text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.decode import stops
from tests.test_tokenizers import make

TEXTS = st.text("ab\u00e9\u6f22\n", min_size=1, max_size=5)


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
@settings(max_examples=100, deadline=None)
@given(strings=st.lists(TEXTS, min_size=1, max_size=3), data=st.data())
def test_the_first_stop_is_found_at_the_token_that_ends_it(name, strings, data):
  tokenizer = make(name)
  size = tokenizer.vocab_size + 3  # A model may have more rows than there are tokens.
  next_SV = stops.transitions(tuple(strings), tokenizer, size)
  assert next_SV.shape[1] == size and next_SV.dtype == np.uint8
  alphabet = [
    *tokenizer.encode("ab\u00e9\u6f22\n"), tokenizer.encode("th")[0], tokenizer.eos_id,
    size - 1,
  ]
  ids = data.draw(st.lists(st.sampled_from(alphabet), max_size=30))
  text, state = b"", 0
  for token in ids:
    if token < tokenizer.vocab_size:
      text += tokenizer.token_texts[token]
    state = next_SV[state, token]
    is_there = any(string.encode() in text for string in strings)
    assert (state == stops.FOUND) == is_there
    if is_there:
      break


def test_a_token_may_hold_a_stop_and_more():
  tokenizer = make("gpt2")  # It has the tokens "th" and "\u6f22t".
  next_SV = stops.transitions(("t",), tokenizer, tokenizer.vocab_size)
  for text in ("th", "\u6f22t"):
    (token,) = tokenizer.encode(text)
    assert next_SV[0, token] == stops.FOUND


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc", max_size=12), strings=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))  # noqa: E501
def test_text_that_is_shown_is_never_taken_back(text, strings):
  shown = ""
  for n in range(len(text)):
    found = "".join(stops.cut(list(text[:n]), strings, is_finished=False))
    assert found.startswith(shown)
    shown = found
    if any(string in text[:n] for string in strings):
      return
  whole = "".join(stops.cut(list(text), strings, is_finished=True))
  ends = [text.find(string) for string in strings if string in text]
  assert whole.startswith(shown) and whole == text[: min(ends, default=None)]


def test_long_strings_have_states_of_their_own():
  next_SV = stops.transitions(("a" * 200, "b" * 50), ByteTokenizer(), 258)
  state = 0
  for _ in range(200):
    assert state != stops.FOUND
    state = next_SV[state, 97]
  assert state == stops.FOUND
