"""Manifests of JobSets, held against the schemas; what kubectl says, as it says it.

Two packages know the schemas, each a part: one the fields of a JobSet, but not the
words that are allowed in them, the other all of the job inside.
"""

import json
import os
import re
import subprocess

import pytest
import yaml

from experiments import base
from launch import engines, trials
from launch.engines import Job, kubernetes
from launch.engines.kubernetes import Kubernetes, Options
from mtp_jax.config import ConfigError, from_config_dict, with_overrides

models = pytest.importorskip("kubeflow_trainer_api.models")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ACTIONS = (
  "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
  "RestartJobAndIgnoreMaxRestarts",
)
OPTIONS = {
  "gpus": Options(
    image="example/mtp:1", nodes=2, gpus=8, claim="runs:/runs", folder="/runs/depth",
    selector="pool=a100,zone=b", memory="64Gi", cpus=16, queue="lab",
    service_account="trainer",
  ),
  "tpu": Options(image="example/mtp:1", tpu="v5p:4x4x4", claim="runs:/runs"),
  "slices": Options(image="example/mtp:1", tpu="v6e:4x4", slices=3),
  "cpu": Options(image="example/mtp:1"),
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
  "null", "Null", "~", "", "2025-01-01", "=", "<<", "a: b", "#x", "é", "\t", "- a",
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
def test_texts_are_texts_to_every_yaml(tmp_path, word):
  key = word.strip("=") or "y"
  options = Options(
    image=word or "x", selector=f"{key}=1,rev={word}", memory=word or "1Gi",
    namespace=word, queue=word, service_account=word, claim=f"c:/{word}",
  )
  (trial,) = plan(tmp_path, "25921e05")
  engine = Kubernetes(tmp_path, options)
  text = engine.preview([trial])
  # 0 and 1 mean the same in all; so do a few numbers of ours.
  assert all(re.fullmatch(r"0|[1-9][0-9]*", bare) for bare in bare_words(text))
  expected = kubernetes.manifest(trial, options, tmp_path, 1)
  assert list(yaml.safe_load_all(text)) == expected
  pod = expected[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["nodeSelector"] == {key: "1", "rev": word}
  # Several documents in one file, as they are handed over.
  both = engine.preview(plan(tmp_path, "1e3", "null"))
  assert len(list(yaml.safe_load_all(both))) == 4


def test_a_selector_sets_no_label_twice(tmp_path):
  topology = "cloud.google.com/gke-tpu-topology"
  for tpu, selector in (("v5p:4x4x4", f"{topology}=2x2x1"), (None, "a=1,a=2")):
    options = Options(image="x", tpu=tpu, selector=selector)
    with pytest.raises(ConfigError, match=r"--kubernetes.selector must have each key"):
      Kubernetes(tmp_path, options).check([])


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
  config, _ = kubernetes.manifest(trial, OPTIONS["cpu"], tmp_path, 1)
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


def test_nodes_and_volume_are_as_asked_for(tmp_path):
  _, jobset = objects(tmp_path, "a", OPTIONS["gpus"])
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  container = container_of(jobset)
  assert pod["nodeSelector"] == {"pool": "a100", "zone": "b"}
  assert pod["serviceAccountName"] == "trainer"
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert container["resources"]["requests"]["memory"] == "64Gi"
  assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]
  assert "--workdir=/runs/depth/a" in container["args"]
  assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lab"

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


@pytest.mark.parametrize("options, message", [
  ({"image": None}, r"--kubernetes.image is required"),
  ({"nodes": 0}, r"--kubernetes.nodes must be at least 1, got 0"),
  ({"tpu": "v9"}, r"--kubernetes.tpu must name one of .*, got 'v9'"),
  ({"tpu": "h100:8"}, r"--kubernetes.tpu must name one of .*, got 'h100:8'"),
  ({"tpu": "v5p"}, r"--kubernetes.tpu must be a slice of .* with its shape"),
  ({"tpu": "v6e:4x4", "gpus": 8}, r"--kubernetes.nodes and .* not be set .* 1 and 8"),
  ({"tpu": "v6e:2x2", "chips": 8}, r"--kubernetes.chips must divide .* \(4\), got 8"),
  ({"slices": 2}, r"--kubernetes.slices must be 1 without --kubernetes.tpu, got 2"),
  ({"selector": "pool"}, r"--kubernetes.selector must be KEY=VALUE,..., got 'pool'"),
  ({"claim": "runs"}, r"--kubernetes.claim must be CLAIM:/PATH, got 'runs'"),
])
def test_bad_flags_are_refused(tmp_path, options, message):
  with pytest.raises(ConfigError, match=message):
    Kubernetes(tmp_path, Options(**{"image": "x"} | options)).check([])


def test_a_mesh_must_fit_the_slice(tmp_path):
  planned = plan(tmp_path, "a", **{"mesh.fsdp": 128})
  with pytest.raises(ConfigError, match=r"devices \(64\).* from --kubernetes.slices=1"):
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
  jobs = kubernetes.parse_jobsets(json.dumps(JOBSETS))
  assert {name: job.state for name, job in jobs.items()} == {
    "ran": "ended", "broke": "ended", "held": "queued", "runs": "running",
    "starts": "queued",
  }
  assert jobs["broke"].reason == "Kubernetes says Failed, FailedJobs, two"


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
  Kubernetes(root, OPTIONS["cpu"]).submit(planned)
  manifest = root / "kubernetes" / "a.yaml"
  assert len(list(yaml.safe_load_all(manifest.read_text()))) == 2
  assert "Nothing was submitted" in capsys.readouterr().out
  assert not (kubectl / "calls").exists() and not planned[0].workdir.exists()

  Kubernetes(root, OPTIONS["cpu"], submits=True).submit(planned)
  name = kubernetes.jobset_name(planned[0])
  asked = (kubectl / "calls").read_text().splitlines()
  assert asked[-1] == f"apply --filename {manifest}"
  running = {"metadata": {"name": name}, "spec": {}, "status": {
    "replicatedJobsStatus": [{"name": "train", "ready": 1}]
  }}
  (kubectl / "out").write_text(json.dumps({"items": [running]}))
  assert trials.read_states(planned)["a"].kind == "running"
  assert engines.find_jobs(planned) == {"a": Job("running", name)}
  assert engines.cancel(planned) == ["kubernetes: deleted 1 JobSet(s)"]
  asked = (kubectl / "calls").read_text().splitlines()
  assert asked[-1].startswith(f"delete jobset {name} --namespace=default")


def test_submitting_needs_kubectl(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(ConfigError, match="--submit needs kubectl"):
    Kubernetes(tmp_path, OPTIONS["cpu"], submits=True).check([])
