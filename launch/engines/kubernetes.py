"""The engine of Kubernetes: a JobSet for every trial, for GPU nodes and TPU slices.

A manifest holds two objects: a ConfigMap with the trial's config, as an experiment
file, and a JobSet of one indexed job per slice, a pod per host. Every pod runs
`launch.train` and learns from its environment which process it is. How a process ends
says what happens next (`launch.exits`): after 75, or when a pod is evicted, the trial
is started again and it does not count; 2 and 3 end it; after all else it is started
again, `maxRestarts` times. JobSet tells these apart by the message of the failed job,
from version 0.10 on.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from launch import engines, exits, trials
from launch.distributed import COORDINATOR, NUM_PROCESSES
from launch.engines import Job, Record
from launch.engines.options import option
from launch.planning import topologies
from launch.trials import Trial
from mtp_jax.config import Config, ConfigError, to_dict

_FOLDER = "kubernetes"
_PORT = 8476
_JOB = "train"
_CONFIG = "/etc/mtp_jax"
_MAX_SLUG = 24  # Names of pods add to those of JobSets; 63 characters are allowed.
# As Google Kubernetes Engine calls the slices of `launch.plan`.
_TPUS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
}
# The rules of the job, in this order: JobSet knows them by their place.
_YIELDED, _HOPELESS, _EVICTED = range(3)
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


@dataclasses.dataclass(frozen=True)
class Options:
  """The `--kubernetes.*` flags."""

  image: str | None = option(None, "container image, with this code in its workdir")
  tpu: str | None = option(None, "TPU slice of a trial, as in v5p:4x4x4")
  slices: int = option(1, "TPU slices of a trial")
  chips: int = option(4, "TPU chips of a host")
  nodes: int = option(1, "nodes of a trial, without TPUs")
  gpus: int = option(0, "GPUs of each node; 0 trains on CPU cores")
  folder: str | None = option(
    None, "the sweep folder as the pods see it; by default --workdir"
  )
  claim: str | None = option(
    None, "CLAIM:/PATH, persistent volume claim that holds that folder, and its place"
  )
  selector: str | None = option(None, "node labels, KEY=VALUE separated by commas")
  memory: str | None = option(None, "memory of each pod (64Gi)")
  cpus: int = option(0, "CPU cores of each pod; 0 leaves it to the cluster")
  namespace: str = option("default", "namespace of the objects")
  queue: str | None = option(None, "Kueue queue that they wait in")
  service_account: str | None = option(None, "service account of the pods")
  grace: int = option(120, "seconds that a pod has to save when it is evicted")

  @property
  def topology(self) -> topologies.Topology | None:
    if self.tpu is None:
      return None
    try:
      topology = topologies.parse(self.tpu)
    except ConfigError as error:
      text = str(error).replace("--topology", "--kubernetes.tpu")
      raise ConfigError(text) from error
    if topology.chip.name not in _TPUS or topology.shape is None:
      raise ConfigError(
        f"--kubernetes.tpu must be a slice of {', '.join(_TPUS)} with its shape, as in "
        f"v5p:4x4x4, got {self.tpu!r}."
      )
    return topology

  @property
  def hosts(self) -> int:
    """Of a slice, or of the trial where there are no TPUs."""
    topology = self.topology
    return self.nodes if topology is None else topology.num_chips // self.chips

  @property
  def num_devices(self) -> int:
    topology = self.topology
    if topology is None:
      return self.nodes * max(self.gpus, 1)
    return topology.num_chips * self.slices

  @property
  def devices_from(self) -> str:
    if self.tpu is None:
      return f"--kubernetes.nodes={self.nodes} times --kubernetes.gpus={self.gpus}"
    return f"--kubernetes.slices={self.slices} times --kubernetes.tpu={self.tpu}"

  def check(self) -> None:
    """Raises ConfigError if a flag is missing or cannot be meant."""
    if not self.image:
      raise ConfigError("--kubernetes.image is required for --on=kubernetes.")
    lowest = {"slices": 1, "chips": 1, "nodes": 1, "gpus": 0, "cpus": 0, "grace": 1}
    for name, least in lowest.items():
      if getattr(self, name) < least:
        raise ConfigError(
          f"--kubernetes.{name} must be at least {least}, got {getattr(self, name)}."
        )
    topology = self.topology
    if topology is None:
      if self.slices > 1:
        raise ConfigError(
          f"--kubernetes.slices must be 1 without --kubernetes.tpu, got {self.slices}."
        )
    elif self.gpus or self.nodes > 1:
      raise ConfigError(
        "--kubernetes.nodes and --kubernetes.gpus must not be set with "
        f"--kubernetes.tpu, got {self.nodes} and {self.gpus}."
      )
    elif topology.num_chips % self.chips:
      raise ConfigError(
        f"--kubernetes.chips must divide the chips of a slice ({topology.num_chips}), "
        f"got {self.chips}."
      )
    self.labels()
    self.volume()

  def labels(self) -> dict[str, str]:
    """Returns what nodes must have."""
    topology = self.topology
    labels = {}
    if topology is not None:
      labels = {
        "cloud.google.com/gke-tpu-accelerator": _TPUS[topology.chip.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
      }
    for pair in (self.selector or "").split(",") if self.selector else ():
      key, equals, value = pair.partition("=")
      if not key or not equals:
        raise ConfigError(f"--kubernetes.selector must be KEY=VALUE,..., got {pair!r}.")
      if key in labels:
        raise ConfigError(
          "--kubernetes.selector must have each key once, and none that "
          f"--kubernetes.tpu sets, got {pair!r}."
        )
      labels[key] = value
    return labels

  def volume(self) -> tuple[str, str] | None:
    """Returns the claim and where it is mounted."""
    if self.claim is None:
      return None
    name, _, path = self.claim.partition(":")
    if not name or not path.startswith("/"):
      raise ConfigError(
        f"--kubernetes.claim must be CLAIM:/PATH, got {self.claim!r}."
      )
    return name, path


class _Dumper(yaml.SafeDumper):
  """Writes every text in quotes, or line by line if it has several.

  PyYAML leaves `25921e05` and `0o7` bare: texts to YAML 1.1, numbers to YAML 1.2, which
  kubectl reads.
  """


_Dumper.add_representer(
  str,
  lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else '"'
  ),
)


class Kubernetes:
  """A manifest for every trial, in `kubernetes/` of the sweep folder; see `Engine`.

  Args:
    root: the sweep folder, as it is seen here.
    options: of the JobSets.
    max_attempts: how often a trial may end for no fault of its own.
    submits: hand the manifests to the cluster, through kubectl.
  """

  needs_folders = False

  def __init__(
    self,
    root: Path = Path(),
    options: Options | None = None,
    max_attempts: int = 1,
    submits: bool = False,
  ):
    self._root = Path(root).absolute()
    self._folder = self._root / _FOLDER
    self._options = options or Options()
    self._max_attempts = max_attempts
    self._submits = submits
    self.outcome = "given to kubernetes" if submits else "written as manifests"

  def check(self, planned: list[Trial]) -> None:
    options = self._options
    options.check()
    trials.check_devices(planned, options.num_devices, options.devices_from)
    if self._submits and shutil.which("kubectl") is None:
      raise ConfigError("--submit needs kubectl on the PATH of this host.")

  def preview(self, planned: list[Trial]) -> str:
    self._options.check()
    return "---\n".join(self._text(trial) for trial in planned)

  def submit(self, planned: list[Trial]) -> int:
    self._folder.mkdir(parents=True, exist_ok=True)
    for trial in planned:
      path, name = self._folder / f"{trial.name}.yaml", jobset_name(trial)
      path.write_text(self._text(trial))
      if not self._submits:
        print(f"{trial.name}: {path}")
        continue
      # What a JobSet is to do cannot be changed; one that has ended makes way.
      where = f"--namespace={self._options.namespace}"
      _kubectl("delete", "jobset", name, where, "--ignore-not-found")
      _kubectl("apply", "--filename", str(path))
      trial.workdir.mkdir(parents=True, exist_ok=True)
      engines.write_record(
        trial.workdir, "kubernetes", id=name, namespace=self._options.namespace
      )
      print(f"{trial.name}: {name}", flush=True)
    if not self._submits:
      print(f"Nothing was submitted: --submit does, or kubectl apply -f {self._folder}")
    return 0

  def jobs(self, records: dict[str, Record]) -> dict[str, Job]:
    jobs = {}
    for namespace in sorted({record["namespace"] for record in records.values()}):
      try:
        text = _kubectl("get", "jobsets", f"--namespace={namespace}", "--output=json")
        found, default = parse_jobsets(text), Job("cancelled")
      except ConfigError:
        found, default = {}, Job("unknown")
      for name, record in records.items():
        if record["namespace"] == namespace:
          jobs[name] = found.get(record["id"], default)
    return jobs

  def cancel(self, records: dict[str, Record]) -> str:
    jobs = self.jobs(records)
    busy = [name for name, job in jobs.items() if job.state in ("queued", "running")]
    for name in busy:
      where = f"--namespace={records[name]['namespace']}"
      _kubectl("delete", "jobset", records[name]["id"], where, "--ignore-not-found")
    return f"kubernetes: deleted {len(busy)} JobSet(s)"

  def _text(self, trial: Trial) -> str:
    objects = manifest(trial, self._options, self._root, self._max_attempts)
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=math.inf)


def jobset_name(trial: Trial) -> str:
  """Returns a name that Kubernetes allows and no trial with another config has."""
  slug = re.sub(r"[^a-z0-9]+", "-", trial.name.lower())[:_MAX_SLUG].strip("-")
  digest = hashlib.sha256(json.dumps(to_dict(trial.config)).encode()).hexdigest()
  return f"mtp-{slug}-{digest[:8]}"


def experiment_file(config: Config) -> str:
  """Returns the source of an experiment file whose config is this one."""
  text = json.dumps(to_dict(config), indent=1)
  return _EXPERIMENT.format(config=text.replace("'", "\\u0027"))


def manifest(
  trial: Trial, options: Options, root: Path, max_attempts: int
) -> list[dict[str, Any]]:
  """Returns the objects of a trial: its config, and the JobSet that trains it."""
  name = jobset_name(trial)
  metadata = {"name": name, "namespace": options.namespace}
  config = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": dict(metadata),
    "data": {"trial.py": experiment_file(trial.config)},
  }
  labels = {"app.kubernetes.io/name": "mtp-jax"}
  if options.queue:
    labels["kueue.x-k8s.io/queue-name"] = options.queue
  metadata["labels"] = labels
  if options.tpu:
    metadata["annotations"] = {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
  jobset = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": _failure_policy(max_attempts),
      "replicatedJobs": [
        {
          "name": _JOB,
          "replicas": options.slices,
          "template": {"spec": _job(trial, name, options, root)},
        }
      ],
    },
  }
  return [config, jobset]


def _failure_policy(max_attempts: int) -> dict[str, Any]:
  def rule(name: str, action: str, *rules_of_job: int) -> dict[str, Any]:
    return {
      "name": name,
      "action": action,
      "onJobFailureReasons": ["PodFailurePolicy"],
      "onJobFailureMessagePatterns": [
        f"FailJob rule at index {i}$" for i in rules_of_job
      ],
    }

  return {
    "maxRestarts": max_attempts - 1,
    "rules": [
      rule("yielded", "RestartJobSetAndIgnoreMaxRestarts", _YIELDED, _EVICTED),
      rule("hopeless", "FailJobSet", _HOPELESS),
    ],
  }


def _job(trial: Trial, name: str, options: Options, root: Path) -> dict[str, Any]:
  def ends_with(*codes: int) -> dict[str, Any]:
    found = {"containerName": _JOB, "operator": "In", "values": list(codes)}
    return {"action": "FailJob", "onExitCodes": found}

  evicted = [{"type": "DisruptionTarget", "status": "True"}]
  rules = {
    _YIELDED: ends_with(exits.YIELDED),
    _HOPELESS: ends_with(exits.BAD_INPUT, exits.DIVERGED),
    _EVICTED: {"action": "FailJob", "onPodConditions": evicted},
  }
  return {
    "completionMode": "Indexed",
    "completions": options.hosts,
    "parallelism": options.hosts,
    "backoffLimit": 0,  # Whoever is lost, all start again.
    "podFailurePolicy": {"rules": [rules[i] for i in sorted(rules)]},
    "template": {"spec": _pod(trial, name, options, root)},
  }


def _pod(trial: Trial, name: str, options: Options, root: Path) -> dict[str, Any]:
  folder = (options.folder or str(root)).rstrip("/")
  facts = {
    # The first pod of the first slice; the JobSet makes its name known.
    COORDINATOR: f"{name}-{_JOB}-0-0.{name}:{_PORT}",
    NUM_PROCESSES: str(options.hosts * options.slices),
    "MTP_JAX_JOB_ID": name,
    "HOSTS": str(options.hosts),
  }
  environment: list[dict[str, Any]] = [
    {"name": key, "value": value} for key, value in facts.items()
  ]
  slice_of = {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}
  environment.append({"name": "SLICE", "valueFrom": {"fieldRef": slice_of}})
  mounts = [{"name": "config", "mountPath": _CONFIG}]
  volumes: list[dict[str, Any]] = [{"name": "config", "configMap": {"name": name}}]
  if volume := options.volume():
    claim, path = volume
    mounts.append({"name": "runs", "mountPath": path})
    volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
  if options.gpus:  # NCCL shares memory between processes; a container has 64 MB.
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
  container = {
    "name": _JOB,
    "image": options.image,
    "command": ["sh", "-c", _SCRIPT, "launch.train"],
    "args": [f"--config={_CONFIG}/trial.py", f"--workdir={folder}/{trial.name}"],
    "env": environment,
    "ports": [{"containerPort": _PORT, "protocol": "TCP"}],
    "volumeMounts": mounts,
  }
  if resources := _resources(options):
    container["resources"] = resources
  pod: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": options.grace,
    "containers": [container],
    "volumes": volumes,
  }
  if options.labels():
    pod["nodeSelector"] = options.labels()
  if options.service_account:
    pod["serviceAccountName"] = options.service_account
  return pod


def _resources(options: Options) -> dict[str, Any]:
  devices: dict[str, Any] = {}
  if options.tpu:
    devices["google.com/tpu"] = options.chips
  elif options.gpus:
    devices["nvidia.com/gpu"] = options.gpus
  others = {}
  if options.cpus:
    others["cpu"] = options.cpus
  if options.memory:
    others["memory"] = options.memory
  resources = {}
  if devices:
    resources["limits"] = devices
  if others or devices:
    resources["requests"] = others | devices
  return resources


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
      parts = ("Kubernetes says Failed", said.get("reason"), said.get("message"))
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


def _kubectl(*arguments: str) -> str:
  """Returns what kubectl prints.

  Raises:
    ConfigError: it fails.
  """
  try:
    result = subprocess.run(
      ["kubectl", *arguments], capture_output=True, text=True, check=True
    )
  except FileNotFoundError as error:
    raise ConfigError("kubectl is not on the PATH of this host.") from error
  except subprocess.CalledProcessError as error:
    lines = error.stderr.strip().splitlines() or ["without a word"]
    raise ConfigError(f"kubectl {arguments[0]} failed: {lines[-1]}") from error
  print(result.stderr, end="", file=sys.stderr)
  return result.stdout
