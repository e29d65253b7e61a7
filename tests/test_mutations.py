"""Faults that implementations of multi-token prediction really have had: each, planted
into a copy of the code, must make the named test fail.

The fragments are looked up in the sources, so a mutant whose place has changed is
reported instead of passing in silence.
"""

import shutil
from typing import NamedTuple

import pytest

from tests.commands import ROOT, Commands

pytestmark = pytest.mark.slow
IMPORTED = (
  "flax.linen", "grain", "hypothesis", "jax", "optax", "orbax.checkpoint", "pytest",
  "scipy.stats", "transformers",
)
PARITY = "test_torch_parity.py::test_losses_and_gradients_equal_torch"
SEES = (
  "test_causality.py::test_a_loss_sees_its_document_up_to_its_place_and_nothing_else"
)

PACKED = "test_pack.py::test_packed_runs_are_those_that_were_trained_alone"
DISTILLED = "test_distillation.py::test_losses_equal_sums_over_positions"
CACHES = "test_decode.py::test_caches_after_many_rounds_are_those_of_one_pass"
DRAFTING = (
  "test_eagle.py::test_training_computes_what_drafting_does_token_by_token"
)
RANKING = "test_top.py::test_loss_and_gradients_are_listnet_on_whole_targets"
TREE = "test_decode_tree.py"
BY_PLACES = (
  "test_attention_kernels.py::test_documents_by_their_places_are_the_same_function"
)
ON_GPU = "test_gpu_programs.py::test_every_kind_attends_once_in_each_direction"
DEPTHS = "test_decode.py::test_depths_say_in_decoding_what_they_say_in_training"


class Mutant(NamedTuple):
  """`old` stands exactly once in the file; `new` is the fault."""

  file: str
  old: str
  new: str
  test: str


