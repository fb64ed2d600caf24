"""Several processes, on one machine or on many, that train one run together: their start, and what if one ends.

`jax.distributed` connects them, and each runs the same program on its own devices (`devices.py`). The first one,
process 0, alone writes. A process that ends, for whatever reason, ends the others: none could go on without it.
"""

import contextlib
import functools
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from dvrl_jax.errors import ConfigError, DiscoveryError, RunError
from dvrl_jax.runs import command_line, process

LOST = 3  # Exit code of a process that ends because another one has ended.

# Names of environment variables; the first is JAX's own.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

START_SECONDS = 300  # In which all processes must have started.
HEARTBEAT_SECONDS = 300  # After which JAX itself aborts all processes, if one neither ends nor answers.
WATCH_SECONDS = 5  # In which `_Watch` knows of a process that has ended, once a collective operation has failed.
# Of a connection on which nothing is sent: after 10 s a probe, then every 5 s, and lost after 3 without an answer.
KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

# What to do before a process ends because another one has; each returns what to say of that, after the sentence.
clean_ups: list[Callable[[], str]] = []


def launch(number: int) -> int:
    """Starts this process's command `number` times on this machine, as processes that train together.

    Each has its share of the cores. Waits for all of them, and passes on the signals that stop them. Returns 0 if all
    do, else their lowest exit code besides; of one that a signal has killed it is 128 + signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {COORDINATOR: f"127.0.0.1:{free.getsockname()[1]}", NUM_PROCESSES: str(number)}
    cores, started = sorted(os.sched_getaffinity(0)), []

    def pass_on(signum: int, frame: Any) -> None:
        for child in started:
            child.send_signal(signum)

    with process.answering(pass_on):
        for place in range(number):
            own = cores[place * len(cores) // number : (place + 1) * len(cores) // number] or cores
            started.append(
                subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]],
                    env=os.environ | together | {PROCESS_ID: str(place)},
                    preexec_fn=functools.partial(os.sched_setaffinity, 0, own),
                )
            )
        codes = [child.wait() for child in started]
    return min((code if code > 0 else 128 - code for code in codes if code), default=0)


def is_one_of_several(distributed: bool) -> bool:
    """Whether this process trains with others: it is told so by a flag, or by the environment (`launch`)."""
    return distributed or NUM_PROCESSES in os.environ


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[None]:
    """Within it this process is connected with the others, if it `is_one_of_several`; only the first one prints.

    It begins before JAX's first computation. Where the environment does not say it (COORDINATOR, NUM_PROCESSES,
    PROCESS_ID), JAX finds out about the others from SLURM or Open MPI.

    What goes wrong within it ends this process here, with a sentence if the user can fix it; so does waiting in vain
    for the others.

    Raises:
        ConfigError: the environment says nothing, or no numbers.
    """
    if not is_one_of_several(distributed):
        yield
        return
    import jax

    together = _connect(jax)
    if together.process_id:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    watch = _Watch(together)
    try:
        yield
    except (ConfigError, DiscoveryError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        watch.end_others()
        os._exit(command_line.USAGE_ERROR)  # `sys.exit` would have JAX wait for the others.
    except Exception:
        time.sleep(WATCH_SECONDS)  # Another process may have ended: then the watch says so.
        traceback.print_exc()
        watch.end_others()
        os._exit(1)
    watch.is_over = True
    jax.distributed.shutdown()  # Waits until all are here.


def _connect(jax: Any) -> Any:
    """Connects this process. Returns JAX's record of that: process_id, num_processes, client, coordinator_address."""
    from jax._src import distributed

    given = {}
    for variable, argument in ((NUM_PROCESSES, "num_processes"), (PROCESS_ID, "process_id")):
        if (text := os.environ.get(variable)) is not None:
            if not text.isdecimal():
                raise ConfigError(f"{variable} = {text!r}: must be a whole number")
            given[argument] = int(text)
    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM; `training` has its own answer.
    late = threading.Timer(START_SECONDS, _give_up)
    late.daemon = True
    late.start()
    try:
        with process.leaving(lambda: "before all processes had come"):
            jax.distributed.initialize(
                **given,
                initialization_timeout=2 * START_SECONDS,  # After which JAX would abort.
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, IndexError):
        said = f"{COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}: must all be set, where neither SLURM nor Open MPI is"
        raise ConfigError(f"{said}, as HOST:PORT and numbers, {PROCESS_ID} from 0 on") from None
    finally:
        late.cancel()
    return distributed.global_state


