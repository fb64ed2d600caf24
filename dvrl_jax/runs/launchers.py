"""Experiments as jobs of this machine or of a SLURM cluster, through submitit, and who trains what in a shared folder.

    jobs/<experiment>/.lock          held while somebody trains the experiment, on whatever machine
    jobs/<experiment>/job.json       the newest job: launcher, id and log
    jobs/<experiment>/exit_code      how that job ended, if it lived to tell
    jobs/<experiment>/<id>_*         what submitit keeps of a job: its log (<id>_0_log.out), and itself pickled

Nothing is unpickled here. submitit does so in the job, with what it has pickled itself.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from dvrl_jax.errors import RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import process as process_lib
from dvrl_jax.runs import run_directory

HOME = Path(__file__).resolve().parents[2]  # What holds the package: jobs find it there, installed or not.
INSTALL = "pip install 'dvrl-jax[slurm]'"
MINUTE = 60

# What `--slurm` may set, and its type. submitit knows the first ones for every cluster.
SHARED_SETTINGS = {"cpus_per_task": int, "gpus_per_node": int, "mem_gb": int, "timeout_min": int}
SLURM_SETTINGS = dict.fromkeys(("account", "constraint", "exclude", "gres", "nodelist", "partition", "qos"), str)
SLURM_SETTINGS["signal_delay_s"] = int
SETTINGS = SHARED_SETTINGS | SLURM_SETTINGS
DEFAULTS = {"timeout_min": 24 * MINUTE}
MAX_REQUEUES = 100  # Of a job at its time limit; every one continues the run.

# The state of a job in SLURM's queue, by what `squeue` calls it; any other has ended, or is about to run.
QUEUE = {"PENDING": "queued", "RUNNING": "running", "COMPLETING": "running", "UNKNOWN": "unknown"}
TO_COME = ("running", "queued", "unknown")  # States in which an experiment has a job already.


# --- Processes -------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], keep_open: Sequence[int] = ()) -> int:
    """Runs a command in a process of its own, which is sent the signals that stop this one; its exit code.

    `keep_open` are file descriptors that it inherits, such as a lock that is to last as long as it does.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def hand_on(signum: int, frame) -> None:
        del frame
        received.append(signum)
        if process is not None:
            process.send_signal(signum)

    with process_lib.answering(hand_on):
        # In a session of its own: else a terminal's Ctrl-C would reach it twice.
        process = subprocess.Popen(command, cwd=HOME, start_new_session=True, pass_fds=keep_open)
        for signum in received:  # Came before there was a process.
            process.send_signal(signum)
        return process.wait()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[int | None]:
    """Within it, no other process trains an experiment. The lock's file descriptor, or None if another one trains it.

    A process that inherits the descriptor keeps the lock to its own end.

    Raises:
        RunError: the folder, jobs/<experiment>, cannot be written or locked.
    """
    with run_directory.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    with lock:
        # `is_claimed` holds it for a moment too.
        yield lock.fileno() if any(_lock(lock) or time.sleep(0.1) for _ in range(5)) else None


def is_claimed(folder: Path) -> bool:
    """Whether a process trains this experiment now. Raises RunError as `claim`."""
    if not (folder / ".lock").exists():
        return False
    with run_directory.reading(folder), open(folder / ".lock", "a") as lock:
        return not _lock(lock)


def _lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(f"{file.name}: cannot be locked ({error.strerror}), which keeps two runs apart") from None
    return True


# --- Jobs ------------------------------------------------------------------------------------------------------------


class Job:
    """What a job does: it runs `command` and leaves the exit code in `folder`. submitit pickles it and calls it."""

    def __init__(self, folder: Path, command: Sequence[str]):
        self.folder, self.command = folder, command

    def __call__(self) -> None:
        (self.folder / "exit_code").unlink(missing_ok=True)  # Of the time before it was queued again.
        code = run(self.command)
        run_directory.replace(self.folder / "exit_code", f"{code}\n")
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Has the command save and stop, and returns what is queued again. submitit calls it at the time limit."""
        signal.raise_signal(signal.SIGTERM)  # `run` hands it on.
        with contextlib.suppress(ChildProcessError):  # Without taking the exit code from who waits in `run`.
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return import_submitit("slurm").helpers.DelayedSubmission(self)


def import_submitit(launcher: str) -> Any:
    """The submitit package.

    Raises:
        RunError: it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise RunError(f"--launcher={launcher}: needs the extra 'slurm' ({INSTALL})") from None
    return submitit


def parse_settings(arguments: Iterable[str]) -> dict[str, Any]:
    """Settings of SLURM, given as name=value, with submitit's names for them.

    Raises:
        RunError: one is unknown, or of another type.
    """
    found = dict(DEFAULTS)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in SETTINGS:
            close = config_lib.suggestion(name, SETTINGS)
            raise RunError(f"--slurm: there is no setting {name!r}{close} (settings are {', '.join(SETTINGS)})")
        is_number = SETTINGS[name] is int
        if not value or (is_number and not value.isdecimal()):
            raise RunError(f"--slurm: {argument!r} must be {name}={'<whole number>' if is_number else '<value>'}")
        found[name if name in SHARED_SETTINGS else f"slurm_{name}"] = SETTINGS[name](value)
    return found


