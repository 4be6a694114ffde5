"""What deploy/ asks of Docker, Kubernetes and Slurm, rendered as Prefect renders it; no cluster takes part."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import prefect
import pytest
from jsonschema import Draft202012Validator
from prefect.utilities.templating import apply_values

from flows import QUIET

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
WORKER_TYPES = {"docker": ("prefect-docker", "docker"), "kubernetes": ("prefect-kubernetes", "kubernetes")}
SLURM = DEPLOY / "slurm.sbatch"


def template(kind: str) -> dict[str, Any]:
    return json.loads((DEPLOY / f"{kind}.json").read_text())


def shipped(kind: str) -> dict[str, Any]:
    """Prefect's own template of that kind of pool, as its server knows it."""
    (file,) = Path(prefect.__file__).parent.rglob("aggregate-worker-metadata.json")
    package, name = WORKER_TYPES[kind]
    return json.loads(file.read_text())[package][name]["default_base_job_configuration"]


def rendered(kind: str, **overrides: Any) -> dict[str, Any]:
    """The job of a flow run: the template's defaults, then what the deployment asks for, then what the worker adds."""
    ours = template(kind)
    values = {name: variable["default"] for name, variable in ours["variables"]["properties"].items() if "default" in variable}
    values |= {"command": "prefect flow-run execute", "name": "hot-adder", "labels": {"flow": "alignti-study"}} | overrides
    Draft202012Validator(ours["variables"]).validate(values)
    return apply_values(ours["job_configuration"], values, remove_notset=True)