MUTANTS = {
  "phases of a start overlap": Mutant(
    "stopwatch.py",
    "    self._since = now\n",
    "",
    "test_stopwatch.py::test_phases_follow_each_other_without_a_gap",
  ),
  "a resumed start says that it began anew": Mutant(
    "run_log.py",
    "startup.record(self.step)",
    "startup.record(0)",
    "test_train.py::test_resuming_ends_where_the_run_ended",
  ),
  "every depth predicts the next token": Mutant(
    "targets.py",
    "shifted_tokens(batch, 1 + m) for m",
    "shifted_tokens(batch, 1) for m",
    "test_targets.py::test_two_packed_documents_depth_0_to_3_written_out",
  ),
  "a depth learns from the trunk's distribution of the next token": Mutant(
    "losses.py",
    "jnp.roll(trunk_BTD, -m, axis=1) for m in depths",
    "trunk_BTD for m in depths",
    f"{DISTILLED}[sequential-options2]",
  ),
  "states after the end of the row are learnt from": Mutant(
    "train_step.py",
    "jnp.arange(M)[:, None] + jnp.arange(T) < T",
    "jnp.arange(M)[:, None] + jnp.arange(T) < T + M",
    f"{DISTILLED}[sequential-options2]",
  ),
  "tokens that cannot be drafted are targets": Mutant(
    "lm.py",
    "set(mask_MBT[1:] & is_there)",
    "set(mask_MBT[1:])",
    "test_draft_vocabulary.py::"
    "test_losses_are_those_of_the_tokens_that_can_be_drafted[kl]",
  ),
  "ids of tokens that can be drafted lose bits": Mutant(
    "decode/target.py",
    '"router", "draft_tokens"',
    '"router"',
    "test_draft_vocabulary.py::test_in_decoding_other_tokens_have_no_probability",
  ),
  "every depth reads the own output matrix of the first": Mutant(
    "lm.py",
    "matrix_DV[depth - 1]",
    "matrix_DV[0]",
    f"{DISTILLED}[medusa-options0]",
  ),
  "document mask of the targets dropped": Mutant(
    "targets.py",
    "(ids == batch.segment_ids) & (batch.segment_ids != 0)",
    "(batch.segment_ids != 0)",
    "test_targets.py::test_two_packed_documents_depth_0_to_3_written_out",
  ),
  "extra depths are scored before the answer": Mutant(
    "targets.py",
    "mask_MBT &= mask_MBT[:1]",
    "pass",
    "test_targets.py::test_depths_0_to_3_scored_from_the_answer_written_out",
  ),
  "padding counts as a document": Mutant(
    "targets.py",
    "(ids == batch.segment_ids) & (batch.segment_ids != 0)",
    "(ids == batch.segment_ids)",
    "test_targets.py::test_padding_is_neither_source_nor_target",
  ),
  "embedding of the following token zeroed": Mutant(
    "predictors/sequential.py",
    "if embedding_BTD is None else embedding_BTD\n",
    "if embedding_BTD is None else 0 * embedding_BTD\n",
    f"{SEES}[sequential-llama]",
  ),
  "chain is given the token that it predicts": Mutant(
    "predictors/sequential.py",
    "embed_ahead(k) for k in range(1, 1 + depth)",
    "embed_ahead(1 + k) for k in range(1, 1 + depth)",
    f"{SEES}[sequential-llama]",
  ),
  "every module is given the same token": Mutant(
    "predictors/sequential.py",
    "embed_ahead(k) for k in range(1, 1 + depth)",
    "embed_ahead(1) for k in range(1, 1 + depth)",
    f"{SEES}[sequential-llama]",
  ),
  "concat order swapped": Mutant(
    "predictors/sequential.py",
    "jnp.concatenate([hidden_BTD, embedded_BTD], axis=-1)",
    "jnp.concatenate([embedded_BTD, hidden_BTD], axis=-1)",
    f"{PARITY}[llama-sequential-False]",
  ),
  "no gradient from module to module": Mutant(
    "predictors/sequential.py",
    "        return h_BTD, last_BTD\n",
    "        return jax.lax.stop_gradient(h_BTD), last_BTD\n",
    f"{PARITY}[llama-sequential-False]",
  ),
  "no gradient from the modules to the trunk": Mutant(
    "predictors/sequential.py",
    "      (first_BTD, normed_BTD if",
    "      (jax.lax.stop_gradient(first_BTD), normed_BTD if",
    f"{PARITY}[llama-sequential-False]",
  ),
  "module's own output norm left out": Mutant(
    "predictors/sequential.py",
    'x_BTD = make_norm(self.trunk, "out_norm", self.norm)(x_BTD)',
    'x_BTD += 0 * make_norm(self.trunk, "out_norm", self.norm)(x_BTD)',
    f"{PARITY}[llama-sequential-False]",
  ),
  "module has the norms of its trunk in any case": Mutant(
    "model/layers.py",
    'kind == "rms" or trunk.kind == "llama"',
    'trunk.kind == "llama"',
    "test_minimal_module.py::test_a_config_is_the_minimal_code[gpt2-after]",
  ),
  "later steps of EAGLE see the later keys of other rows": Mutant(
    "kernels/attention.py",
    '"BGPTH,JBTGH->BGPTJ", q_BGPTH, own_JBTGH',
    '"BGPTH,JBTGH->BGPTJ", q_BGPTH, jnp.roll(own_JBTGH, 1, axis=2)',
    f"{DRAFTING}[llama-eagle]",
  ),
  "EAGLE's position stays that of the row": Mutant(
    "predictors/eagle.py",
    "given.positions_BT + (k - 1)",
    "given.positions_BT",
    f"{DRAFTING}[llama-eagle3]",
  ),
  "EAGLE-3 goes on from its normed state": Mutant(
    "predictors/eagle.py",
    "states.append(after(state_BTD))",
    "states.append(state_BTD / jnp.linalg.norm(state_BTD, axis=-1, keepdims=True))",
    f"{DRAFTING}[llama-eagle3]",
  ),
  "drafts of a recursion are all read in the newest row": Mutant(
    "predictors/drafting.py",
    "window.length_B[:, None] + k - 3",
    "window.length_B[:, None] - 2 + 0 * k",
    f"{DEPTHS}[llama-eagle]",
  ),
  "final norm of the parallel heads left out": Mutant(
    "predictors/parallel.py",
    "jnp.stack([given.final_norm(head_BTD) for head_BTD in heads_MBTD])",
    "jnp.stack([head_BTD for head_BTD in heads_MBTD])",
    f"{PARITY}[llama-parallel-False]",
  ),
  "residual of the Medusa heads left out": Mutant(
    "predictors/medusa.py",
    "return hidden_BTD + jax.nn.silu(",
    "return jax.nn.silu(",
    f"{PARITY}[llama-medusa-False]",
  ),
  "frozen trunk begins at random": Mutant(
    "run.py",
    "self.initial_state(given), None",
    "self.initial_state({}), None",
    "test_trunk_from.py::test_a_frozen_trunk_is_the_deployed_model_of_its_source",
  ),
  "a run from another one has draft tokens of its own": Mutant(
    "run.py",
    'if "mtp" not in given:',
    "if True:",
    "test_trunk_from.py::test_a_run_starts_from_all_parameters_of_another",
  ),
  "text that a model wrote is held out as well": Mutant(
    "data/pipeline.py",
    "      self.store,\n      self.documents(limits.split),\n",
    "      self.train_store or self.store,\n      np.arange(5),\n",
    "test_distilled_text.py::test_held_out_text_and_tokenizer_are_those_of_the_source",
  ),
  "every text that a model wrote ends a document": Mutant(
    "data/memory_store.py",
    "tokenizers_lib.document(tokenizer, ids, *x.edges)",
    "tokenizers_lib.document(tokenizer, ids, x.edges[0], True)",
    "test_distilled_text.py::test_documents_begin_and_end_where_their_lines_say",
  ),
  "a model continues held-out documents": Mutant(
    "self_distillation.py",
    'corpus.documents("train", corpus.config.data.seed)',
    'corpus.documents("validation", corpus.config.data.seed)',
    "test_self_distillation.py::"
    "test_excerpts_are_of_training_documents_in_the_order_of_the_run",
  ),
  "every file of a Medusa head holds the first one": Mutant(
    "interop/drafter_tensors.py",
    'yield from expand(head, f"{k}.", "mtp/", (k,), 0, shapes)',
    'yield from expand(head, f"{k}.", "mtp/", (0,), 0, shapes)',
    "test_drafter_files.py::"
    "test_the_published_forward_pass_on_the_files_gives_our_logits[medusa]",
  ),
  "attention of EAGLE-3 written for the hidden state before the embedding": Mutant(
    "interop/drafter_tensors.py",
    "inputs = [line._replace(form=swapped) for line in inputs]",
    "inputs = list(inputs)",
    "test_drafter_files.py::"
    "test_the_published_forward_pass_on_the_files_gives_our_logits[eagle3]",
  ),
  "a run of a pack goes on after its last step": Mutant(
    "pack_program.py",
    "jnp.where(is_active, new, old)",
    "new",
    PACKED,
  ),
  "all runs of a pack begin an interval of the log at once": Mutant(
    "pack_program.py",
    "starts[list(active)] = list(active.values())",
    "starts[list(active)] = any(active.values())",
    PACKED,
  ),
  "runs of a pack share rows that are not theirs": Mutant(
    "pack.py",
    "shares = all(x == read[0] for x in read)",
    "shares = True",
    "test_pack.py::test_runs_at_different_steps_go_on_together",
  ),
  "success need not last": Mutant(
    "run_log.py",
    "      self._reached = None\n",
    "      pass\n",
    "test_train.py::test_success_counts_twice_in_a_row[hits1-None-12]",
  ),
  "a resumed run forgets the first success": Mutant(
    "run_log.py",
    'done["seconds"], done["reached"]',
    'done["seconds"], None',
    "test_train.py::test_success_between_two_starts_ends_the_run_as_ever[killed]",
  ),
  "lambda not divided by depth": Mutant(
    "depth_weights.py",
    'scale / mtp.depth if mtp.weighting == "mean" else scale',
    "scale",
    "test_depth_weights.py::test_mean_divides_lambda_by_depth_and_sum_does_not",
  ),
  "piecewise schedule the wrong way round": Mutant(
    "depth_weights.py",
    "jnp.where(progress < mtp.schedule_fraction, weight, mtp.final_weight)",
    "jnp.where(progress > mtp.schedule_fraction, weight, mtp.final_weight)",
    "test_depth_weights.py::test_schedules",
  ),
  "curriculum ignored": Mutant(
    "depth_weights.py",
    "extra = jnp.where(active, per_depth * relative, 0.0)",
    "extra = per_depth * relative",
    "test_depth_weights.py::test_curricula_switch_depths_on_and_off_one_by_one",
  ),
  "every depth divided by the count of the main loss": Mutant(
    "losses.py",
    "return weights_M / jnp.maximum(counts_M, 1)",
    "return weights_M / jnp.maximum(counts_M[0], 1)",
    "test_losses.py::test_coefficients_divide_each_depth_by_its_own_count",
  ),
  "mean of means over microbatches": Mutant(
    "train_step.py",
    "config, params | trained, *part, coefficients_M, balance_coefficient",
    "config, params | trained, *part, loss_coefficients(weights_M / "
    "num_microbatches, part[1].mask_MBT), balance_coefficient",
    "test_model.py::test_accumulation_with_uneven_masks_changes_nothing",
  ),
  "gradient of masked tokens kept": Mutant(
    "losses.py",
    "scale_N1 = jnp.where(mask_N, coefficient, 0.0)",
    "scale_N1 = jnp.where(True | mask_N, coefficient, 0.0)",
    "test_losses.py::test_equals_all_logits_at_once_in_float64",
  ),
  "blocks of one depth weigh as those of another": Mutant(
    "losses.py",
    "jnp.repeat(coefficients_M, num_blocks)",
    "jnp.tile(coefficients_M, num_blocks)",
    "test_losses.py::test_equals_all_logits_at_once_in_float64",
  ),
  "the floor of the loss is that of one depth": Mutant(
    "../launch/benchmarks/loss.py",
    "return 3 * product * (1 + config.mtp.depth)",
    "return 3 * product",
    "test_benchmark_loss.py::"
    "test_needed_products_are_those_that_the_compiler_counts[2]",
  ),
  "a peer adds its gradients to those of the step before": Mutant(
    "../launch/benchmarks/torch_steps.py",
    "      x.grad = None",
    "      pass",
    "test_benchmark_loss.py::test_all_contestants_compute_the_same[torch eager]",
  ),
  "attention across documents": Mutant(
    "kernels/attention.py",
    "mask = (same_BTS & causal_TS)[:, None, None]",
    "mask = (same_BTS | causal_TS)[:, None, None] & causal_TS",
    f"{SEES}[none-llama]",
  ),
  "attention to the next token": Mutant(
    "kernels/attention.py",
    "causal_TS = jnp.arange(S)[None, :] <= rows_T1",
    "causal_TS = jnp.arange(S)[None, :] <= rows_T1 + 1",
    f"{SEES}[none-llama]",
  ),
  "deployed model takes the second head": Mutant(
    "lm.py",
    "jnp.concatenate([trunk, heads[:count]])",
    "jnp.concatenate([trunk, heads[1:2]])",
    "test_evaluate.py::test_main_loss_is_that_of_the_deployed_model",
  ),
  "agreement compared one token off": Mutant(
    "evaluate.py",
    "jnp.roll(trunk_BT, -m, axis=1)",
    "jnp.roll(trunk_BT, 1 - m, axis=1)",
    "test_evaluate.py::test_agreement_matches_a_loop_over_prefixes",
  ),
  "tokens after the row belong to the last document": Mutant(
    "data/packing.py",
    "np.repeat(segment_P.astype(np.int32), size_P)",
    "np.repeat(segment_P.astype(np.int32) - (begin_P >= row_begin_P + T), size_P)",
    "test_packing.py::test_rows_equal_the_stream_cut_by_hand",
  ),
  "every epoch cuts its rows at the same places": Mutant(
    "data/packing.py",
    "numbers.append(epoch * num_rows + shuffled)",
    "numbers.append(shuffled)",
    "test_pipeline.py::test_every_epoch_has_each_row_once_in_another_order",
  ),
  "every epoch has the same order": Mutant(
    "data/packing.py",
    "epoch_seed = (first_seed + epoch) % 2**32",
    "epoch_seed = first_seed % 2**32",
    "test_pipeline.py::test_the_order_is_that_of_grain",
  ),
  "checkpoint holds the iterator one batch ahead": Mutant(
    "train.py",
    "log.save(state, data_state, signum)",
    "log.save(state, loader.get_state(), signum)",
    "test_resume.py::test_signals_save_at_once_and_the_run_goes_on",
  ),
  "rows of the draft cache that saw rejected drafts are kept": Mutant(
    "predictors/sequential.py",
    "jnp.where(before_B >= 0, before_B, slots)",
    "jnp.where(before_B >= 0, slots, slots)",
    f"{CACHES}[llama-sequential]",
  ),
  "a module begins with what the one before said too early": Mutant(
    "predictors/sequential.py",
    "jnp.where(has_new_B1, final_BD, edge_BD)",
    "jnp.where(has_new_B1, source_BWD[:, 0], edge_BD)",
    f"{CACHES}[llama-sequential]",
  ),
  "accepted rows of the draft cache are not written": Mutant(
    "decode/loop.py",
    "jnp.where(position_BW <= n_B[:, None] - 2, position_BW, slots)",
    "jnp.where(position_BW <= start_B[:, None], position_BW, slots)",
    f"{CACHES}[llama-parallel]",
  ),
  "every module is given the same token in decoding": Mutant(
    "predictors/sequential.py",
    "ahead_BW = rows.position_BW + k\n",
    "ahead_BW = rows.position_BW + 1\n",
    f"{DEPTHS}[llama-sequential]",
  ),
  "the Markov head reads the token that it predicts": Mutant(
    "predictors/markov.py",
    "given.ahead(m)",
    "given.ahead(1 + m)",
    "test_markov.py::test_losses_and_gradients_are_those_of_a_whole_table[parallel-options0]",
  ),
  "every draft adds the row of the newest committed token": Mutant(
    "predictors/markov.py",
    "    token_B = drafts[-1].token_B\n",
    "",
    f"{DEPTHS}[llama-markov]",
  ),
  "rows of a block run one position early": Mutant(
    "predictors/dflash.py",
    "given.embed_ahead(1), 1 + given.positions_BT",
    "given.embed_ahead(1), given.positions_BT",
    f"{DEPTHS}[llama-dflash]",
  ),
  "a row of a block sees no row after it": Mutant(
    "predictors/dflash.py",
    "last_BQ = jnp.broadcast_to(position_BQ[:, -1:], position_BQ.shape)",
    "last_BQ = position_BQ",
    f"{DEPTHS}[llama-dflash]",
  ),
  "masked rows run one position late": Mutant(
    "predictors/peagle.py",
    "window.length_B[:, None] - 1 + jnp",
    "window.length_B[:, None] + jnp",
    f"{DEPTHS}[llama-peagle]",
  ),
  "later steps of P-EAGLE are shown the true token": Mutant(
    "predictors/eagle.py",
    "masked if is_masked else (",
    "(masked[0], given.embed_ahead(k)) if is_masked else (",
    f"{DRAFTING}[llama-peagle]",
  ),
  "far tokens are ranked first": Mutant(
    "predictors/top.py",
    "jnp.exp(-jnp.arange(",
    "jnp.exp(jnp.arange(",
    f"{RANKING}[6]",
  ),
  "a token is ranked at every occurrence": Mutant(
    "predictors/top.py",
    "there_WBT[d] & ~jnp.any(",
    "there_WBT[d] | jnp.any(",
    f"{RANKING}[6]",
  ),
  "heads are fed the state after the first head": Mutant(
    "decode/target.py",
    "streams[number - 1] for number in taps",
    "streams[-1] for number in taps",
    f"{DEPTHS}[llama-parallel]",
  ),
  "verification one position late": Mutant(
    "decode/loop.py",
    "n_B[:, None] - 1 + jnp.arange(1 + K),",
    "n_B[:, None] + jnp.arange(1 + K),",
    "test_decode.py::test_greedy_says_what_whole_forward_passes_say[llama-parallel]",
  ),
  "tokens after a stop token are kept": Mutant(
    "decode/loop.py",
    "    & before_stop_BR\n    & (offsets_R < (state.limit_B",
    "    & (offsets_R < (state.limit_B",
    "test_decode.py::test_a_stop_token_ends_a_run_of_accepted_drafts",
  ),
  "accepted nodes of a tree stay where they were written": Mutant(
    "decode/loop.py",
    "    first_B1 + path_BR,\n",
    "    first_B1 + offsets_R,\n",
    f"{TREE}::test_a_tree_that_holds_the_right_path_is_always_right[llama-sequential]",
  ),
  "a node sees what its parent sees, not its parent": Mutant(
    "decode/trees.py",
    "above_BNX = take_rows(sees_BXX, parent_BN)\n",
    "above_BNX = take_rows(sees_BXX & ~itself_XX, parent_BN)\n",
    f"{TREE}::test_rows_see_their_ancestors_and_a_path_is_accepted",
  ),
  "noise of a node by its number": Mutant(
    "decode/loop.py",
    "logits_BXV, places.position_BT + 1)",
    "logits_BXV, places.slot_BT + 1)",
    f"{TREE}::test_match_says_what_plain_sampling_says[llama-parallel]",
  ),
  "the target's own token after another node": Mutant(
    "decode/loop.py",
    "take_rows(own_BX, last_B),",
    "take_rows(own_BX, accepted_B),",
    f"{TREE}::test_a_tree_that_holds_the_right_path_is_always_right[llama-sequential]",
  ),
  "rows of a beam see those of other parents": Mutant(
    "decode/trees.py",
    "seen_BWM = take_rows(seen_BWM, from_BW) | (",
    "seen_BWM = seen_BWM | (",
    f"{TREE}::test_a_beam_drafts_what_each_of_its_paths_would_alone[llama-grown]",
  ),
  "attention on a GPU is that of plain XLA": Mutant(
    "kernels/attention.py",
    '    return "cudnn"\n',
    '    return "xla"\n',
    f"{ON_GPU}[sequential-3]",
  ),
  "documents without a place have no output, and nothing shows it": Mutant(
    "kernels/attention.py",
    "jnp.where(fits_B, 0, jnp.nan)",
    "jnp.where(fits_B, 0, 0)",
    f"{BY_PLACES}[heads0]",
  ),
  "cuDNN attends again in the backward pass": Mutant(
    "model/block.py",
    "return is_attention or names(",
    "return names(",
    f"{ON_GPU}[sequential-3]",
  ),
  "the logits of all tokens are made at once": Mutant(
    "losses.py",
    "num_blocks = -(-num_tokens // block_tokens)",
    "num_blocks = 1",
    f"{ON_GPU}[sequential-3]",
  ),
  "noise depends on where the round began": Mutant(
    "decode/noise.py",
    "if self.is_of_round and role != TARGET:",
    "if True:",
    "test_decode.py::test_match_says_what_plain_sampling_says",
  ),
}


@pytest.fixture(scope="module")
def command():
  """A server that has imported all but the code under test."""
  with Commands(IMPORTED, num_devices=8) as commands:
    yield commands


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, command, tmp_path):
  mutant = MUTANTS[name]
  for folder in ("mtp_jax", "experiments", "launch", "tests"):
    ignored = shutil.ignore_patterns("__pycache__", "results", "notebooks")
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  path = tmp_path / "mtp_jax" / mutant.file
  source = path.read_text()
  assert source.count(mutant.old) == 1, f"the place of this mutant in {mutant.file}"
  path.write_text(source.replace(mutant.old, mutant.new))
  flags = ("-x", "-m", "", "-p", "no:cacheprovider")
  result = command("pytest", *flags, f"tests/{mutant.test}", folder=tmp_path)
  # 1: tests ran and failed; any other code means that they did not run as they should.
  assert result.code == 1, f"{mutant.test} does not catch it:\n{result.output}"
  assert f"FAILED tests/{mutant.test.split('[')[0]}" in result.output
