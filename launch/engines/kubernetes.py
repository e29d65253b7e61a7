"""The engine of Kubernetes: a JobSet for every trial, from a template that users edit.

`jobset.yaml` is for nodes with GPUs, `jobset_tpu.yaml` for slices of TPUs. A manifest
holds a ConfigMap with the trial's config, as an experiment file, and a JobSet of one
indexed job per slice with a pod per host. Every pod runs `launch.train` and reads from
its environment which process it is.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from launch import states, trials
from launch.engines.engine import run, words
from launch.states import Choice, Job, Record, Trial
from mtp_jax.config import Config, ConfigError, to_dict

TEMPLATE = Path(__file__).with_name("jobset.yaml")
_FOLDER = "kubernetes"
_MAX_SLUG = 24  # A pod's name is longer than its JobSet's; 63 characters are allowed.
_EXPERIMENT = """\
\"\"\"The config of one trial, written by launch.sweep.\"\"\"

import json

from ml_collections import ConfigDict


def get_config():
  return ConfigDict(json.loads(CONFIG))


CONFIG = r'''
{config}
'''
"""
# JOB_COMPLETION_INDEX is set by Kubernetes.
_SCRIPT = (
  "export MTP_JAX_PROCESS_ID=$((SLICE * HOSTS + JOB_COMPLETION_INDEX)); "
  'exec python -u -m launch.train "$@"'
)
# Keys of a template that the sweep fills in for each trial.
_FILLED = (
  "name", "experiment", "max_restarts", "script", "workdir_flag", "coordinator",
  "num_processes", "num_hosts",
)
_COUNTS = {"slices": 1, "hosts": 1, "devices": 0}  # With their least values.


@dataclasses.dataclass(frozen=True)
class Options:
  """A template and the values of its keys; made by `parse`.

  `slices` x `hosts` are the pods of a trial, `devices` the accelerators of a pod (0
  trains on CPU cores).
  """

  template: string.Template
  values: dict[str, str]

  def count(self, key: str) -> int:
    return int(self.values[key])

  @property
  def num_pods(self) -> int:
    return self.count("slices") * self.count("hosts")

  @property
  def num_devices(self) -> int:
    return self.num_pods * max(self.count("devices"), 1)


def parse(given: Sequence[str], template: Path = TEMPLATE) -> Options:
  """Returns the options of --kubernetes: `image=REGISTRY/mtp_jax:1 hosts=2 devices=8`.

  Args:
    given: values of --kubernetes, with one KEY=VALUE or several in each.
    template: a file of manifests.

  Raises:
    ConfigError: no template, not KEY=VALUE, a key that the template does not have, that
      the sweep sets, or that is missing, or a number that is none.
  """
  text = _read_template(template)
  own = [key for key in text.get_identifiers() if key not in _FILLED]
  allowed = dict.fromkeys([*own, *_COUNTS, "namespace", "folder"])
  found: dict[str, str] = {}
  for word in words("kubernetes", given):
    key, equals, value = word.partition("=")
    if not equals or not value or key in found or key not in allowed:
      raise ConfigError(
        "--kubernetes must be KEY=VALUE, each key once, of "
        f"{', '.join(allowed)} (keys of {template.name}), got {word!r}."
      )
    found[key] = value
  values = {"slices": "1", "hosts": "1", "devices": "0", "namespace": "default"}
  values |= found
  if missing := [key for key in own if key not in values]:
    raise ConfigError(
      f"--kubernetes must set {', '.join(missing)}, which {template.name} has."
    )
  for key, least in _COUNTS.items():
    if not re.fullmatch(r"\d{1,9}", values[key]) or int(values[key]) < least:
      raise ConfigError(
        f"--kubernetes: {key} must be a number from {least} up, got {values[key]!r}."
      )
  return Options(text, values)


def _read_template(path: Path) -> string.Template:
  try:
    text = string.Template(path.read_text())
    text.get_identifiers()
  except (OSError, ValueError) as error:
    raise ConfigError(
      f"--kubernetes_template must be a file of manifests, got {str(path)!r} ({error})."
    ) from error
  if not text.is_valid():
    raise ConfigError(
      f"--kubernetes_template: {str(path)!r} has a dollar sign without a key; write "
      "$$ for one."
    )
  return text


@dataclasses.dataclass(frozen=True)
class Kubernetes:
  """A manifest for every trial, in `kubernetes/` of the sweep folder; see `Engine`.

  root: absolute path of the sweep folder, as it is seen here.
  options: of the manifests.
  max_attempts: how often a trial may end for no fault of its own.
  submits: hand the manifests to the cluster, through kubectl.
  track: trackers of every trial.
  """

  needs_folders: ClassVar = False

  root: Path
  options: Options
  max_attempts: int = 1
  submits: bool = False
  track: Sequence[str] = ()

  @property
  def outcome(self) -> str:
    return "given to kubernetes" if self.submits else "written as manifests"

  def check(self, todo: list[Trial]) -> None:
    values = self.options.values
    counts = " times ".join(f"{key}={values[key]}" for key in _COUNTS)
    trials.check_devices(todo, self.options.num_devices, f"--kubernetes: {counts}")
    if self.submits and shutil.which("kubectl") is None:
      raise ConfigError("--submit needs kubectl on the PATH of this host.")

  def preview(self, todo: list[Trial]) -> str:
    return "---\n".join(self.manifest(trial) for trial in todo)

  def submit(self, choice: Choice) -> int:
    folder = self.root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    namespace = self.options.values["namespace"]
    for trial in choice.todo:
      path, name = folder / f"{trial.workdir.name}.yaml", jobset_name(trial)
      path.write_text(self.manifest(trial))
      if not self.submits:
        print(f"{trial.name}: {path}")
        continue
      # What a JobSet does cannot be changed; an ended JobSet makes way.
      where = f"--namespace={namespace}"
      run("kubectl", "delete", "jobset", name, where, "--ignore-not-found")
      run("kubectl", "apply", "--filename", str(path))
      trial.workdir.mkdir(parents=True, exist_ok=True)
      states.write_record(trial.workdir, "kubernetes", id=name, namespace=namespace)
      print(f"{trial.name}: {name}", flush=True)
    if not self.submits:
      print(f"Nothing was submitted: --submit does, or kubectl apply -f {folder}")
    return 0

  @staticmethod
  def jobs(records: dict[str, Record]) -> dict[str, Job]:
    jobs = {}
    for namespace in sorted({record["namespace"] for record in records.values()}):
      try:
        where = f"--namespace={namespace}"
        text = run("kubectl", "get", "jobsets", where, "--output=json")
        found, default = parse_jobsets(text), Job("cancelled")
      except ConfigError:
        found, default = {}, Job("unknown")
      for name, record in records.items():
        if record["namespace"] == namespace:
          jobs[name] = found.get(record["id"], default)
    return jobs

  @staticmethod
  def cancel(records: dict[str, Record]) -> str:
    jobs = Kubernetes.jobs(records)
    busy = [name for name, job in jobs.items() if job.state in ("queued", "running")]
    for name in busy:
      where = f"--namespace={records[name]['namespace']}"
      name = records[name]["id"]
      run("kubectl", "delete", "jobset", name, where, "--ignore-not-found")
    return f"kubernetes: deleted {len(busy)} JobSet(s)"

  def manifest(self, trial: Trial) -> str:
    """Returns the template, filled in for a trial."""
    options, name = self.options, jobset_name(trial)
    folder = options.values.get("folder", str(self.root)).rstrip("/")
    script = f"{_SCRIPT} --track={','.join(self.track)}" if self.track else _SCRIPT
    texts = options.values | {
      "name": name,
      "experiment": experiment_file(trial.config),
      "script": script,
      "workdir_flag": f"--workdir={folder}/{trial.workdir.name}",
      # The first pod of the first slice; the JobSet makes its name known.
      "coordinator": f"{name}-train-0-0.{name}:8476",
      "num_processes": str(options.num_pods),
      "num_hosts": options.values["hosts"],
    }
    filled: dict[str, Any] = {key: _quoted(text) for key, text in texts.items()}
    filled |= {key: options.count(key) for key in _COUNTS}
    filled["max_restarts"] = self.max_attempts - 1
    return options.template.substitute(filled)


def _quoted(text: str) -> str:
  """Returns a text in quotes: bare, `25921e05` is a number to YAML 1.2 (kubectl)."""
  return yaml.dump(text, default_style='"', width=float("inf")).rstrip("\n")


def jobset_name(trial: Trial) -> str:
  """Returns a name that Kubernetes allows and no trial with another config has."""
  slug = re.sub(r"[^a-z0-9]+", "-", trial.name.lower())[:_MAX_SLUG].strip("-")
  digest = hashlib.sha256(json.dumps(to_dict(trial.config)).encode()).hexdigest()
  return f"mtp-{slug}-{digest[:8]}"


def experiment_file(config: Config) -> str:
  """Returns the source of an experiment file whose config is this one."""
  text = json.dumps(to_dict(config), indent=1)
  return _EXPERIMENT.format(config=text.replace("'", "\\u0027"))


def parse_jobsets(text: str) -> dict[str, Job]:
  """Reads `kubectl get jobsets --output=json`."""
  jobs = {}
  for item in json.loads(text)["items"]:
    name, status = item["metadata"]["name"], item.get("status", {})
    conditions = {
      c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"
    }
    if "Failed" in conditions:
      said = conditions["Failed"]
      parts = ("Kubernetes reports Failed", said.get("reason"), said.get("message"))
      job = Job("ended", name, reason=", ".join(filter(None, parts)))
    elif "Completed" in conditions:
      job = Job("ended", name)
    elif item["spec"].get("suspend") or "Suspended" in conditions:
      job = Job("queued", name, reason="suspended")
    else:
      replicated = status.get("replicatedJobsStatus", [])
      ready = any(x.get("ready") or x.get("succeeded") for x in replicated)
      job = Job("running" if ready else "queued", name)
    jobs[name] = job
  return jobs
