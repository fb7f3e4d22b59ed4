"""What is launched: experiments and sweeps, checked before anything runs; scripts and manifests."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import runs
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from scjax.cli.main import main
from scjax.config import ConfigError
from scjax.launch import REQUEUE, capture, read_experiment, sweep
from scjax.launch.experiment import read_config

WORDS = ["experiments/pretrain.py", "--config=tests/tiny_config.py", "--workdir=runs/x y"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def experiment():
    return read_experiment([*WORDS, "--config.train.steps=7"])


def launch(*words, experiment=WORDS):
    return main(["launch", *words, "--", *experiment])


# -------------------------------------------------------------------- experiments and sweeps
def test_an_experiment_is_its_script_and_flags(experiment):
    assert experiment.workdir == "runs/x y" and experiment.name == "x y"
    assert experiment.command("py") == ["py", WORDS[0], WORDS[1], "--config.train.steps=7"]
    assert read_experiment([WORDS[0], "--workdir", "w", "--workdir=v"]).workdir == "v"  # as absl takes it
    assert read_config(experiment.flags).train.steps == 7
    [point] = sweep(experiment, [])
    assert point.name == "" and point.flags == ["--workdir=runs/x y"]


@pytest.mark.parametrize(
    "words, error, message",
    [
        ([], ConfigError, "after -- goes the experiment"),
        (["--config=x"], ConfigError, "after -- goes the experiment"),
        (["experiments/pretran.py"], FileNotFoundError, "did you mean 'experiments/pretrain.py'"),
        (WORDS[:2], ConfigError, "has no --workdir"),
        ([*WORDS[:2], "--workdir=gs://lab/x"], ConfigError, "gs://lab/x is a URL, .* a path; mount"),
        ([WORDS[0], "--config=configs/scgtp.py:smoke", WORDS[2]], FileNotFoundError, "'configs/scgpt.py'"),
        ([*WORDS, "--config.train.step=5"], ConfigError, "train.step; did you mean 'config.train.steps'"),
        ([*WORDS, "--config.validation.probe_group=x"], ConfigError, "must be written into the file"),
        ([*WORDS, "--config.train.steps=many"], ConfigError, "--config.train.steps=many: .*invalid"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_told_at_once(words, error, message):
    with pytest.raises(error, match=message):
        read_experiment(words)


def test_a_sweep_is_a_grid(experiment):
    points = sweep(experiment, ["config.optimizer.learning_rate=1e-4,3e-4", "config.seed=0,1"])
    assert [p.name for p in points] == [
        "learning_rate=1e-4,seed=0",
        "learning_rate=1e-4,seed=1",
        "learning_rate=3e-4,seed=0",
        "learning_rate=3e-4,seed=1",
    ]
    assert points[2].flags == [
        "--config.optimizer.learning_rate=3e-4",
        "--config.seed=0",
        "--workdir=runs/x y/learning_rate=3e-4,seed=0",
    ]
    assert read_config([*experiment.flags, *points[2].overrides]).optimizer.learning_rate == 3e-4


def test_values_of_a_sweep_may_hold_commas_and_slashes(experiment):
    points = sweep(experiment, ["config.data.corpus='a/b,c',d/e"])
    assert [p.name for p in points] == ["corpus=a-b-c", "corpus=d-e"]
    assert points[0].overrides == ("--config.data.corpus='a/b,c'",)
    points = sweep(experiment, ["config.data.batch_size=8,16", "config.validation.batch_size=8,16"])
    assert points[0].name == "data.batch_size=8,validation.batch_size=8"


@pytest.mark.parametrize(
    "fields, message",
    [
        (["config.optimizer.learning_rte=1"], "did you mean 'config.optimizer.learning_rate'"),
        (["config.train.steps=5,1.5"], "--config.train.steps=1.5"),
        (["optimizer.learning_rate=1"], "begin with config."),
        (["config.seed"], "give values"),
        (["config.seed="], "give values"),
        (["config.seed=1,,2"], "give values"),
        (["config.seed=1", "config.seed=2"], "there twice"),
        (["config.seed=1,1"], "several runs would go to"),
    ],
)
def test_a_sweep_that_cannot_be_is_told_at_once(experiment, fields, message):
    with pytest.raises(ConfigError, match=message):
        sweep(experiment, fields)


# ----------------------------------------------------------------------------------- slurm
def script_of(capsys, *words, experiment=WORDS):
    assert launch("slurm", "--dry-run", *words, experiment=experiment) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


def test_a_batch_script(capsys):
    script = script_of(
        capsys, "--nodes=2", "--gpus=8", "--cpus=4", "--time=1:00:00", "--sbatch=--partition=gpu"
    )
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    wanted = "nodes=2 ntasks-per-node=1 gpus-per-node=8 cpus-per-task=4 time=1:00:00 partition=gpu requeue"
    assert set(wanted.split()) < options
    assert "signal=TERM@120" in options  # of the steps, not of the batch shell
    assert f'output="{runs.ROOT}/runs/x y/launch/%j.out"' in options
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in script
    assert "JAX_LOCAL" not in script_of(capsys, "--gpus=8", "--tasks=8")
    assert not (runs.ROOT / "runs" / "x y").exists()


def answers(tmp_path, script, *, code, state="RUNNING", ping=0, array="", squeue=0):
    """What the script does when the run ends with ``code``: with commands in the place of Slurm's that
    answer as Slurm does (tests/test_slurm.py has the real one). ``array``: the id of the job array of which
    this is the task that has the same id; ``squeue``: how often that fails first."""
    done = tmp_path / "done"
    done.unlink(missing_ok=True)
    (tmp_path / "fails").write_text(squeue * "once more\n")
    for name, body in {
        "srun": f"case $* in *overlap*) exit {ping} ;; esac\n"
        f'printf "%s\\n" "$@" >{tmp_path}/words\nexit {code}',
        "squeue": f"[ ! -s {tmp_path}/fails ] || {{ sed -i 1d {tmp_path}/fails; exit 1; }}\necho {state}\n"
        f'case $* in *"-j {array or "none"} "*) echo {state} ;; esac',  # another task of the array
        "scontrol": f'echo "$@" >{done}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
    environment["SCJAX_POLL"] = "0"
    if array:
        environment |= {"SLURM_JOB_ID": array, "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "1"}
    ended = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment)
    return ended.returncode, done.read_text().strip() if done.exists() else "", ended.stdout


def test_what_the_batch_script_does_when_the_run_ends(capsys, tmp_path):
    there = tmp_path / "a run"
    (there / "launch").mkdir(parents=True)
    script = script_of(capsys, "--restarts=2", experiment=[*WORDS[:2], f"--workdir={there}"])
    requeued = "requeue 12"
    assert answers(tmp_path, script, code=0)[:2] == (0, "")
    assert answers(tmp_path, script, code=1)[:2] == (1, "")  # an error of the run
    assert answers(tmp_path, script, code=REQUEUE)[:2] == (REQUEUE, requeued)
    assert answers(tmp_path, script, code=REQUEUE, state="COMPLETING")[:2] == (REQUEUE, "")  # cancelled
    assert answers(tmp_path, script, code=REQUEUE, squeue=99)[:2] == (REQUEUE, requeued)  # who knows
    assert answers(tmp_path, script, code=REQUEUE, squeue=1, state="COMPLETING")[:2] == (REQUEUE, "")
    code, did, said = answers(tmp_path, script, code=1, ping=1)
    assert (code, did) == (1, requeued) and "a node does not answer" in said
    for crash in range(3):  # killed: so many times, and no more
        assert answers(tmp_path, script, code=137)[:2] == (137, requeued if crash < 2 else "")
    assert answers(tmp_path, script, code=REQUEUE)[:2] == (REQUEUE, requeued)  # has no limit


def test_a_sweep_is_a_job_array(capsys, tmp_path):
    script = script_of(capsys, "--sweep=config.seed=0,1,2", "--at-once=2", "--python=/my py")
    assert "#SBATCH --array=0-2%2\n" in script and "launch/%A_%a.out" in script
    answers(tmp_path, script, code=0, array="12")
    words = (tmp_path / "words").read_text().splitlines()
    assert words[-5:] == [
        "/my py",
        "experiments/pretrain.py",
        "--config=tests/tiny_config.py",
        "--config.seed=1",
        "--workdir=runs/x y/seed=1",
    ]


def test_a_task_of_a_job_array_goes_back_to_the_queue_alone(capsys, tmp_path):
    """Also the one whose id is that of the array."""
    there = tmp_path / "a run"
    (there / "launch").mkdir(parents=True)
    experiment = [*WORDS[:2], f"--workdir={there}"]
    script = script_of(capsys, "--sweep=config.seed=0,1", "--restarts=1", experiment=experiment)
    given = {"array": "12"}
    assert answers(tmp_path, script, code=REQUEUE, **given)[:2] == (REQUEUE, "requeue 12_1")
    assert answers(tmp_path, script, code=REQUEUE, state="COMPLETING", **given)[:2] == (REQUEUE, "")
    assert answers(tmp_path, script, code=REQUEUE, squeue=99, **given)[:2] == (REQUEUE, "requeue 12_1")
    for did in ("requeue 12_1", ""):
        assert answers(tmp_path, script, code=137, **given)[:2] == (137, did)
    assert [file.name for file in (there / "launch").iterdir()] == ["crashes.12_1"]


def test_slurm_that_is_not_there_is_told(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("slurm") == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert launch("k8s", "--image=i") == 2
    assert "no kubectl on this machine" in capsys.readouterr().err
    assert launch("tpu", "--accelerator=a", "--zone=z", "--runtime=r") == 2
    assert "no gcloud on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["slurm", "--nodes=0"], "--nodes is 0"),
        (["slurm", "--at-once=0"], "--at-once is 0"),
        (["slurm", "--gpus=8", "--tasks=2"], "--tasks 2 with --gpus 8"),
        (["slurm", "--time=soon"], "--time soon"),
        (["slurm", "--env=A"], "--env A: NAME=VALUE"),
        (["k8s", "--image=i", "--claim=runs"], "--claim runs: NAME=VALUE"),
        (["local", "--processes=0"], "--processes and --gpus must be at least 1"),
        (["slurm", "--sweep=config.sed=1"], "did you mean 'config.seed'"),
    ],
)
def test_bad_options_are_one_line(words, message, capsys):
    assert launch(*words, "--dry-run") == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------ kubernetes
def jobsets(capsys, *words):
    assert launch("k8s", "--dry-run", "--image=repo/scjax:1", *words) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    for document in documents:
        known = JobsetV1alpha2JobSet.from_dict(document)
        assert known.to_dict() == document  # a field that the schema lacks would be gone
    return documents


def test_a_jobset_keeps_to_the_published_schema(capsys):
    [job] = jobsets(
        capsys,
        "--nodes=4",
        "--gpus=8",
        "--claim=runs=/mnt/runs",
        "--resource=memory=120Gi",
        "--selector=cloud.google.com/gke-accelerator=nvidia-h100-80gb",
        "--env=A=it's: 5",
        "--namespace=lab",
        "--directory=/work",
    )
    [replicated] = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 4 and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    name = job["metadata"]["name"]
    # pod 0 of job 0, by the name that the JobSet's service gives it
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{replicated['name']}-0-0.{name}:")
    assert variables["JAX_NUM_PROCESSES"] == "4" and variables["A"] == "it's: 5"
    assert container["command"][1:] == WORDS and container["workingDir"] == "/work"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "120Gi"}
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    # leaving with 75 or being taken away by Kubernetes costs no restart, anything else does
    [saved, lost] = spec["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"]["values"] == [REQUEUE] and pod["restartPolicy"] == "Never"
    assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    [rule] = job["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_one_pod_is_a_run_by_itself(capsys):
    """Though Kubernetes gives it the index of an indexed job: JAX must not ask the cluster for the others."""
    [job] = jobsets(capsys)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    host, _, _ = variables["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert host == "x-y-run-0-0.x-y" and variables["JAX_NUM_PROCESSES"] == "1"
    given = variables | {  # and what Kubernetes makes of it
        "JAX_COORDINATOR_ADDRESS": f"localhost:{runs.free_port()}",
        "JAX_PROCESS_ID": "0",
        "JOB_COMPLETION_INDEX": "0",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JAX_PLATFORMS": "cpu",
    }
    code = "from scjax.parallel.processes import distributed_start; print(distributed_start())"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout == "(0, 1)\n", ended.stderr


def test_a_sweep_is_a_jobset_for_each_run(capsys):
    jobs = jobsets(capsys, "--sweep=config.seed=0,1", "--nodes=2")
    assert [job["metadata"]["name"] for job in jobs] == ["x-y-0", "x-y-1"]
    commands = [
        job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
        for job in jobs
    ]
    assert [command[-1] for command in commands] == ["--workdir=runs/x y/seed=0", "--workdir=runs/x y/seed=1"]


def test_names_of_pods_are_short_enough(capsys):
    experiment = [*WORDS[:2], "--workdir=runs/5_" + 30 * "Long.Name"]
    assert main(["launch", "k8s", "--image=i", "--dry-run", "--nodes=100", "--", *experiment]) == 0
    name = yaml.safe_load(capsys.readouterr().out)["metadata"]["name"]
    assert name.startswith("run-5-long-name") and len(f"{name}-run-0-99-abcde") <= 63


# ------------------------------------------------------------------------------------- tpu
GCLOUD = """#!/bin/bash
echo "$@" >>{0}/calls
state=$(cat {0}/state 2>/dev/null)
case $* in
*describe*)
    [ ! -e {0}/blind ] || {{ rm {0}/blind; echo "ERROR: (gcloud) UNAVAILABLE: try again" >&2; exit 1; }}
    [ -n "$state" ] || {{ echo "ERROR: (gcloud) NOT_FOUND: Resource 'x-y' was not found" >&2; exit 1; }}
    echo "$state" ;;
