"""Manifests of JobSets, held against the schemas; what kubectl says, as it says it.

Two packages know the schemas, each a part: one the fields of a JobSet, but not the
words that are allowed in them, the other all of the job inside.
"""

import json
import os
import re
import shlex
import subprocess

import pytest
import yaml

from experiments import base
from launch import jobs, trials
from launch.engines import kubernetes
from launch.engines.kubernetes import Kubernetes, parse
from launch.states import Job
from mtp_jax.config import ConfigError, from_config_dict, with_overrides

models = pytest.importorskip("kubeflow_trainer_api.models")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ACTIONS = (
  "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
  "RestartJobAndIgnoreMaxRestarts",
)
TPU = kubernetes.TEMPLATE.with_name("jobset_tpu.yaml")
OPTIONS = {
  "gpus": parse(
    ["image=example/mtp:1 hosts=2 devices=8", "claim=runs folder=/runs/depth"]
  ),
  "tpu": parse(
    ["image=example/mtp:1 claim=runs accelerator=tpu-v5p-slice topology=4x4x4 "
     "hosts=16 devices=4"],
    TPU,
  ),
  "slices": parse(
    ["image=example/mtp:1 claim=runs accelerator=tpu-v6e-slice topology=4x4 slices=3 "
     "hosts=4 devices=4"],
    TPU,
  ),
  "cpu": parse(["image=example/mtp:1 claim=runs"]),
}


CONTAINER = (
  "spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0
)


def plan(root, *names, **overrides):
  overrides = {"data.batch_size": 192, "eval.batch_size": 192} | overrides
  config = with_overrides(from_config_dict(base.get_config()), overrides)
  return trials.plan(config, {}, [{"name": name} for name in names], root)


def objects(root, name, options, **flags):
  (trial,) = plan(root, name)
  engine = Kubernetes(root, options, max_attempts=4, **flags)
  engine.check([trial])
  return list(yaml.safe_load_all(engine.preview([trial])))


def validate(jobset):
  """Fails if the manifest breaks a schema."""
  text = models.JobsetV1alpha2JobSet.from_dict(jobset).to_json()
  assert json.loads(text) == jobset  # A field that is not known is dropped.
  for rule in jobset["spec"]["failurePolicy"]["rules"]:
    assert rule["action"] in ACTIONS
  for replicated in jobset["spec"]["replicatedJobs"]:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    spec = replicated["template"]["spec"]
    kubernetes_validate.validate(
      job | {"spec": spec}, kubernetes_validate.latest_version(), strict=True
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_manifests_follow_the_schemas(tmp_path, name):
  config, jobset = objects(tmp_path, "kind=none,seed=0", OPTIONS[name])
  validate(jobset)
  kubernetes_validate.validate(
    config, kubernetes_validate.latest_version(), strict=True
  )
  assert jobset["metadata"]["name"] == config["metadata"]["name"]


WORDS = (
  "25921e05", "1e3", "1E3", ".5", "12", "+1", "-0", "0o7", "0x1f", "0b1", "1_000",
  "12:30:45", ".inf", ".nan", "on", "off", "yes", "n", "y", "NO", "true", "False",
  "null", "Null", "~", '"', "2025-01-01", "=", "<<", "a: b", "#x", "é", "\t", "- a",
  "{}",
)


def bare_words(text):
  """Returns the scalars that a YAML reader of whatever version has to interpret."""
  return {
    token.value
    for token in yaml.scan(text)
    if isinstance(token, yaml.ScalarToken) and token.plain
  }


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("template", [kubernetes.TEMPLATE, TPU])
def test_texts_are_texts_to_every_yaml(tmp_path, word, template):
  keys = ["image", "claim", "namespace", "folder"]
  keys += ["accelerator", "topology"] if template == TPU else []
  values = [shlex.quote(f"{key}={word}") for key in keys]
  engine = Kubernetes(tmp_path, parse(values, template))
  (trial,) = plan(tmp_path, "25921e05")
  text = engine.preview([trial])
  # Keys of the template are words that nobody reads otherwise; counts are numbers.
  assert all(re.fullmatch(r"\d|[1-9]\d+|[a-zA-Z_.]\S*", x) for x in bare_words(text))
  assert not bare_words(text) & set(WORDS)
  config, jobset = yaml.safe_load_all(text)
  assert config["metadata"]["namespace"] == jobset["metadata"]["namespace"] == word
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["image"] == word
  assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == word
  if template == TPU:
    assert set(pod["nodeSelector"].values()) == {word}
  # Several documents in one file, as they are handed over.
  both = engine.preview(plan(tmp_path, "1e3", "null"))
  assert len(list(yaml.safe_load_all(both))) == 4


def test_a_template_of_ones_own_has_keys_of_its_own(tmp_path):
  own = tmp_path / "own.yaml"
  text = kubernetes.TEMPLATE.read_text()
  own.write_text(text.replace('# nodeSelector: {pool: "a100"}', "nodeSelector: $nodes"))
  with pytest.raises(ConfigError, match=r"--kubernetes must set nodes, which own.yaml"):
    parse(["image=x claim=y"], own)
  engine = Kubernetes(tmp_path, parse(["image=x claim=y nodes='a: b'"], own))
  _, jobset = yaml.safe_load_all(engine.preview(plan(tmp_path, "a")))
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["nodeSelector"] == "a: b"


@pytest.mark.parametrize("text, message", [
  ("cost: $", r"--kubernetes_template: '.*' has a dollar sign without a key; write"),
  (None, r"--kubernetes_template must be a file of manifests, got '.*' \(.*No such"),
  (b"\xff", r"--kubernetes_template must be a file of manifests, got '.*' \(.*utf-8"),
])
def test_templates_that_are_none_are_refused(tmp_path, text, message):
  path = tmp_path / "t.yaml"
  if text is not None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ConfigError, match=message):
    parse([], path)


