"""Training from the outside: run directory, log lines, checkpoints, signals. The mathematics is in `a2c.py`."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dvrl_jax import envs, memory, networks
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.learner import Learner, make_learner
from dvrl_jax.runs import checkpoints, compilation, loggers, loop, process, reporting, run_directory, waiting
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


def resolve_config(run: run_directory.RunDirectory, given: ConfigDict | None, overrides: dict[str, Any]):
    """The configuration to train with in this directory; `given`, if there is one, is finalised.

    A directory that holds a run decides itself, except for what `overrides` (explicit, by dotted name) may change.
    Prints in which other fields `given` differs; the run keeps its own.

    Raises:
        ConfigError: impossible values, or an override that contradicts the run.
    """
    config = config_lib.of_run(run.path)
    if config is None:
        return given
    wanted = overrides
    if given is not None:
        settled = config_lib.flatten(given)  # What follows from other fields was settled in the stored one too.
        # A configuration file for something else is a mistake, whatever else it sets. That comes first, since what else
        # it sets need not exist in this run.
        wanted = {field: settled[field] for field in ("algorithm", "env.name", *overrides) if field in settled}
    fields = config_lib.flatten(config)
    for field, value in wanted.items():
        if fields.get(field) != value and not config_lib.is_changeable(field):
            raise ConfigError(
                f"{field} = {value!r}: contradicts the run in {run.path}, which was started with {fields.get(field)!r}"
            )
    in_file = config_lib.flatten(given) if given is not None else {}
    differing = [field for field, value in in_file.items() if field not in wanted and fields.get(field) != value]
    if differing:
        said = ", ".join(f"{field} = {fields.get(field)!r} (in the file {in_file[field]!r})" for field in differing)
        print(f"{run.path} resumes as it began, not as the configuration file says: {said}", flush=True)
    return config_lib.from_fields(fields | {k: v for k, v in wanted.items() if k in fields})


def train(
    run: run_directory.RunDirectory, config: ConfigDict, use_cache: bool = True, print_config: bool = False
) -> TrainState:
    """Trains in a run directory, from its newest checkpoint if it has one, to `config.total_env_steps`.

    `use_cache` allows the persistent compilation cache; `print_config` prints also what is as by default.

    Returns the final state.
    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint was saved.
        RunError: the directory's content does not fit, or too many updates in a row had to be skipped.
    """
    with _beginning(run) as beginning, _open_checkpoints(run, config) as saver:
        seed = _seed_of_episodes(config.seed, saver.latest or 0)
        with waiting.waiting("making the environments and the weights"):
            env = envs.make_env(config.env, config.num_envs, seed)
            learner = make_learner(config, env)
            if (
                env.restorable or envs.find(config.env.name) is envs.Atari
            ):  # Others may act in a `reset` that is traced.
                memory.check(jax.eval_shape(learner.init, jax.random.PRNGKey(seed)))
            with compilation.cached(use_cache):  # Making weights is a program of its own, without environments in it.
                state = jax.block_until_ready(learner.init(jax.random.PRNGKey(seed)))
        saver.check_space(state, env.restorable)
        _describe(run, config, state, print_config)
        wall_time = 0.0
        restored = saver.restore(state)
        if restored is not None:
            state, wall_time = restored.state, restored.extra["wall_time"]
            if not restored.has_episodes:
                state = learner.restart(state, state.actor.env)
            print(f"resuming from update {int(state.update):,} ({int(state.env_steps):,} steps)", flush=True)
        if int(state.env_steps) >= config.total_env_steps:
            done, wanted = f"{int(state.env_steps):,}", f"{config.total_env_steps:,}"
            print(f"already finished: {done} steps done, {wanted} wanted", flush=True)
            return state
        writer = _Writer(run, config, learner, saver, env.restorable, wall_time)
        program = _compile(learner, config, state, env.restorable, use_cache)
        beginning.close()
        return writer.train(program, state)


def _beginning(run: run_directory.RunDirectory) -> contextlib.ExitStack:
    """Until it is closed, nothing was saved: a signal ends the process at once, and like an error leaves nothing."""

    def discard(kind, error, trace) -> None:
        if kind is not None:
            run.discard()

    stack = contextlib.ExitStack()
    stack.push(discard)
    stack.enter_context(process.leaving(run.discard))
    return stack


@contextlib.contextmanager
def _open_checkpoints(run: run_directory.RunDirectory, config: ConfigDict) -> Iterator[checkpoints.Checkpoints]:
    """The run's checkpoints, once it is known that JAX can train and that they can be written."""
    compilation.check_settings()
    with contextlib.closing(checkpoints.Checkpoints(run.path / "checkpoints", config.checkpoint.keep)) as saver:
        saver.try_out()
        yield saver


def _compile(learner: Learner, config: ConfigDict, state: TrainState, restorable: bool, use_cache: bool):
    """The compiled program for `learner.run`, ready to be called.

    Ahead of the first call, so that compile time is known as such and no step is taken by it.

    Raises:
        RunError: it does not fit into memory.
    """
    # Only programs without EnvPool in them can be found again in the compilation cache.
    compiling = waiting.waiting("compiling the program of training")
    with compiling, compilation.cached(use_cache and restorable):
        program = compilation.jit(learner.run, config, use_cache).lower(state, jnp.int32(1)).compile()
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
    print(flush=True)


