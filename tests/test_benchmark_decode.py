"""The decoding benchmark: its programs, its arithmetic, its refusals."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from launch.benchmarks import decode, decode_parts, limits
from mtp_jax import accounting
from mtp_jax.config import ConfigError
from mtp_jax.decode import loop
from mtp_jax.decode.generate import Decoding, make_plan
from mtp_jax.decode.target import unstack
from mtp_jax.files import write_json
from tests import tiny_runs
from tests.common import random_params, tiny_config
from tests.untrained_runs import save_run


@pytest.fixture(scope="module", autouse=True)
def small_sizes():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(limits, "_SIZES", {"other": (128, 1 << 20)})
    yield


def settings(**changed):
  flags = {"torch": False, "seed": 0, "runs": [], "trees": [], "drafts": [None]}
  flags |= {"recurse": False, "split": "validation"}
  return types.SimpleNamespace(**decode.PRESETS["quick"] | flags | changed)


@pytest.mark.slow
def test_true_drafts_are_all_accepted_and_the_ratios_add_up():
  rows = decode.sizes(settings())
  assert "| oracle, K=2" in "\n".join(decode.page([], rows))
  forced, oracle = rows
  assert (forced["drafter"], oracle["drafter"]) == ("forced, K=2", "oracle, K=2")
  for row in rows:
    # 11 tokens after the prefill's, by threes.
    assert row["plain_rounds"] == 11 and row["rounds"] == 4
    assert row["tau"] == row["batch_tau"] == 11 / 4
    assert row["identical"] == row["num_prompts"] == 2
    seconds = {name: np.array(x) for name, x in row["seconds"].items()}
    assert all(len(x) == 2 for x in seconds.values())
    assert all(np.all(x > 0) for name, x in seconds.items() if name != "draft")
    np.testing.assert_allclose(row["v"], seconds["verify"] / seconds["step"])
    np.testing.assert_allclose(row["sum_c"], seconds["draft"] / seconds["step"])
    np.testing.assert_allclose(row["measured"], seconds["plain"] / seconds["drafted"])
    np.testing.assert_allclose(
      row["floor_over_step"], seconds["floor"] / seconds["step"]
    )
    costs = np.add(row["v"], row["sum_c"])
    np.testing.assert_allclose(row["predicted"], row["batch_tau"] / costs)
  assert min(forced["sum_c"]) > 0 and oracle["sum_c"] == [0, 0]


@pytest.mark.slow
def test_a_step_reads_the_plain_model_and_the_filled_slots():
  config = tiny_config("sequential", 2, {"trunk.kind": "llama"})
  params = random_params(config)
  prompts_NP = np.zeros((2, 4), np.int32)
  model = decode_parts.Model(
    "m", config, unstack(params, config), prompts_NP, 8, ()
  )
  plain = decode_parts.Generation(
    model, make_plan(config, Decoding(num_drafts=0)), [prompts_NP], [None]
  )
  trunk = config.trunk
  plain_config = dataclasses.replace(
    config, mtp=dataclasses.replace(config.mtp, kind="none", depth=0)
  )
  weights = accounting.count(plain_config).total
  if not trunk.tie_embeddings:
    weights -= config.tokenizer.vocab_size * trunk.embed_dim
  # 4 tokens of prompt and on average 4 of 8 new ones, two sequences, keys and values.
  cached = 8 * 2 * 2 * trunk.num_layers * trunk.num_kv_heads * trunk.head_dim
  width = params["embed"]["embedding"].dtype.itemsize
  found = decode_parts._step_bytes(model, plain)
  assert found == pytest.approx(width * (weights + cached))


@pytest.mark.slow
def test_trained_runs_give_the_acceptance_of_what_is_timed(tmp_path):
  texts = tiny_runs.write_texts(tmp_path / "texts")
  shape = {"trunk.num_layers": 1, "trunk.embed_dim": 8, "mtp.depth": 1}
  workdir = save_run(tmp_path / "run", tiny_runs.run_config(texts, shape))
  static = workdir / "tree.json"
  write_json(static, {"paths": [[0], [1], [2]]})
  write_json(same := tmp_path / "same.json", {"paths": [[0], [1], [3]]})
  asked = settings(runs=[str(workdir)], trees=["own", "dynamic:2,2,5"])
  accepted, rows = decode.runs(asked)
  assert [x["drafter"] for x in rows] == [
    "own, K=1", "own, static tree, N=3 K=1", "own, dynamic tree, W=2 N=5 K=2"
  ]
  assert [x["num_drafted"] for x in rows] == [1, 3, 5]
  for entry, row in zip(accepted, rows, strict=True):
    assert entry["drafter"] == row["drafter"]
    assert row["identical"] == row["num_prompts"] == 4
    assert min(row["v"]) > 0 and min(row["sum_c"]) > 0
    # The acceptance that is reported is that of the decoding that is timed.
    assert row["tau"] == pytest.approx(entry["decoding"]["tau"]["mean"])
  assert len({tuple(x["seconds"]["verify"]) for x in rows}) == 3
  # A tree that begins with the chain accepts no less.
  assert rows[1]["tau"] >= rows[0]["tau"]
  figures = accepted[0]["decoding"]
  assert sum(figures["histogram"]) == figures["rounds"]
  assert "| 4 of validation |" in "\n".join(decode.page(accepted, rows))

  for changed, message in (
    ({"drafts": [2]}, "num_drafts must be at most the model's 1 extra"),
    ({"drafts": [0]}, "no extra predictors, or no drafts"),
    ({"prompts": 99, "batch_sizes": [1]}, "--prompts must be at most "),
    ({"prompts": 9}, "--prompts must be divisible by every one of"),
    ({"trees": ["none"]}, "--trees: tree must be dynamic:DEPTH,WIDTH,NOD"),
    ({"trees": [str(static), str(same)]}, "--trees must differ in nodes or depth"),
  ):
    with pytest.raises(ConfigError) as error:
      decode.runs(settings(runs=[str(workdir)], **changed))
    assert message in str(error.value)


@pytest.mark.slow
def test_drafts_are_made_from_features_of_any_width():
  config = tiny_config("eagle3", 2, {"trunk.num_layers": 1})
  weights = unstack(random_params(config), config)
  plan = make_plan(config, Decoding())
  inputs = loop.Inputs(weights, weights, None, np.zeros(0, np.int32))
  tokens_BS, lengths_B = np.zeros((2, 12), np.int32), np.full(2, 3)
  state = loop.prefill(
    plan, 4, inputs, tokens_BS, lengths_B, lengths_B + 7, np.uint32(0), np.arange(2)
  )
  assert decode_parts.draft(plan, inputs, state).seconds() > 0


def test_a_part_does_as_many_turns_as_fill_its_time(monkeypatch):
  clock = iter(np.cumsum([0.0, 9.0, 0.0, 0.4, 0.0, 0.8, 0.0, 2.0]))
  monkeypatch.setattr(decode_parts.time, "perf_counter", lambda: next(clock))
  part = decode_parts.Part(lambda step, x: x + step, jnp.int32(2), jnp.int32(0))
  part.warm_up(least_seconds=1.0)  # 9 s with compilation; 4 turns in 0.4 s, 0.8 s.
  assert part.seconds() == pytest.approx(2.0 / 10)
  assert int(part._carry) == 2 * (1 + 4 + 4 + 10)
