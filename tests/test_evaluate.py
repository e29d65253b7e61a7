"""Evaluation against its definitions written out, and generation on scripted models."""

import functools
import math

import jax
import numpy as np
import pytest

from mtp_jax import evaluate, generative_metrics
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.decode import loop
from mtp_jax.decode.generate import Completion
from mtp_jax.lm import MtpLm, deployed, unembed_matrix
from mtp_jax.losses import token_ranks
from mtp_jax.sharding import make_mesh
from tests.common import TRUNKS, packed_batch, random_params, tiny_config

VOCAB = 4  # So few that predictors agree now and then.
FEW = {"tokenizer.vocab_size": VOCAB}
TOKEN_BYTES = np.array([1, 0, 3, 2])


def row_sums(config, params, batch):
  sums = jax.jit(functools.partial(evaluate.row_sums, config))
  return jax.device_get(sums(params, batch, TOKEN_BYTES))


@functools.cache
def case(kind="sequential", depth=3, trunk="llama"):
  """Config, parameters, batch with padding, and `row_sums` of it."""
  config = tiny_config(kind, depth, TRUNKS[trunk] | FEW)
  params = random_params(config)
  batch = packed_batch(tiny_config("sequential", 3, FEW), padding=True)
  return config, params, batch, row_sums(config, params, batch)


@functools.cache
def logits_of_case():
  config, params, batch, _ = case()
  hidden = jax.jit(MtpLm(config).apply)({"params": params}, batch)
  return np.einsum("MBTD,DV->MBTV", hidden, unembed_matrix(params, config))


def document_tokens(batch, b, i):
  """Tokens from position i to the end of its document, as far as the batch has them."""
  tokens = np.concatenate([batch.tokens, batch.next_tokens], axis=1)[b]
  ids = np.concatenate([batch.segment_ids, batch.next_segment_ids], axis=1)[b]
  if ids[i] == 0:
    return []
  end = next((j for j in range(i, len(ids)) if ids[j] != ids[i]), len(ids))
  return list(tokens[i:end])


def test_losses_and_accuracies_match_a_loop_over_tokens():
  config, _, batch, sums = case()
  logits_MBTV = logits_of_case().astype(np.float64)
  B, T = batch.tokens.shape
  nll, correct, count = np.zeros((3, B, 4))
  num_bytes = np.zeros(B)
  for b in range(B):
    for i in range(T):
      following = document_tokens(batch, b, i)[1:]
      for m, target in enumerate(following[: 1 + config.mtp.depth]):
        z = logits_MBTV[m, b, i]
        nll[b, m] += np.log(np.sum(np.exp(z))) - z[target]
        correct[b, m] += z.argmax() == target
        count[b, m] += 1
      num_bytes[b] += TOKEN_BYTES[following[0]] if following else 0
  np.testing.assert_array_equal(sums["count"], count)
  np.testing.assert_array_equal(sums["correct"], correct)
  np.testing.assert_array_equal(sums["bytes"], num_bytes)
  np.testing.assert_allclose(sums["nll"], nll, rtol=1e-5)
  assert (np.ptp(count, axis=1) > 0).any(), "depths must differ in valid targets"


def test_agreement_matches_a_loop_over_prefixes():
  config, _, batch, sums = case()
  argmax_MBT = logits_of_case().argmax(-1)
  depth = config.mtp.depth
  B, T = batch.tokens.shape
  agree, prefix = np.zeros((2, B, depth))
  reachable, accepted = np.zeros((2, B))
  for b in range(B):
    for i in range(T - depth):
      if len(document_tokens(batch, b, i)) <= 1 + depth:
        continue
      reachable[b] += 1
      # Depth m and the trunk at i + m name the same token, i + 1 + m.
      hits = [argmax_MBT[m, b, i] == argmax_MBT[0, b, i + m] for m in range(1, 4)]
      agree[b] += hits
      length = hits.index(False) if False in hits else depth
      prefix[b, :length] += 1
      accepted[b] += 1 + length
  for name, expected in (("agree", agree), ("prefix", prefix)):
    np.testing.assert_array_equal(sums[name], expected, err_msg=name)
  np.testing.assert_array_equal(sums["reachable"], reachable)
  assert agree.sum() > prefix.sum() > 0, "joint and marginal must differ"
  summary = evaluate.summarize(sums)
  assert summary["simulated_accepted_length"]["mean"] == pytest.approx(
    accepted.sum() / reachable.sum()
  )