@pytest.mark.parametrize("path, value", [
  (("spec", "failurePolicy", "maxRestart"), 1),
  (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
  (("spec", "replicatedJobs", 0, "replicas"), "two"),
  (("spec", "replicatedJobs", 0, "template", "spec", "backoffLimits"), 0),
  ((*CONTAINER, "comand"), ["true"]),
  ((*CONTAINER, "name"), None),
])
def test_broken_manifests_would_be_noticed(tmp_path, path, value):
  _, jobset = objects(tmp_path, "a", OPTIONS["gpus"])
  *parents, last = path
  place = jobset
  for key in parents:
    place = place[key]
  place[last] = value
  with pytest.raises(Exception):  # noqa: B017
    validate(jobset)


def container_of(jobset):
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  return job["template"]["spec"]["containers"][0]


def test_every_process_learns_who_it_is(tmp_path):
  _, jobset = objects(tmp_path, "a", OPTIONS["slices"])
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job, container = replicated["template"]["spec"], container_of(jobset)
  assert (replicated["replicas"], job["completions"], job["parallelism"]) == (3, 4, 4)
  environment = {entry["name"]: entry.get("value") for entry in container["env"]}
  name = jobset["metadata"]["name"]
  assert environment["MTP_JAX_NUM_PROCESSES"] == "12"
  assert environment["MTP_JAX_COORDINATOR"] == f"{name}-train-0-0.{name}:8476"
  assert environment["MTP_JAX_JOB_ID"] == name
  # The command, as the second host of the third slice would run it.
  shell, flag, script, *arguments = container["command"]
  script = script.replace("exec python", 'exec echo "$MTP_JAX_PROCESS_ID" python')
  result = subprocess.run(
    [shell, flag, script, *arguments, *container["args"]],
    env=os.environ | {"SLICE": "2", "HOSTS": "4", "JOB_COMPLETION_INDEX": "1"},
    capture_output=True, text=True, check=True,
  )
  number, *command = result.stdout.split()
  assert number == "9"
  assert command == [
    "python", "-u", "-m", "launch.train", "--config=/etc/mtp_jax/trial.py",
    f"--workdir={tmp_path}/a",
  ]


def test_the_config_of_a_trial_travels_with_it(tmp_path):
  path = {"data.source": "files", "data.path": "it's \\ '''here"}
  (trial,) = plan(tmp_path, "it", **path, **{"seed": 3})
  text = Kubernetes(tmp_path, OPTIONS["cpu"]).preview([trial])
  config, _ = yaml.safe_load_all(text)
  (tmp_path / "trial.py").write_text(config["data"]["trial.py"])
  module = trials.load_experiment(tmp_path / "trial.py")
  assert from_config_dict(module.get_config()) == trial.config


def test_exit_codes_say_what_is_started_again(tmp_path):
  _, jobset = objects(tmp_path, "a", OPTIONS["gpus"])
  policy = jobset["spec"]["failurePolicy"]
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  rules = job["podFailurePolicy"]["rules"]
  actions = {
    int(pattern.removeprefix("FailJob rule at index ").rstrip("$")): rule["action"]
    for rule in policy["rules"]
    for pattern in rule["onJobFailureMessagePatterns"]
  }
  by_code = {
    code: actions[i]
    for i, rule in enumerate(rules)
    for code in rule.get("onExitCodes", {}).get("values", [])
  }
  assert by_code == {
    75: "RestartJobSetAndIgnoreMaxRestarts", 2: "FailJobSet", 3: "FailJobSet"
  }
  assert rules[2]["onPodConditions"][0]["type"] == "DisruptionTarget"
  assert actions[2] == "RestartJobSetAndIgnoreMaxRestarts"
  assert policy["maxRestarts"] == 3 and job["backoffLimit"] == 0
  assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_devices_and_volume_are_as_asked_for(tmp_path):
  _, jobset = objects(tmp_path, "a", OPTIONS["gpus"])
  container = container_of(jobset)
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]
  assert "--workdir=/runs/depth/a" in container["args"]

  _, jobset = objects(tmp_path, "a", OPTIONS["tpu"])
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "4x4x4",
  }
  assert container_of(jobset)["resources"]["limits"] == {"google.com/tpu": 4}