class _Writer:
    """Writes log lines, checkpoints and reconstructions of a run between the calls of the compiled program."""

    def __init__(self, run, config, learner: Learner, saver, with_episodes: bool, wall_time: float):
        self.run_directory, self.config, self.saver, self.with_episodes = run, config, saver, with_episodes
        self.reconstruct = reconstructions.make_reconstruct(learner.graphdef, config.log.predicted_times)
        self.wall_time_before, self.start = wall_time, time.monotonic()
        self.signum: int | None = None
        self.saved_at = self.start

    def train(self, program: jax.stages.Compiled, state: TrainState) -> TrainState:
        compiled = time.monotonic() - self.start
        with process.answering(self._on_signal), contextlib.ExitStack() as opened:
            self._begin_at(int(state.update))
            self.log = opened.enter_context(contextlib.closing(loggers.Loggers(self.run_directory, self.config)))
            self.progress = reporting.Progress(self.config.total_env_steps, int(state.env_steps))
            opened.enter_context(contextlib.closing(self.progress))
            self.progress.say(f"compiled in {compiled:.1f} s")
            try:
                state = self._follow(program, state)
            except loop.Stopped as stopped:
                path, good = self.run_directory.path, self.saver.last_good()
                raise RunError(f"{path}: {stopped}; nothing was saved now, {good}") from None
            if self.signum is not None:
                self._save(state)
                self.saver.wait()
                name = signal.Signals(self.signum).name
                self.progress.say(f"stopped by {name}; checkpoint at update {int(state.update):,}")
                raise Interrupted(self.signum)
            self.saver.wait()
            return state

    def _begin_at(self, update: int) -> None:
        """Makes the directory ready to resume from `update`; what is refused before changes nothing in it."""
        directory = self.run_directory
        if update == 0 and (aside := directory.set_aside()):
            said = "no checkpoint to go on from: training starts anew"
            print(f"{said}; what was measured so far is in {aside}", flush=True)
        directory.rewind_metrics(update)
        reconstructions.rewind(directory.path, update)
        directory.write_config(config_lib.to_json(self.config))

    def _on_signal(self, signum, frame) -> None:
        del frame
        self.signum = signum

    def _follow(self, program: jax.stages.Compiled, state: TrainState) -> TrainState:
        """Trains to the end, or until a signal came."""
        if self.signum is not None:
            return state
        moved_update, moved_steps = int(state.update), int(state.env_steps)  # The latest update whose steps counted.
        intervals = (self.config.log.save_reconstruction_interval, self.config.checkpoint.interval)
        for call in loop.train(program, state, self.config, self._remaining, intervals):
            state, update, steps = call.state, call.line["update"], call.line["env_steps"]
            if steps > moved_steps:
                moved_update, moved_steps = update, steps
            elif update - moved_update >= MAX_UPDATES_WITHOUT_STEPS:
                said = f"no call of step in the last {update - moved_update} updates was `valid` (see EnvState)"
                raise RunError(f"{self.config.env.name}: {said}")
            self._write(call)
            if self.signum is not None:
                break
        return state

    def _remaining(self, state: TrainState) -> int:
        steps = self.config.total_env_steps - int(state.env_steps)
        return -(-steps // (self.config.num_envs * self.config.num_steps))

    def _write(self, call: loop.Call) -> None:
        line, update = call.line, call.line["update"]
        if call.is_line:
            first = {"update": update, "env_steps": line["env_steps"], "wall_time": round(self._wall_time(), 3)}
            line = first | line | {"obs.fps": call.steps_per_second}
            self.run_directory.append_metrics(line)
            self.log.line(line)
        self.progress.advance(line["env_steps"], line["result.true"], line["loss.total"], call.is_line)
        if call.is_failure:
            return
        every = self.config.log.save_reconstruction_interval
        if every and update % every == 0:
            self._save_reconstruction(call.state)
        if call.is_end or self._is_time_to_save(update):
            self._save(call.state)

    def _is_time_to_save(self, update: int) -> bool:
        every, minutes = self.config.checkpoint.interval, self.config.checkpoint.minutes
        waited_long = 0 < 60 * minutes <= time.monotonic() - self.saved_at
        return waited_long or (every > 0 and update % every == 0)

    def _save_reconstruction(self, state: TrainState) -> None:
        arrays = reconstructions.to_storage(self.reconstruct(state) | {"env_steps": state.env_steps})
        reconstructions.save(self.run_directory.path, int(state.update), arrays)
        picture = reconstructions.picture(self.config.env.name, arrays)
        if picture is not None:
            self.log.image("reconstructions", picture, int(state.env_steps))

    def _wall_time(self) -> float:
        return self.wall_time_before + time.monotonic() - self.start

    def _save(self, state: TrainState) -> None:
        extra = {"wall_time": self._wall_time()}
        self.saver.save(state, self.with_episodes, state.episodes.summary()["result.true"], extra)
        self.saved_at = time.monotonic()


def prepare(workdir: Path | None, config: ConfigDict | None, overrides: dict[str, Any]):
    """Checks everything that can be checked before anything is written, then opens the run directory.

    Returns (run directory, configuration).
    """
    if config is not None:
        config = config_lib.from_fields(config_lib.flatten(config))
        if config.log.wandb:
            loggers.import_wandb()
    elif workdir is None or not run_directory.has_config(workdir):
        raise ConfigError("--config: is needed to start a new run")
    is_new = workdir is None
    run = run_directory.RunDirectory(run_directory.next_directory() if is_new else workdir, is_new)
    return run, resolve_config(run, config, overrides)