def test_hits_by_rank_match_a_loop_over_positions():
  config, params, batch, sums = case()
  logits_MBTV = logits_of_case()
  depth, (B, T) = config.mtp.depth, batch.tokens.shape
  hits, count = np.zeros((B, depth, VOCAB - 1)), 0
  for b in range(B):
    for i in range(T - depth):
      if len(document_tokens(batch, b, i)) <= 1 + depth:
        continue
      count += b % 2
      for m in range(1, 1 + depth):
        choice = logits_MBTV[0, b, i + m].argmax()
        ranked = np.argsort(-logits_MBTV[m, b, i], kind="stable")[: VOCAB - 1]
        hits[b, m - 1] += ranked == choice
  found = jax.jit(functools.partial(evaluate.hit_sums, config, ranks=VOCAB - 1))(
    params, batch
  )
  np.testing.assert_array_equal(found["hits"], hits)
  np.testing.assert_array_equal(found["hits"][:, :, 0], sums["agree"])
  np.testing.assert_array_equal(found["reachable"], sums["reachable"])

  # Even rows are padding.
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  document_B = np.where(np.arange(B) % 2, 3, -1)
  shares, positions = evaluate.top_k_hits(
    config, params, [(batch, document_B)], VOCAB - 1, mesh
  )
  assert positions == count
  np.testing.assert_allclose(shares, hits[1::2].sum(axis=0) / count, rtol=1e-6)
  with pytest.raises(ValueError, match=r"must have a position where every depth"):
    evaluate.top_k_hits(config, params, [(batch, 0 * document_B - 1)], 1, mesh)


def test_equal_logits_rank_lower_ids_first():
  hidden_MBTD = np.ones((1, 1, 3, 1), np.float32)
  unembed_DV = np.array([[2.0, 3.0, 2.0, 2.0]], np.float32)
  tokens_MBT = np.array([[[3, 0, 1]]])
  ranks = token_ranks(hidden_MBTD, unembed_DV, tokens_MBT, block_tokens=2)
  assert ranks.tolist() == [[[3, 1, 0]]]


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("kind", ["parallel", "sequential", "linear", "medusa"])
def test_main_loss_is_that_of_the_deployed_model(kind, trunk):
  config, params, batch, sums = case(kind, 3, trunk)
  plain_params, plain = deployed(params, config)
  assert "mtp" not in plain_params
  alone = row_sums(plain, plain_params, batch)
  for name in ("correct", "count"):
    np.testing.assert_array_equal(sums[name][:, 0], alone[name][:, 0])
  # The same products in the same order. Only the layer of the parallel head lies in
  # another loop when it is deployed, where XLA may fuse, and so round, otherwise.
  rtol = 1e-6 if kind == "parallel" else 0
  np.testing.assert_allclose(sums["nll"][:, 0], alone["nll"][:, 0], rtol=rtol)