*create*) echo ACTIVE >{0}/state ;;
*delete*) rm {0}/state ;;
*ssh*)
    command=${{7#--command=}}
    [[ $command == *status* ]] || exit 0
    code=$(head -1 {0}/codes); sed -i 1d {0}/codes
    [ "$code" != taken ] || {{ echo SUSPENDED >{0}/state; exit 0; }}
    [ "$code" != blind ] || {{ touch {0}/blind; code=1; }}
    echo "on two machines: scjax exit status $code"; echo "scjax exit status ${{code/70/75}}"
    ;;
esac
"""


def pod(capsys, tmp_path, codes, *words):
    """Runs the script against a gcloud that plays a pod of two machines; exit status, calls, output."""
    assert launch("tpu", "--accelerator=v5litepod-16", "--zone=z", "--runtime=r", "--dry-run", *words) == 0
    script = capsys.readouterr().out
    (tmp_path / "gcloud").write_text(GCLOUD.format(tmp_path))
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "codes").write_text("\n".join(codes) + "\n")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SCJAX_POLL": "0"}
    ended = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env=environment, timeout=60
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    return ended.returncode, [c for c in calls if "describe" not in c], ended.stdout + ended.stderr


def test_a_pod_is_asked_for_again_until_the_run_is_done(capsys, tmp_path):
    setup = "--setup=git clone here && cd 'it'"
    code, calls, said = pod(capsys, tmp_path, ["75", "taken", "75", "0"], "--spot", setup)
    assert code == 0, said
    verbs = [next(verb for verb in ("create", "delete", "ssh") if verb in call.split()) for call in calls]
    # made ready, run, saved itself, run, taken; asked for, made ready, run, saved itself, run, given back
    assert verbs == ["create", *3 * ["ssh"], "delete", "create", *3 * ["ssh"], "delete"]
    assert calls[0].endswith("--accelerator-type=v5litepod-16 --runtime-version=r --spot --zone=z")
    assert "--worker=all" in calls[1] and "git clone here && cd 'it'" in calls[1]
    assert "SCJAX_CLUSTER=1" in calls[2] and "'--workdir=runs/x y'" in calls[2]
    assert "the run saved itself" in said and "the pod was taken" in said


def test_a_run_that_fails_on_a_pod_is_not_started_for_ever(capsys, tmp_path):
    code, calls, said = pod(capsys, tmp_path, 5 * ["1"], "--restarts=2")
    assert code == 1 and sum("ssh" in call for call in calls) == 1 + 3
    assert "still ours" in said and not any("delete" in call for call in calls)


def test_a_gcloud_that_fails_tells_nothing_of_the_pod(capsys, tmp_path):
    """Here when it is asked why the run ended: the pod was not taken, and the run that failed is counted."""
    code, calls, said = pod(capsys, tmp_path, ["blind", "1", "0"], "--restarts=1")
    assert code == 1 and sum("create" in call for call in calls) == 1 and "taken" not in said
    assert "asked again: ERROR: (gcloud) UNAVAILABLE" in said and "still ours" in said


def test_a_gcloud_that_fails_at_once_is_heard(capsys, tmp_path):
    (tmp_path / "blind").touch()
    code, calls, said = pod(capsys, tmp_path, ["0"])
    assert code == 1 and calls == [] and said == "ERROR: (gcloud) UNAVAILABLE: try again\n"


def test_the_help_for_pods_says_where_runs_go(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "tpu", "--help"])
    assert "--workdir must be a path that all machines of the pod share" in capsys.readouterr().out


def test_jax_is_told_to_look_for_the_machines_of_a_pod():
    from scjax.parallel.processes import _started_by_a_cluster

    assert _started_by_a_cluster({"SCJAX_CLUSTER": "1"}) and not _started_by_a_cluster({})


def test_runs_of_a_sweep_share_a_pod(capsys, tmp_path):
    code, calls, _ = pod(capsys, tmp_path, ["0", "0"], "--sweep=config.seed=0,1")
    assert code == 0 and sum("create" in call for call in calls) == 1
    assert "seed=1" in calls[-2] and "delete" in calls[-1]


# --------------------------------------------------------------------------------- capture
def test_what_a_run_ran_on_is_kept_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_SOMETHING", "kept")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("JAX_API_KEY", "SCJAX_TOKEN", "NCCL_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hidden")
    first, second = capture(tmp_path), capture(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text) == [first, second] and "hidden" not in text
    assert first["environment"]["JAX_SOMETHING"] == "kept" and first["environment"]["SLURM_JOB_ID"] == "12"
    assert first["versions"]["jax"] and first["host"] and first["command"] == sys.orig_argv
    assert list(tmp_path.iterdir()) == [tmp_path / "environment.json"]


def test_the_state_of_the_code_is_kept(tmp_path):
    from scjax.launch.capture import git_state

    assert git_state(tmp_path) is None
    for command in (
        "git init -q",
        "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m first",
    ):
        subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert git_state(tmp_path) == {"commit": commit.strip(), "changed": []}
    (tmp_path / "new.py").write_text("")
    subprocess.run(["git", "add", "new.py"], cwd=tmp_path, check=True)
    assert git_state(tmp_path) == {"commit": commit.strip(), "changed": ["new.py"]}