def _give_up() -> None:
    said = f"not all processes of this run have come within {START_SECONDS} s; each needs the same {COORDINATOR}"
    os.write(2, f"error: {said}, and must reach it\n".encode())
    os._exit(command_line.USAGE_ERROR)


class _Watch:
    """Ends this process when another one has ended, with a sentence that says which.

    Process 0 has a connection with each of the others. The system closes it when a process ends, however it does, and
    probes find a machine that is gone. JAX's own heartbeats find that too, later, and then abort without saying which.

    Attributes:
        is_over: training is over, and whoever ends now may.
    """

    KEY = "dvrl_jax/watch"  # In JAX's store: port, and what to say there first.
    SAYS_WHY = "it says why"

    def __init__(self, together: Any):
        self.is_over, self._selector = False, selectors.DefaultSelector()
        me, number, client = together.process_id, together.num_processes, together.client
        name = lambda place, host: f"process {place} of {number}, on {host},"
        self._name, self._is_first = name(me, socket.gethostname()), me == 0
        if me == 0:
            with _listen() as server:
                token = secrets.token_hex(8)
                client.key_value_set(self.KEY, f"{server.getsockname()[1]} {token}")
                while len(self._selector.get_map()) < number - 1:
                    other, _ = server.accept()
                    said = other.makefile().readline().split()
                    if len(said) == 3 and said[0] == token:
                        self._add(other, name(*said[1:]))
        else:
            host = together.coordinator_address.rpartition(":")[0].strip("[]")
            port, token = client.blocking_key_value_get(self.KEY, 1000 * START_SECONDS).split()
            first = socket.create_connection((host, int(port)), timeout=START_SECONDS)
            first.sendall(f"{token} {me} {socket.gethostname()}\n".encode())
            self._add(first, name(0, host))
        threading.Thread(target=self._follow, daemon=True).start()

    def _add(self, other: socket.socket, name: str) -> None:
        other.settimeout(None)
        for option, value in KEEPALIVE.items():
            level = socket.SOL_SOCKET if option.startswith("SO_") else socket.IPPROTO_TCP
            other.setsockopt(level, getattr(socket, option), value)
        self._selector.register(other, selectors.EVENT_READ, name)

    def _follow(self) -> None:
        while True:
            for key, _ in self._selector.select():
                try:
                    said = key.fileobj.recv(1000)
                except OSError:
                    said = b""
                if self.is_over:
                    return
                self._leave(said.decode() or f"{key.data} has ended, and with it the run")

    def _leave(self, why: str) -> None:
        ends = [clean_up() for clean_up in clean_ups]
        if not ends and not why.endswith(self.SAYS_WHY):
            ends = ["the same command, on as many processes as you like, resumes from the newest checkpoint"]
        with contextlib.suppress(OSError):
            os.write(2, f"error: {'; '.join([why, *ends])}\n".encode())
        self._end_others(why)
        os._exit(LOST)

    def end_others(self) -> None:
        """Ends the others before this process ends for a reason of its own, which it has said."""
        self.is_over = True
        self._end_others(f"{self._name} has ended, and with it the run; {self.SAYS_WHY}")

    def _end_others(self, why: str) -> None:
        for key in self._selector.get_map().values():
            with contextlib.suppress(OSError):
                key.fileobj.sendall(why.encode())
        if self._is_first:
            time.sleep(1)  # In which they leave: JAX aborts them once process 0 is gone.


def _listen() -> socket.socket:
    """A server on any free port."""
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    server = socket.create_server(("", 0), **both)
    server.settimeout(START_SECONDS)
    return server
