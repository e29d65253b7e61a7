"""Decodes prompts with an engine that opens an exported folder: vLLM or transformers.

`launch.verify` starts this file with the Python of the engine, which may have nothing
of this project. It reads one JSON object from JOB and writes another into ANSWER:

  python launch/engine.py JOB ANSWER

  JOB     engine, trunk (folder), method ("" decodes plainly), drafter (folder), drafts,
          is_served_alone (its config.json names the trunk), prompts (texts),
          max_new_tokens, max_length
  ANSWER  version, end_ids, first_alone (the first module makes all drafts), results:
          prompt_tokens, tokens, rounds of each prompt; the rounds, in which drafts were
          verified, are null without drafts
"""

import json
import os
import sys
from pathlib import Path


def transformers(job):
  import torch
  import transformers as hf

  hf.logging.set_verbosity_error()
  hf.logging.disable_progress_bar()
  tokenizer = hf.AutoTokenizer.from_pretrained(job["trunk"])
  values = hf.AutoConfig.from_pretrained(job["trunk"])
  cls = hf.AutoModelForCausalLM._model_mapping[type(values)]
  if job["drafts"]:
    # The class has the numbers of published MTP layers only, and finds them by these.
    first = values.num_hidden_layers
    cls._keys_to_ignore_on_load_unexpected = [
      rf"model\.layers\.{n}\." for n in range(first, first + job["drafts"])
    ]
  model = cls.from_pretrained(job["trunk"], dtype=torch.float32).eval()
  passes = [0]

  def count(*_):
    passes[0] += 1

  model.get_decoder().register_forward_hook(count)
  model.generation_config.eos_token_id = None  # Every prompt gets all its tokens.
  how = {"use_mtp": True} if job["drafts"] else {}
  results = []
  for prompt in job["prompts"]:
    ids, passes[0] = tokenizer(prompt, return_tensors="pt").input_ids, 0
    out = model.generate(
      ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
      max_new_tokens=job["max_new_tokens"], **how,
    )
    tokens = out[0, ids.shape[1] :].tolist()
    results.append({
      "prompt_tokens": ids[0].tolist(),
      "tokens": tokens,
      # The first pass reads the prompt, and makes one token.
      "rounds": passes[0] - 1 if how else None,
    })
  return hf.__version__, False, results


def vllm(job):
  os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
  os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
  os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
  # On a CPU latent attention has a form of its own for published head sizes only.
  os.environ.setdefault("VLLM_MLA_DISABLE", "1")
  import vllm as package
  from vllm import LLM, SamplingParams

  how, folder = {}, job["trunk"]
  if job["is_served_alone"]:
    folder = job["drafter"]
  elif job["drafts"]:
    how["speculative_config"] = {
      "method": job["method"], "num_speculative_tokens": job["drafts"]
    } | ({"model": job["drafter"]} if job["drafter"] else {})
  model = LLM(
    model=folder, dtype="float32", enforce_eager=True, seed=0,
    max_model_len=job["max_length"], disable_log_stats=False,
    enable_prefix_caching=False,
    # Without compilation vLLM takes its C++ rotation, which on a CPU turns the queries
    # of latent attention by the angles of other tokens.
    compilation_config={"custom_ops": ["all", "-rotary_embedding"]}, **how,
  )

  def num_rounds():
    found = {metric.name: metric for metric in model.get_metrics()}
    return found["vllm:spec_decode_num_drafts"].value

  sampling = SamplingParams(
    temperature=0, max_tokens=job["max_new_tokens"], ignore_eos=True,
    detokenize=False,
  )
  results = []
  for prompt in job["prompts"]:
    before = num_rounds() if job["drafts"] else None
    (out,) = model.generate([prompt], sampling, use_tqdm=False)
    results.append({
      "prompt_tokens": list(out.prompt_token_ids),
      "tokens": list(out.outputs[0].token_ids),
      "rounds": num_rounds() - before if job["drafts"] else None,
    })
  # Model runner V2, which needs Triton, has a module for every draft.
  first_alone = not model.llm_engine.vllm_config.use_v2_model_runner
  return package.__version__, first_alone, results


def end_ids(folder):
  """Returns the tokens at which engines end a text, sorted."""
  from transformers import GenerationConfig

  found = GenerationConfig.from_pretrained(folder).eos_token_id
  return sorted(found if isinstance(found, list) else [] if found is None else [found])


def main():
  job_file, answer_file = map(Path, sys.argv[1:])
  job = json.loads(job_file.read_text())
  engine = {"transformers": transformers, "vllm": vllm}[job["engine"]]
  version, first_alone, results = engine(job)
  answer = {
    "version": version, "first_alone": first_alone, "results": results,
    "end_ids": end_ids(job["trunk"]),
  }
  answer_file.write_text(json.dumps(answer))


if __name__ == "__main__":
  sys.path.pop(0)  # The folder of this file has modules named as packages are.
  main()