def submit(launcher: str, folder: Path, name: str, command: Sequence[str], settings: dict[str, Any]) -> Any:
    """Makes `command` a job and writes job.json into its folder, jobs/<experiment>. Returns submitit's job.

    Raises:
        RunError: submitit is missing, the cluster refuses the job, or the folder cannot be written.
    """
    submitit = import_submitit(launcher)
    if launcher == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise RunError("--launcher=slurm: there is no sbatch or no srun; start it on a machine of the cluster")
    if launcher == "local":
        # submitit would hide the GPUs, and end the job after two minutes.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = ["-u", "CUDA_VISIBLE_DEVICES"] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"]
        command, settings = ["env", *hidden, *command], {"timeout_min": 366 * 24 * MINUTE}
    paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    with run_directory.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "exit_code").unlink(missing_ok=True)
        executor = submitit.AutoExecutor(folder, cluster=launcher, slurm_max_num_timeout=MAX_REQUEUES)
        executor.update_parameters(name=name, stderr_to_stdout=True, **settings)
        try:
            # A terminal's signals go to the launcher alone, which hands on what is meant for jobs.
            with process_lib.answering(signal.SIG_IGN):
                job = executor.submit(Job(folder, list(command)))
        except RuntimeError as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"--launcher={launcher}: the job was refused ({said[-1].strip()})") from None
    record = {"launcher": launcher, "job_id": job.job_id, "log": str(job.paths.stdout)}
    run_directory.replace(folder / "job.json", json.dumps(record) + "\n")
    return job


def follow(starts: Iterable[Any], at_once: int) -> int | None:
    """Runs local jobs, so many at a time, to their end. `starts` are functions that submit one each.

    Returns the signal that stopped it, once all jobs have saved and stopped; None without one.
    """
    received: list[int] = []
    waiting, running = list(starts), []
    with process_lib.answering(lambda signum, frame: received.append(signum)):
        told = set()
        while running or (waiting and not received):
            if received:
                for job in (job for job in running if job.job_id not in told):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(job.job_id), signal.SIGTERM)  # submitit's process of the job, which hands it on.
                    told.add(job.job_id)
            elif waiting and len(running) < at_once:
                running.append(waiting.pop(0)())
            running = [job for job in running if not job.done()]
            time.sleep(0.1)
    return received[0] if received else None


# --- The state of all jobs -------------------------------------------------------------------------------------------


class State(NamedTuple):
    """How an experiment's job is: `word` is running, queued, unknown, stopped, failed or, of none, empty. Its log."""

    word: str
    log: str


def states(folders: Iterable[Path]) -> dict[Path, State]:
    """The state by folder, jobs/<experiment>.

    Raises:
        RunError: a file of theirs cannot be read.
    """
    records = {folder: _record(folder) for folder in folders}
    queue = _queue([record["job_id"] for record in records.values() if record.get("launcher") == "slurm"])
    return {folder: State(_word(folder, record, queue), record.get("log", "")) for folder, record in records.items()}


def _record(folder: Path) -> dict[str, str]:
    path = folder / "job.json"
    with run_directory.reading(path):
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_text())
            return {name: record[name] for name in ("launcher", "job_id", "log")}
        except (ValueError, TypeError, KeyError):
            raise RunError(f"{path}: is damaged; remove it, and the experiment can be launched again") from None


def _word(folder: Path, record: dict[str, str], queue: dict[str, str]) -> str:
    if is_claimed(folder):
        return "running"
    if not record:
        return ""
    with run_directory.reading(folder):
        ended = (folder / "exit_code").read_text().strip() if (folder / "exit_code").exists() else None
    if ended is not None:
        stops = {str(code) for number in process_lib.STOPPING for code in (-number, 128 + number)}
        return "stopped" if ended in stops else "" if ended == "0" else "failed"
    if record["job_id"] in queue:
        return QUEUE.get(queue[record["job_id"]], "queued")
    return "stopped"


def _queue(ids: list[str]) -> dict[str, str]:
    """What SLURM says of those of its jobs that have not ended, by id; UNKNOWN of all if it cannot be asked."""
    if not ids:
        return {}
    unknown = dict.fromkeys(ids, "UNKNOWN")
    if shutil.which("squeue") is None:
        return unknown
    command = ["squeue", "--noheader", "--format=%i %T", f"--jobs={','.join(ids)}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode and "Invalid job id" not in answer.stderr:  # It says that of a single one long gone.
        return unknown
    return dict(line.split()[:2] for line in answer.stdout.splitlines())
