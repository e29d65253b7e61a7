"""Greedy decoding with a cache equals the arg max of whole forward passes."""

import jax
import numpy as np
import pytest

from mtp_jax import accounting
from mtp_jax.decode.greedy import generate
from mtp_jax.model.lm import MtpLm, unembed_matrix
from mtp_jax.sharding import logical_axes, make_mesh, tree_shardings
from tests.common import TRUNKS, batch_of, quick_jit, random_params, tiny_config

PROMPT_LENGTH, MAX_NEW = 9, 7  # Together they fill data.seq_len to the last slot.
NEVER = -1


@pytest.fixture(scope="module", params=TRUNKS)
def model(request):
  """A plain model, prompts of every length, and what decoding should append to each."""
  # Tied to the embedding, random parameters would say one token for ever.
  untied = {"trunk.tie_embeddings": False}
  config = tiny_config("none", 0, TRUNKS[request.param] | untied)
  params = random_params(config, seed=1)
  rng = np.random.default_rng(0)
  lengths = (1, 4, PROMPT_LENGTH, 2, PROMPT_LENGTH - 1)
  prompts = [rng.integers(0, config.tokenizer.vocab_size, n) for n in lengths]
  return config, params, prompts, uncached(config, params, prompts)


def uncached(config, params, prompts):
  """The definition: each new token is the arg max after a pass over all before it."""
  length = config.data.seq_len

  @quick_jit
  def next_tokens(params, batch):
    hidden_BTD = MtpLm(config).apply({"params": params}, batch)[0]
    return (hidden_BTD @ unembed_matrix(params, config)).argmax(-1)

  rows = [list(prompt) for prompt in prompts]
  for _ in range(MAX_NEW):
    # What stands after the tokens so far cannot matter: attention is causal.
    padded = [row + [0] * (length + 1 - len(row)) for row in rows]
    argmax_BT = next_tokens(params, batch_of(padded, np.ones_like(padded), length))
    for row, argmax_T in zip(rows, np.asarray(argmax_BT), strict=True):
      row.append(int(argmax_T[len(row) - 1]))
  return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]


def decode(model, stop_ids=(NEVER, NEVER), prompts=None, max_new_tokens=MAX_NEW):
  config, params, own_prompts, _ = model
  completions = generate(
    params,
    config,
    own_prompts if prompts is None else prompts,
    max_new_tokens=max_new_tokens,
    stop_ids=stop_ids,
    prompt_length=PROMPT_LENGTH,
    batch_size=2,
  )
  return [[int(x) for x in completion] for completion in completions]


def test_cached_decoding_equals_uncached_for_ragged_prompts(model):
  # Five prompts, two at a time: the last batch is filled up.
  expected = model[3]
  assert len({tuple(x) for x in expected}) == 5
  assert decode(model) == expected


def test_a_completion_ends_before_the_first_stop_token(model):
  expected = model[3]
  stops = (expected[0][3], expected[2][0])
  wanted = []
  for completion in expected:
    end = next((i for i, x in enumerate(completion) if x in stops), MAX_NEW)
    wanted.append(completion[:end])
  assert decode(model, stops) == wanted
  assert [] in wanted and len({len(completion) for completion in wanted}) > 1


def test_sharded_parameters_say_the_same(model):
  config, params, prompts, expected = model
  sizes = tiny_config(overrides={"mesh.fsdp": 4, "mesh.tensor": 2}).mesh
  axes = logical_axes(accounting.abstract_params(config))
  sharded = jax.device_put(params, tree_shardings(make_mesh(sizes), axes))
  assert decode((config, sharded, prompts, expected)) == expected


def test_no_prompt_needs_no_work(model):
  assert decode(model, prompts=[]) == []


@pytest.mark.parametrize("length", [0, PROMPT_LENGTH + 1])
def test_prompts_that_do_not_fit_are_refused(model, length):
  with pytest.raises(ValueError, match=rf"1 to {PROMPT_LENGTH} tokens, got {length}"):
    decode(model, prompts=[np.zeros(length, np.int32)])


def test_learned_positions_bound_the_length():
  config = tiny_config("none", 0, TRUNKS["gpt2"])
  model = config, random_params(config), [np.array([1])], None
  with pytest.raises(ValueError, match=r"at most data.seq_len \(16\).*got 17"):
    decode(model, max_new_tokens=MAX_NEW + 1)