@pytest.mark.parametrize("kind", WORKER_TYPES)
def test_a_template_is_one_that_prefect_knows(kind: str) -> None:
    ours, of_prefect = template(kind), shipped(kind)
    Draft202012Validator.check_schema(ours["variables"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used == set(ours["variables"]["properties"])
    beyond = {"container_create_kwargs"}  # newer than the list that Prefect's server comes with
    assert set(ours["job_configuration"]) - beyond <= set(of_prefect["job_configuration"])
    for name in set(ours["variables"]["properties"]) & set(of_prefect["variables"]["properties"]):
        assert ours["variables"]["properties"][name]["type"] == of_prefect["variables"]["properties"][name]["type"]


def test_docker_runs_the_image_over_the_clone_with_a_gpu() -> None:
    job = rendered("docker")
    assert (job["image"], job["command"]) == ("alignti:0.1", "prefect flow-run execute")
    assert job["volumes"] == ["/srv/alignti:/alignti"]
    assert job["env"]["ALIGNTI_ROOT"] == "/alignti" and job["env"]["ALIGNTI_TRACKING_URI"].startswith("http://")
    assert job["container_create_kwargs"] == {
        "device_requests": [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}],
        "shm_size": "8g",
    }
    assert not job.get("privileged")
    assert rendered("docker", gpus=0)["container_create_kwargs"]["device_requests"][0]["Count"] == 0


def test_kubernetes_runs_the_image_over_the_clone_with_a_gpu_and_few_rights() -> None:
    job = rendered("kubernetes", gpus="4")
    spec = job["job_manifest"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["image"], container["args"]) == ("registry.example/alignti:0.1", "prefect flow-run execute")
    assert container["env"]["ALIGNTI_ROOT"] == container["workingDir"] == "/alignti"
    assert container["envFrom"] == [{"secretRef": {"name": "alignti", "optional": True}}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/alignti"]]["persistentVolumeClaim"] == {"claimName": "alignti"}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # trying again is the flow's to decide
    assert pod["terminationGracePeriodSeconds"] == 120


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, its arguments), lines joined and comments left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_image_installs_what_is_pinned_and_runs_as_nobody_special() -> None:
    steps = dockerfile()
    assert {name for name, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "ENTRYPOINT"}
    assert re.fullmatch(r"\S+:\d+\.\d+\S*", dict(steps)["FROM"])  # no `latest`
    copied = next(words for name, words in steps if name == "COPY").split()[:-1]
    passed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == passed and all((ROOT / file).exists() for file in copied)
    install = next(words for name, words in steps if name == "RUN" and "pip install" in words)
    assert install.count("--constraint constraints.txt") == install.count("pip install")
    extras = dict(steps)["ARG"].partition("=")[2].split(",")
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(declared)
    assert set(dict(steps)["ENV"].split()) >= {f"{name}={value}" for name, value in QUIET.items()}
    assert dict(steps)["USER"] == "alignti" and json.loads(dict(steps)["ENTRYPOINT"])[0] == "tini"


def slurm(tmp_path: Path, alignti: str, **environment: str) -> subprocess.Popen[str]:
    """The batch script as Slurm starts it, with `alignti` a script of this text."""
    command = tmp_path / ".venv/bin/alignti"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!/bin/bash\n{alignti}\n")
    command.chmod(0o755)
    return subprocess.Popen(
        ["bash", str(SLURM)],
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def servers(tmp_path: Path) -> dict[str, str]:
    return {"ALIGNTI_ROOT": str(tmp_path), "PREFECT_API_URL": "http://h:4200/api", "ALIGNTI_TRACKING_URI": "http://h:5000"}


def test_slurm_starts_workers_in_the_clone_and_ends_with_their_exit_code(tmp_path: Path) -> None:
    output, _ = slurm(
        tmp_path, 'echo "$PWD $* $OMP_NUM_THREADS"; exit 3', **servers(tmp_path), SLURM_CPUS_PER_TASK="8"
    ).communicate()
    assert output == f"{tmp_path} worker 8\n"


def test_each_element_of_an_array_works_in_a_clone_of_its_own(tmp_path: Path) -> None:
    environment = {**servers(tmp_path), "ALIGNTI_ROOT": str(tmp_path / "clone"), "SLURM_ARRAY_TASK_ID": "3"}
    output, _ = slurm(tmp_path / "clone-3", 'echo "$PWD"', **environment).communicate()
    assert output == f"{tmp_path}/clone-3\n"


def test_slurm_passes_the_end_of_its_time_on_and_waits_for_the_workers(tmp_path: Path) -> None:
    stopping = "trap 'sleep 0.5; echo saved; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    job = slurm(tmp_path, stopping, **servers(tmp_path))
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=60)[0] == "saved\n"
    assert job.returncode == 0


@pytest.mark.parametrize("missing", ["ALIGNTI_ROOT", "PREFECT_API_URL", "ALIGNTI_TRACKING_URI"])
def test_slurm_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    job = slurm(tmp_path, "echo never", **{k: v for k, v in servers(tmp_path).items() if k != missing})
    output, error = job.communicate(timeout=60)
    assert job.returncode != 0 and output == "" and missing in error


def test_slurms_options_are_well_formed() -> None:
    options = re.findall(r"^#SBATCH (--[a-z-]+=?\S*)$", SLURM.read_text(), re.MULTILINE)
    assert len(options) == SLURM.read_text().count("#SBATCH")
    assert "--gres=gpu:1" in options and "--signal=B:TERM@180" in options


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here; apt-get install shellcheck")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", str(SLURM)], check=True)


@pytest.mark.parametrize("kind", WORKER_TYPES)
def test_prefects_own_worker_takes_the_template(kind: str) -> None:
    worker = pytest.importorskip(f"prefect_{kind}", reason=f"prefect-{kind} is only where such a pool is served").__name__
    configuration = getattr(__import__(f"{worker}.worker", fromlist=["worker"]), f"{kind.capitalize()}WorkerJobConfiguration")
    job = asyncio.run(configuration.from_template_and_values(template(kind), {"command": "prefect flow-run execute"}))
    assert job.image if kind == "docker" else job.job_manifest["spec"]["template"]["spec"]["containers"][0]["image"]