def test_names_are_short_and_no_two_configs_share_one(tmp_path):
  long = "kind=sequential,depth=4,learning_rate=0.0003,arm=matched,seed=1"
  one, two = plan(tmp_path, long, f"{long}0")
  first, second = kubernetes.jobset_name(one), kubernetes.jobset_name(two)
  assert first != second
  assert max(len(first), len(second)) + len("-train-0-123-abcde") <= 63
  assert first.startswith("mtp-kind-sequential-depth-4")


@pytest.mark.parametrize("text, message", [
  ("claim=y", r"--kubernetes must set image, which jobset.yaml has"),
  ("image=x claim=y hosts=0", r"hosts must be a number from 1 up, got '0'"),
  ("image=x claim=y hosts=two", r"hosts must be a number from 1 up, got 'two'"),
  ("image=x claim=y slices=-1", r"slices must be a number from 1 up, got '-1'"),
  ("image=x claim=y devices=8.5", r"devices must be a number from 0 up, got '8.5'"),
  ("image=x image=y", r"each key once, of .*, got 'image=y'"),
  ("image", r"--kubernetes must be KEY=VALUE, .*, got 'image'"),
  ("image=", r"--kubernetes must be KEY=VALUE, .*, got 'image='"),
  ("image='x", r"--kubernetes must be KEY=VALUE ..., got \"image='x\" \(No closing"),
  ("tpu=v5p:4x4x4", r"of namespace, .*image.* \(keys of jobset.yaml\), got 'tpu="),
  ("name=mine", r"--kubernetes must be KEY=VALUE, .*, got 'name=mine'"),
])
def test_bad_values_are_refused(text, message):
  with pytest.raises(ConfigError, match=message):
    parse([text])


def test_a_mesh_must_fit_the_slice(tmp_path):
  planned = plan(tmp_path, "a", **{"mesh.fsdp": 128})
  with pytest.raises(ConfigError, match=r"devices \(64\).* --kubernetes: slices=1 t"):
    Kubernetes(tmp_path, OPTIONS["tpu"]).check(planned)


# The cluster


JOBSETS = {"items": [
  {
    "metadata": {"name": "ran"},
    "spec": {},
    "status": {"conditions": [{"type": "Completed", "status": "True"}]},
  },
  {
    "metadata": {"name": "broke"},
    "spec": {},
    "status": {"conditions": [{
      "type": "Failed", "status": "True", "reason": "FailedJobs", "message": "two",
    }]},
  },
  {"metadata": {"name": "held"}, "spec": {"suspend": True}, "status": {}},
  {
    "metadata": {"name": "runs"},
    "spec": {},
    "status": {"replicatedJobsStatus": [{"name": "train", "ready": 1}]},
  },
  {"metadata": {"name": "starts"}, "spec": {}},
]}


def test_jobsets_are_read():
  found = kubernetes.parse_jobsets(json.dumps(JOBSETS))
  assert {name: job.state for name, job in found.items()} == {
    "ran": "ended", "broke": "ended", "held": "queued", "runs": "running",
    "starts": "queued",
  }
  assert found["broke"].reason == "Kubernetes reports Failed, FailedJobs, two"


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
  """A kubectl that prints what is in a file, and notes what it was asked."""
  folder = tmp_path / "bin"
  folder.mkdir()
  script = folder / "kubectl"
  script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\ncat {folder}/out\n')
  script.chmod(0o755)
  (folder / "out").write_text('{"items": []}')
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return folder


def test_manifests_are_written_and_applied_if_asked(tmp_path, kubectl, capsys):
  root = tmp_path / "runs"
  planned = plan(root, "a")
  choice = jobs.choose(planned, again=False)
  Kubernetes(root, OPTIONS["cpu"]).submit(choice)
  manifest = root / "kubernetes" / "a.yaml"
  assert len(list(yaml.safe_load_all(manifest.read_text()))) == 2
  assert "Nothing was submitted" in capsys.readouterr().out
  assert not (kubectl / "calls").exists() and not planned[0].workdir.exists()

  Kubernetes(root, OPTIONS["cpu"], submits=True).submit(choice)
  name = kubernetes.jobset_name(planned[0])
  asked = (kubectl / "calls").read_text().splitlines()
  assert asked[-1] == f"apply --filename {manifest}"
  running = {"metadata": {"name": name}, "spec": {}, "status": {
    "replicatedJobsStatus": [{"name": "train", "ready": 1}]
  }}
  (kubectl / "out").write_text(json.dumps({"items": [running]}))
  assert jobs.read_states(planned)["a"].kind == "running"
  assert jobs.find(planned) == {"a": Job("running", name)}
  assert jobs.cancel(planned) == ["kubernetes: deleted 1 JobSet(s)"]
  asked = (kubectl / "calls").read_text().splitlines()
  assert asked[-1].startswith(f"delete jobset {name} --namespace=default")


def test_submitting_needs_kubectl(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(ConfigError, match="--submit needs kubectl"):
    Kubernetes(tmp_path, OPTIONS["cpu"], submits=True).check([])
