"""reproduce.py --launcher: an experiment is a job that resumes; in a shared folder nothing is trained twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dvrl_jax.commands import reproduce as reproduce_lib
from dvrl_jax.errors import RunError
from dvrl_jax.runs import experiments, launchers, run_directory

ROOT = Path(__file__).parent.parent
NAME = "hike/0.3/rnn"


def command(root, *arguments):
    return [sys.executable, "reproduce.py", f"--root={root}", f"--only={NAME}", "--seeds=1", *arguments]


def state(root):
    folder = root / "jobs" / NAME
    return launchers.states([folder])[folder]


def test_a_job_runs_and_is_stopped(tmp_path, start):
    run, folder = tmp_path / NAME / "seed0", tmp_path / "jobs" / NAME
    process = start(command(tmp_path, "--launcher=local"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = Path(process.stdout.readline().rpartition("log in ")[2].strip())
    began = time.monotonic()
    while not (log.exists() and "80 steps (" in log.read_text()):
        assert process.poll() is None and time.monotonic() - began < 200, process.communicate()
        time.sleep(0.1)
    assert state(tmp_path) == ("running", str(log))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and f"{tmp_path}: stopped; the same command goes on" in output, output
    assert "stopped by SIGTERM" in log.read_text() and state(tmp_path) == ("stopped", str(log))
    run_directory.RunDirectory(run).close()  # Nobody trains there any more.
    assert not launchers.is_claimed(folder)


def test_what_another_process_trains_is_skipped(tmp_path, capsys):
    with launchers.claim(tmp_path / "jobs" / NAME):
        assert reproduce_lib.run_all([experiments.EXPERIMENTS[NAME]], tmp_path) == []
    assert capsys.readouterr().out == f"{tmp_path / NAME}: skipped, another process is training it\n"
    assert not (tmp_path / NAME).exists()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """SLURM's commands for making and seeing jobs, of a cluster on which job 7 waits until `ended` is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    gone = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
    programs = {
        "sbatch": f'cp "$1" {folder}/script; echo "Submitted batch job 7"',
        "squeue": f'if [ -e {folder}/ended ]; then {gone}; fi; echo "7 PENDING"',
        "srun": "exit 1",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]))
    return folder


def test_the_example_makes_a_job_for_slurm(cluster, tmp_path):
    example = ["bash", "examples/slurm/reproduce.sh", f"--root={tmp_path}", f"--only={NAME}", "--seeds=2"]
    done = subprocess.run(example, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = f"{tmp_path}/jobs/{NAME}/7_0_log.out"
    assert f"{NAME}: job 7, log in {log}\n" in done.stdout
    (table,) = (line.split() for line in done.stdout.splitlines() if line.startswith(f"{NAME} "))
    assert table[:5] == [NAME, "25,000,000", "0", "0/2", "queued"] and table[-1] == log
    script = (cluster / "script").read_text()
    for option in ("partition=gpu", "gpus-per-node=1", "time=1440", "signal=USR2@90", "job-name=hike-0.3-rnn"):
        assert f"#SBATCH --{option}\n" in script
    assert state(tmp_path).word == "queued"
    (cluster / "ended").touch()
    assert state(tmp_path).word == "stopped"
    (cluster / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert state(tmp_path).word == "unknown"


def test_the_states_of_jobs(tmp_path):
    folder = tmp_path / "jobs" / NAME
    word = lambda: launchers.states([folder])[folder].word
    assert word() == ""
    with launchers.claim(folder) as lock:
        assert lock is not None and word() == "running"
        with launchers.claim(folder) as second:
            assert second is None
    (folder / "job.json").write_text('{"launcher": "local", "job_id": "1", "log": "somewhere"}')
    for code, expected in {"0": "", "2": "failed", "-9": "failed", "143": "stopped", "-15": "stopped"}.items():
        (folder / "exit_code").write_text(f"{code}\n")
        assert word() == expected
    (folder / "exit_code").unlink()
    assert launchers.states([folder])[folder] == ("stopped", "somewhere")
    (folder / "job.json").write_text('{"launcher": "local"}')
    with pytest.raises(RunError, match=r"job\.json: is damaged"):
        word()


def test_a_process_that_outlives_the_launcher_keeps_the_experiment(tmp_path):
    with launchers.claim(tmp_path) as lock:
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert launchers.is_claimed(tmp_path)
    process.communicate()
    assert not launchers.is_claimed(tmp_path)


def test_a_job_at_its_time_limit_stops_its_command_and_can_be_queued_again(tmp_path):
    """As submitit does it: the answer to a signal calls `checkpoint`, while the job waits for its command."""
    program = (
        f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/began; while :; do sleep 0.05; done"
    )
    job, again = launchers.Job(tmp_path, ["bash", "-c", program]), []

    def limit(signum, frame):
        if not (tmp_path / "began").exists():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        again.append(job.checkpoint())
        assert (tmp_path / "saved").exists()

    before = signal.signal(signal.SIGALRM, limit)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(SystemExit) as ended:
            job()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended.value.code == 143 and (tmp_path / "exit_code").read_text() == "143\n"
    assert again[0].function is job


def test_settings_of_slurm():
    given = launchers.parse_settings(["partition=gpu", "gpus_per_node=2"])
    assert given == {"timeout_min": 1440, "slurm_partition": "gpu", "gpus_per_node": 2}
    for text, said in {
        "partitions=gpu": "there is no setting 'partitions'; did you mean partition",
        "gpus_per_node=two": "must be gpus_per_node=<whole number>",
        "partition": "must be partition=<value>",
    }.items():
        with pytest.raises(RunError, match=f"^--slurm: .*{said}"):
            launchers.parse_settings([text])


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match=r"^--launcher=slurm: there is no sbatch or no srun"):
        launchers.submit("slurm", tmp_path, NAME, ["true"], {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RunError, match=r"^--launcher=local: needs the extra 'slurm' \(pip install"):
        launchers.submit("local", tmp_path, NAME, ["true"], {})