def test_sums_are_per_document_and_without_padding_rows():
  config, params, batch, sums = case()
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  documents = np.array([0, 0, 1, 2, 5, 5, 5, 7])

  def batches():
    for rows in (slice(0, 4), slice(4, 8)):
      yield jax.tree.map(lambda x, rows=rows: x[rows], batch), documents[rows]
    yield jax.tree.map(lambda x: x[:4], batch), np.full(4, -1)

  found = evaluate.document_sums(config, params, batches(), TOKEN_BYTES, mesh)
  # Of the same program: one for another number of rows may round otherwise.
  program = evaluate.row_sums_program(config, mesh)
  parts = [program(params, rows, TOKEN_BYTES) for rows, _ in batches()][:2]
  for name, rows in jax.tree.map(lambda *x: np.concatenate(x), *parts).items():
    np.testing.assert_allclose(rows, sums[name], rtol=1e-5, err_msg=name)
    expected = [rows[documents == d].sum(0) for d in (0, 1, 2, 5, 7)]
    np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "axes", [{"mesh.data": 4, "mesh.context": 2}, {"mesh.fsdp": 2, "mesh.tensor": 4}]
)
def test_eight_devices_measure_what_one_does(axes):
  config = tiny_config("sequential", 3, FEW | {"trunk.num_kv_heads": 4} | axes)
  params, batch = random_params(config), case()[2]
  found = {}
  for num_devices, sizes in ((1, tiny_config().mesh), (8, config.mesh)):
    mesh = make_mesh(sizes, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
      found[num_devices] = evaluate.document_sums(
        config, params, [(batch, np.arange(8) // 2)], TOKEN_BYTES, mesh
      )
  for name, one in found[1].items():
    rtol = 1e-5 if name == "nll" else 0
    np.testing.assert_allclose(found[8][name], one, rtol=rtol, err_msg=name)


def test_summary_matches_sums_written_out():
  _, _, _, sums = case()
  summary = evaluate.summarize(sums)
  total = {name: rows.sum(0, dtype=np.float64) for name, rows in sums.items()}
  means = lambda key: [entry["mean"] for entry in summary[key]]  # noqa: E731
  loss = total["nll"] / total["count"]
  assert means("depth_loss") == pytest.approx(loss)
  assert [x["count"] for x in summary["depth_loss"]] == list(total["count"])
  assert means("depth_accuracy") == pytest.approx(total["correct"] / total["count"])
  assert summary["main_loss"]["mean"] == pytest.approx(loss[0])
  agree, prefix = (total[name] / total["reachable"] for name in ("agree", "prefix"))
  assert means("teacher_forced_agreement") == pytest.approx(agree)
  assert means("joint_prefix_agreement") == pytest.approx(prefix)
  bits = total["nll"][0] / math.log(2) / total["bytes"]
  assert summary["bits_per_byte"]["mean"] == pytest.approx(bits)
  assert summary["num_documents"] == 8


def test_depth_0_has_no_drafts():
  summary = evaluate.summarize(case("none", 0)[3])
  assert summary["teacher_forced_agreement"] == []
  assert summary["joint_prefix_agreement"] == []
  assert summary["simulated_accepted_length"] == {"mean": 1.0, "stderr": 0.0}


def test_standard_error_agrees_with_a_bootstrap_over_documents():
  rng = np.random.default_rng(0)
  n = 400
  count = rng.integers(1, 200, n).astype(float)
  document_mean = 2 + rng.normal(0, 0.5, n)  # Tokens of a document go together.
  nll = count * document_mean
  estimate = evaluate.ratio(nll, count)
  picks = rng.integers(0, n, (4000, n))
  resampled = nll[picks].sum(1) / count[picks].sum(1)
  assert estimate["mean"] == pytest.approx(nll.sum() / count.sum())
  assert estimate["stderr"] == pytest.approx(resampled.std(), rel=0.06)
  as_if_tokens_were_independent = 0.5 / math.sqrt(count.sum())
  assert estimate["stderr"] > 5 * as_if_tokens_were_independent


def test_a_ratio_says_when_it_knows_nothing():
  assert math.isnan(evaluate.ratio(np.zeros(3), np.zeros(3))["mean"])
  one = evaluate.ratio(np.array([3.0]), np.array([2.0]))
  assert one["mean"] == 1.5
  assert math.isnan(one["stderr"])


TEXT = """import os

def first(a, b):
  total = a + b
  return total

def second(x):
  return x
"""
HEADER = "def first(a, b):\n  total = a + b\n"


def test_line_prompts_end_before_a_line_in_the_middle():
  text = "a = 1\nb = 2\n\nc = 3\nd = 4"
  before = "a = 1\nb = 2\n\n"
  assert generative_metrics.line_prompts([text], 9, 100, 60) == [(before, "c = 3")]
  assert generative_metrics.line_prompts([text], 9, 8, 60) == [(before[-8:], "c = 3")]


def test_line_prompts_pass_over_long_blank_and_last_lines():
  long = "x" * 20
  assert generative_metrics.line_prompts([f"a\n{long}\n\nb\nc"], 9, 100, 10) == [
    (f"a\n{long}\n\n", "b")
  ]
  unsuited = ["one line", "a\n\n\n", f"a\nb\n{long}\n{long}\nlast"]
  assert generative_metrics.line_prompts(unsuited, 9, 100, 10) == []
  assert len(generative_metrics.line_prompts([TEXT] * 5, 3, 100, 60)) == 3


def test_line_prompts_never_cut_a_character():
  found = generative_metrics.line_prompts(["\u00e9\u00e9\nx\ny"], 1, 4, 10)
  assert found == [("\u00e9\n", "x")]


def test_function_prompts_give_the_first_line_of_the_body():
  assert generative_metrics.function_prompts([TEXT], 5, 100) == [HEADER]
  method = "class C:\n    def f(self):\n        a = 1\n        return a\n"
  dedented = "def f(self):\n    a = 1\n"
  assert generative_metrics.function_prompts([method], 5, 100) == [dedented]


def test_middle_prompts_end_where_the_second_half_begins():
  texts = ["", "x", "abcdef", "ééabcd"]
  # No half character.
  assert generative_metrics.middle_prompts(texts, 5, 2) == ["bc", "a"]
  assert generative_metrics.middle_prompts(texts, 1, 100) == ["abc"]
  assert generative_metrics.middle_prompts(texts, 0, 100) == []


def test_function_prompts_pass_over_what_does_not_suit():
  too_long = f'def f():\n  "{100 * "x"}"\n  return 1\n'
  texts = ["not python (", "x = 1", "def f(): return 1", too_long, "\0"]
  assert generative_metrics.function_prompts(texts, 5, 60) == []
  assert len(generative_metrics.function_prompts([TEXT] * 5, 2, 100)) == 2


@pytest.mark.parametrize(
  "completion, added",
  [
    ("  return total\n\nother = 1\n", "  return total\n\n"),  # It ends by dedenting.
    ("  return total\n  tot", "  return total\n"),  # The limit cut a line.
    ("  return total\n  ", "  return total\n  \n"),
    ("\n\n", None),
    ("x = 1\n", None),
    ("  retu", None),
    ("", None),
  ],
)
def test_completed_function_ends_where_indentation_does(completion, added):
  expected = None if added is None else HEADER + added
  assert generative_metrics.completed_function(HEADER, completion) == expected


def completion(ids, is_stopped=False, rounds=0, accepted=(0,), reached=(0,)):
  counts = (np.array(x) for x in (accepted, reached, ()))
  accepted, reached, histogram = counts
  ids = np.asarray(ids)
  return Completion(ids, 0 * ids, is_stopped, rounds, reached, accepted, histogram)


def test_acceptance_rates_are_ratios_of_sums_over_prompts():
  rates = generative_metrics.acceptance_rates(
    "decoded",
    [
      completion(range(11), rounds=5, accepted=(4, 1), reached=(5, 4)),
      completion(range(6), rounds=5, accepted=(0, 0), reached=(5, 0)),
    ],
  )
  # By the formula of the linearised ratio for two equal denominators of 5.
  assert rates["decoded_tokens_per_round"] == {
    "mean": 1.5, "stderr": pytest.approx(0.5)
  }
  assert [x["mean"] for x in rates["decoded_survival"]] == [0.4, 0.1]
  assert [x["mean"] for x in rates["decoded_acceptance"]] == [0.4, 0.25]
  for completions in ([], [completion([1])]):
    rates = generative_metrics.acceptance_rates("decoded", completions)
    assert set(rates.values()) == {None}


GENERATING = {"data.seq_len": 96, "eval.max_new_tokens": 40, "eval.batch_size": 4}


def scripted_metrics(monkeypatch, line, body, texts=(TEXT,), overrides=None):
  """`generative_metrics` of a model that always writes `line`, or `body`."""
  config = tiny_config("sequential", 1, GENERATING | (overrides or {}))
  tokenizer = ByteTokenizer()

  def generate(config, weights, prompts, *, stop_ids, max_new_tokens, **sizes):
    assert all(len(x) <= sizes["prompt_length"] for x in prompts)
    assert tokenizer.eos_id in stop_ids
    stop = "\n" if ord("\n") in stop_ids else ""
    ids = tokenizer.encode((line if stop else body) + stop)[:max_new_tokens]
    return [completion(ids, is_stopped=bool(stop))] * len(prompts)

  monkeypatch.setattr(generative_metrics, "generate", generate)
  params = random_params(config)
  return generative_metrics.text_metrics(config, params, tokenizer, texts)


def test_generative_metrics_of_scripted_models(monkeypatch):
  other = TEXT.replace("total", "sum_")
  right = scripted_metrics(monkeypatch, "  return total", "  return 1\n", [TEXT, other])
  assert right["next_line_exact_match"] == {
    "mean": 0.5, "stderr": pytest.approx(math.sqrt(0.25 / 2)), "count": 2
  }
  assert right["function_parses"] == {"mean": 1.0, "stderr": 0.0, "count": 2}
  wrong = scripted_metrics(monkeypatch, "  return total ", "  return (\n")
  assert wrong["next_line_exact_match"]["mean"] == 0
  assert wrong["function_parses"]["mean"] == 0


def test_a_token_may_hold_more_than_the_newline(monkeypatch):
  result = scripted_metrics(monkeypatch, "  return total\n\n", "")
  assert result["next_line_exact_match"]["mean"] == 1
  assert result["function_parses"]["mean"] == 0


def test_generative_metrics_are_none_where_nothing_is_asked(monkeypatch):
  off = {"eval.line_prompts": 0, "eval.function_prompts": 0}
  nothing = dict.fromkeys(
    ("task_accuracy", "next_line_exact_match", "function_parses")
  )
  for name in ("decoded", "sampled"):
    nothing |= generative_metrics.acceptance_rates(name, [])
  assert scripted_metrics(monkeypatch, "", "", overrides=off) == nothing
  assert scripted_metrics(monkeypatch, "", "", texts=["x"]) == nothing


def test_any_text_is_continued_by_sampling_where_that_is_asked(monkeypatch):
  sampled, drafts, proposals = [], set(), []

  def generate(config, weights, prompts, *, decoding, **sizes):
    drafts.add((decoding.num_drafts, decoding.recurse))
    if decoding.rule == "leviathan":
      proposals.append(decoding.proposal)
      sampled.extend(ByteTokenizer().decode(x) for x in prompts)
    return [completion([1, 2, 3], rounds=2, accepted=(1,), reached=(2,))] * len(prompts)

  monkeypatch.setattr(generative_metrics, "generate", generate)
  off = {"eval.line_prompts": 0, "eval.function_prompts": 0, "eval.middle_prompts": 2}
  off["eval.num_drafts"] = 4
  config = tiny_config("sequential", 1, GENERATING | off)
  texts = ["no code. and more", TEXT, "a third"]
  result = generative_metrics.text_metrics(
    config, random_params(config), ByteTokenizer(), texts
  )
  assert sampled == ["no code.", TEXT[: len(TEXT) // 2]]
  assert result["sampled_acceptance"][0]["mean"] == 0.5
  assert result["decoded_acceptance"] is None
  assert drafts == {(4, True)}
  assert proposals == ["auto"] and "argmax_proposal_acceptance" not in result

  # With both proposals the most likely drafts are decoded too; `auto` draws.
  proposals.clear()
  both = {"eval.both_proposals": True, "eval.num_drafts": 1}
  config = tiny_config("linear", 1, GENERATING | off | both)
  result = generative_metrics.text_metrics(
    config, random_params(config), ByteTokenizer(), texts
  )
  assert proposals == ["auto", "argmax"]
  for proposal in ("argmax", "sample"):
    found = result[f"{proposal}_proposal_tokens_per_round"]
    assert found == result["sampled_tokens_per_round"]


@pytest.mark.slow
def test_real_generation_is_compiled_once_for_all_trials_of_a_shape():
  texts = [TEXT, TEXT.replace("first", "third"), TEXT.replace("b", "c")]
  programs = []
  for overrides in (
    {}, {"seed": 1, "mtp.weighting": "sum", "optimizer.learning_rate": 1.0}
  ):
    overrides = overrides | GENERATING | {"tokenizer.vocab_size": 258}
    config = tiny_config("sequential", 1, overrides)
    result = generative_metrics.text_metrics(
      config, random_params(config), ByteTokenizer(), texts
    )
    assert result["next_line_exact_match"]["count"] == 3
    assert result["function_parses"]["count"] == 3
    assert result["decoded_tokens_per_round"]["mean"] >= 1
    assert result["sampled_tokens_per_round"]["mean"] >= 1
    programs.append(loop.finish._cache_size())
  assert programs[0] == programs[1]
