"""Training from the outside: run directory, log lines, checkpoints, signals. The mathematics is in `a2c.py`."""

import contextlib
import math
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dvrl_jax import choices, devices, envs, memory, networks, seeds, statistics
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.learner import Learner, make_learner
from dvrl_jax.runs import compilation, hosts, loggers, loop, members, process, reporting, run_directory, waiting
from dvrl_jax.runs import config as config_lib
from dvrl_jax.train_state import TrainState
from dvrl_jax.viewing import reconstructions

# After so many updates in a row without a single step that counts, something is wrong with the environment.
MAX_UPDATES_WITHOUT_STEPS = 100


class Interrupted(Exception):
    """Training was stopped by a signal, after saving a checkpoint; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def train(
    run: run_directory.RunDirectory, config: ConfigDict, use_cache: bool = True, print_config: bool = False
) -> TrainState:
    """Trains in a run directory, from its newest checkpoint if it has one, to `config.total_env_steps`.

    With `config.num_seeds`, each seed has a directory of its own in there, which is a run like any other.
    Of several processes (`hosts.joined`) all call this, and the first alone writes.
    `use_cache` allows the persistent compilation cache; `print_config` prints also what is as by default.

    Returns the final state; of several seeds, as `seeds.stack` makes it.
    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint was saved.
        RunError: the directory's content does not fit, or too many updates in a row had to be skipped.
        ConfigError: the processes cannot share the run.
    """
    with contextlib.ExitStack() as opened:
        seeds_of_run = members.directories(run, config, opened)
        beginning = opened.enter_context(_beginning([*(directory for directory, _ in seeds_of_run), run]))
        _check_same(run, config)
        parts = [opened.enter_context(members.opened(*each)) for each in seeds_of_run]
        running = members.running(parts)
        update = int(devices.from_first(min(parts[place].latest for place in running)))
        episode_seeds = [_seed_of_episodes(part.config.seed, update) for part in parts]
        with waiting.waiting("making the environments and the weights"):
            mesh = devices.mesh(config.num_devices) if devices.are_several(config.num_devices) else None
            env = envs.make_env(config.env, config.num_envs, episode_seeds, mesh=mesh)
            learner = make_learner(config, env, choices.current().for_devices(mesh) if mesh else None)
            if (
                env.restorable or envs.find(config.env.name) is envs.Atari
            ):  # Others may act in a `reset` that is traced.
                one = memory.size_of(jax.eval_shape(learner.init, jax.random.PRNGKey(0)))
                memory.check_size(len(parts) * one)
            with compilation.cached(use_cache):  # Making weights is a program of its own, without environments in it.
                make = lambda place, seed: learner.init(jax.random.PRNGKey(seed), env.of_seed(place))
                states = jax.block_until_ready([make(*each) for each in enumerate(episode_seeds)])
        if parts[0].saver:
            parts[0].saver.check_space(states[0], env.restorable, len(parts))
        _describe(run, config, states[0], print_config)
        states = _restore(parts, running, learner, states)
        if all(int(states[place].env_steps) >= config.total_env_steps for place in running):
            done, wanted = f"{int(states[running[0]].env_steps):,}", f"{config.total_env_steps:,}"
            print(f"already finished: {done} steps done, {wanted} wanted", flush=True)
            return states[0]
        state = states[0] if len(states) == 1 else seeds.stack(states)
        if mesh:
            state = devices.put(state, devices.shardings(state, config.num_devices))
        writer = _Writer(run, config, learner, parts, env.restorable)
        program = _compile(learner, config, state, env.restorable, use_cache)
        beginning.close()
        return writer.train(program, state, running)


def _check_same(run: run_directory.RunDirectory, config: ConfigDict) -> None:
    """Raises RunError if the processes that train together have different configurations."""
    own = zlib.crc32(config_lib.to_json(config).encode())
    if int(devices.from_first(np.uint32(own))) != own:
        said = f"configured otherwise than the first one: all need the same command, and to see {run.path}"
        raise RunError(f"process {jax.process_index()} is {said}")


def _restore(
    parts: list[members.Member], running: list[int], learner: Learner, states: list[TrainState]
) -> list[TrainState]:
    """`members.restore`; of several processes the first one does it and tells the others."""
    begun = states[0]
    if jax.process_index() == 0:
        states = members.restore(parts, running, learner, states)
    if jax.process_count() == 1:
        return states
    if learner.env.restorable:
        return [devices.from_first(states[0])]
    # Each process has begun episodes of its own environments.
    others = devices.from_first(states[0]._replace(actor=(), window=()))
    return [learner.restart(others, begun.actor.env)]


def _beginning(directories: list[run_directory.RunDirectory]) -> contextlib.ExitStack:
    """Until it is closed, nothing was saved: a signal ends the process at once, and like an error leaves nothing.

    `directories`: those made, the innermost first.
    """

    def discard() -> str:
        return [directory.discard() for directory in dict.fromkeys(directories)][-1]

    def on_error(kind, error, trace) -> None:
        if kind is not None:
            discard()

    stack = contextlib.ExitStack()
    hosts.clean_ups.append(discard)
    stack.callback(hosts.clean_ups.remove, discard)
    stack.push(on_error)
    stack.enter_context(process.leaving(discard))
    return stack


def _compile(learner: Learner, config: ConfigDict, state: TrainState, restorable: bool, use_cache: bool):
    """The compiled program for `learner.run`, ready to be called.

    Ahead of the first call, so that compile time is known as such and no step is taken by it.

    Raises:
        RunError: it does not fit into memory.
    """
    # Only programs without EnvPool in them can be found again in the compilation cache.
    compiling = waiting.waiting("compiling the program of training")
    with compiling, compilation.cached(use_cache and restorable):
        run, count = learner.run, jnp.int32(1)
        if state.update.ndim:
            run, count = seeds.run(learner, config.num_seeds), state.update
        lies = devices.shardings(state, config.num_devices) if devices.are_several(config.num_devices) else None
        program = compilation.jit(run, config, use_cache, lies).lower(state, count).compile()
    compilation.check_memory(program)
    process.settle(config)
    return program


def _seed_of_episodes(seed: int, update: int) -> int:
    """The seed of what a run begins with: at first its own; of the episodes that begin when it is resumed, another."""
    if update == 0:
        return seed
    return int(np.random.SeedSequence([seed, update]).generate_state(1)[0]) % 2**31


def _describe(run: run_directory.RunDirectory, config: ConfigDict, state: TrainState, whole: bool) -> None:
    print(config_lib.describe(config, whole))
    device = jax.devices()[0]
    print(f"\nrun {run.path.name} in {run.path}")
    print(f"{networks.count_parameters(state.params):,} parameters, on {device.platform} ({device.device_kind})")
    if jax.process_count() > 1:
        print(f"{jax.process_count()} processes with {config.num_devices} device(s) each")
    print(flush=True)


class _Writer:
    """Writes log lines, checkpoints and reconstructions of a run between the calls of the compiled program."""

    def __init__(self, run, config, learner: Learner, parts: list[members.Member], with_episodes: bool):
        self.run_directory, self.config, self.members, self.with_episodes = run, config, parts, with_episodes
        self.reconstruct = reconstructions.make_reconstruct(learner.graphdef, config.log.predicted_times)
        self.start = time.monotonic()
        self.signum: int | None = None
        self.saved_at = self.start

    def train(self, program: jax.stages.Compiled, state: TrainState, running: list[int]) -> TrainState:
        compiled = time.monotonic() - self.start
        self.running = running
        now = seeds.counters(state)[running[0]]
        with process.answering(self._on_signal), contextlib.ExitStack() as opened:
            if len(self.members) > 1:
                self._begin_at(int(now.update), self.run_directory, self.config)
            for place in self._written():
                self._begin_at(int(now.update), self.members[place].directory, self.members[place].config)
            self.logs = {place: self._open_log(self.members[place], opened) for place in self._written()}
            self.progress = reporting.Progress(self.config.total_env_steps, int(now.env_steps))
            opened.enter_context(contextlib.closing(self.progress))
            self.progress.say(f"compiled in {compiled:.1f} s")
            try:
                state = self._follow(program, state)
            except loop.Stopped as stopped:
                good = "".join(f", {self.members[place].saver.last_good()}" for place in self._written()[:1])
                raise RunError(f"{self.run_directory.path}: {stopped}; nothing was saved now{good}") from None
            if signum := self._stopping():
                self._save(state)
                self._wait()
                name, update = signal.Signals(signum).name, int(seeds.counters(state)[self.running[0]].update)
                self.progress.say(f"stopped by {name}; checkpoint at update {update:,}")
                raise Interrupted(signum)
            self._wait()
            return state

    def _written(self) -> list[int]:
        """The places whose files this process writes: all that train, or, of several processes, the first one's."""
        return [] if jax.process_index() else self.running

    def _stopping(self) -> int:
        """The number of the signal that stops training, 0 without one. Of several processes any may have got it."""
        return devices.largest(self.signum or 0)

    def _open_log(self, member: members.Member, opened: contextlib.ExitStack) -> loggers.Loggers:
        return opened.enter_context(contextlib.closing(loggers.Loggers(member.directory, member.config)))

    def _begin_at(self, update: int, directory: run_directory.RunDirectory, config: ConfigDict) -> None:
        """Makes a directory ready to resume from `update`; what is refused before changes nothing in it."""
        if update == 0 and (aside := directory.set_aside()):
            said = "no checkpoint to resume from: training starts anew"
            print(f"{said}; what was measured so far is in {aside}", flush=True)
        directory.rewind_metrics(update)
        reconstructions.rewind(directory.path, update)
        directory.write_config(config_lib.to_json(config))

    def _on_signal(self, signum, frame) -> None:
        del frame
        self.signum = signum

    def _follow(self, program: jax.stages.Compiled, state: TrainState) -> TrainState:
        """Trains to the end, or until a signal came."""
        if self._stopping():
            return state
        begun = seeds.counters(state)[self.running[0]]
        moved = (int(begun.update), int(begun.env_steps))  # The latest update whose steps counted, and those then.
        intervals = (self.config.log.save_reconstruction_interval, self.config.checkpoint.interval)
        for call in loop.train(program, state, self.config, self._remaining, intervals, self.running):
            state, line = call.state, call.lines[self.running[0]]
            update, steps = line["update"], line["env_steps"]
            if steps > moved[1]:
                moved = (update, steps)
            elif update - moved[0] >= MAX_UPDATES_WITHOUT_STEPS:
                said = f"no call of step in the last {update - moved[0]} updates was `valid` (see EnvState)"
                raise RunError(f"{self.config.env.name}: {said}")
            self._write(call)
            if self._stopping():
                break
        return state

    def _remaining(self, state: TrainState) -> int:
        steps = self.config.total_env_steps - int(state.env_steps)
        return -(-steps // (self.config.num_envs * self.config.num_steps))

    def _write(self, call: loop.Call) -> None:
        update = call.lines[self.running[0]]["update"]
        if call.is_line and self._written():
            lines = {place: self._with_clock(call, place) for place in call.lines}
            for place, line in lines.items():
                self.members[place].directory.append_metrics(line)
                self.logs[place].line(line)
            if len(self.members) > 1:
                line = statistics.over_seeds(list(lines.values())) | {"obs.fps": call.steps_per_second}
                self.run_directory.append_metrics(line)
        mean = statistics.over_seeds(list(call.lines.values()))
        loss = math.nan if mean["loss.total"] is None else mean["loss.total"]
        self.progress.advance(mean["env_steps"], mean["result.true"], loss, call.is_line)
        if len(call.failures) < len(self.running):  # The last ones stop training, which says so itself.
            self._stop(call.failures)
        if not set(self.running) - set(call.failures):
            return
        every = self.config.log.save_reconstruction_interval
        if every and update % every == 0:
            self._save_reconstructions(call.state)
        if call.is_end or self._is_time_to_save(update):
            self._save(call.state)

    def _with_clock(self, call: loop.Call, place: int) -> dict[str, Any]:
        """A seed's log line with what the clock says; the speed is all seeds' together, divided by their number."""
        line = call.lines[place]
        wall_time = round(self._wall_time(self.members[place]), 3)
        first = {"update": line["update"], "env_steps": line["env_steps"], "wall_time": wall_time}
        return first | line | {"obs.fps": call.steps_per_second / len(call.lines)}

    def _stop(self, failures: dict[int, str]) -> None:
        """Seeds that stop here, while others go on: says so, also to whoever resumes."""
        for place, why in failures.items():
            member = self.members[place]
            run_directory.replace(member.directory.path / members.STOPPED, f"{why}\n")
            self.progress.say(f"seed {member.config.seed}: {why}; the others go on")
        self.running = [place for place in self.running if place not in failures]

    def _is_time_to_save(self, update: int) -> bool:
        every, minutes = self.config.checkpoint.interval, self.config.checkpoint.minutes
        waited_long = 0 < 60 * minutes <= time.monotonic() - self.saved_at
        return devices.largest(waited_long) or (every > 0 and update % every == 0)

    def _save_reconstructions(self, state: TrainState) -> None:
        for place in self.running:
            one = seeds.member(state, place)
            arrays = devices.fetch(self.reconstruct(one) | {"env_steps": one.env_steps})
            if place not in self._written():
                continue
            arrays = reconstructions.to_storage(arrays)
            reconstructions.save(self.members[place].directory.path, int(one.update), arrays)
            picture = reconstructions.picture(self.config.env, arrays)
            if picture is not None:
                self.logs[place].image("reconstructions", picture, int(one.env_steps))

    def _wall_time(self, member: members.Member) -> float:
        return member.wall_time + time.monotonic() - self.start

    def _save(self, state: TrainState) -> None:
        state = devices.fetch(state if self.with_episodes else state._replace(actor=(), window=()))
        for place in self._written():
            member, one = self.members[place], seeds.member(state, place)
            extra = {"wall_time": self._wall_time(member)}
            member.saver.save(one, self.with_episodes, one.episodes.summary()["result.true"], extra)
        self.saved_at = time.monotonic()

    def _wait(self) -> None:
        for place in self._written():
            self.members[place].saver.wait()


def prepare(workdir: Path | None, config: ConfigDict | None, overrides: dict[str, Any]):
    """Checks everything that can be checked before anything is written, then opens the run directory.

    Of several processes the first one opens it. Returns (run directory, configuration).
    """
    if config is not None:
        config = config_lib.from_fields(config_lib.flatten(config))
        if config.log.wandb:
            loggers.import_wandb()
    elif workdir is None or not run_directory.has_config(workdir):
        raise ConfigError("--config: is needed to start a new run")
    compilation.check_settings()
    is_new, several = workdir is None, jax.distributed.is_initialized()
    if several:
        compilation.check_device()
        if is_new:
            raise ConfigError("--workdir: is needed with several processes, a directory that all of them see")
    if several and jax.process_index():
        run = run_directory.OfAnother(workdir)
    else:
        run = run_directory.RunDirectory(run_directory.next_directory() if is_new else workdir, is_new)
    try:
        config = members.resolve_config(run, config, overrides)
        if several:
            devices.check(config)
    except ConfigError:
        run.discard()
        raise
    return run, config
