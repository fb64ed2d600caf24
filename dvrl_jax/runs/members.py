"""The seeds of a run: a directory, a configuration and checkpoints for each, and where they resume from together.

    saved_runs/7/config.json, metrics.jsonl      of all seeds: means and standard errors
    saved_runs/7/seed0/, saved_runs/7/seed1/     of one seed each, as `run_directory` says: a run like any other

A run of one seed has no such directories: the run's own is the seed's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.learner import Learner
from dvrl_jax.runs import checkpoints, run_directory
from dvrl_jax.runs import config as config_lib
from dvrl_jax.train_state import TrainState

STOPPED = "stopped.txt"  # In the directory of a seed that has stopped while others went on: why.


class Member:
    """One seed's part of a run.

    Attributes:
        directory, config, saver: its run directory, which is locked, configuration and checkpoints. Of several
            processes that train together the first alone has a saver.
        wall_time: seconds that it was trained before.
    """

    def __init__(
        self, directory: run_directory.RunDirectory, config: ConfigDict, saver: checkpoints.Checkpoints | None
    ):
        self.directory, self.config, self.saver, self.wall_time = directory, config, saver, 0.0

    @property
    def latest(self) -> int:
        """Update number of the newest checkpoint, 0 without one."""
        return (self.saver and self.saver.latest) or 0

    @property
    def is_stopped(self) -> bool:
        """Whether training of this seed was stopped before, while others went on."""
        return (self.directory.path / STOPPED).exists()


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


def directories(
    run: run_directory.RunDirectory, config: ConfigDict, opened: contextlib.ExitStack
) -> list[tuple[run_directory.RunDirectory, ConfigDict]]:
    """Each seed's directory, closed with `opened`, and configuration.

    Raises:
        RunError: a directory cannot be used, or holds something else.
        ConfigError: it holds a run of other settings.
    """
    if config.num_seeds == 1:
        return [(run, config)]
    found = []
    for place in range(config.num_seeds):
        own = config_lib.from_fields(config_lib.flatten(config) | {"num_seeds": 1, "seed": config.seed + place})
        directory = run_directory.RunDirectory(run.path / f"seed{own.seed}")
        opened.enter_context(contextlib.closing(directory))
        if run_directory.has_config(directory.path) and not run_directory.has_config(run.path):
            raise RunError(f"{directory.path}: holds a run of its own; train several seeds in another directory")
        found.append((directory, resolve_config(directory, own, config_lib.flatten(own))))
    return found


@contextlib.contextmanager
def opened(directory: run_directory.RunDirectory, config: ConfigDict) -> Iterator[Member]:
    """A seed with its checkpoints, once it is known that they can be written.

    Raises:
        RunError: they cannot.
    """
    if jax.process_index():
        yield Member(directory, config, None)
        return
    folder = directory.path / "checkpoints"
    with contextlib.closing(checkpoints.Checkpoints(folder, config.checkpoint.keep)) as saver:
        saver.try_out()
        yield Member(directory, config, saver)


def running(members: list[Member]) -> list[int]:
    """The places of the seeds that train.

    Raises:
        RunError: all of them have stopped.
    """
    found = [place for place, member in enumerate(members) if not member.is_stopped]
    if not found:
        raise RunError(f"{members[0].directory.path.parent}: every seed has stopped; each one's {STOPPED} says why")
    return found


def restore(members: list[Member], running: list[int], learner: Learner, states: list[TrainState]) -> list[TrainState]:
    """The states from which training resumes: of the newest update of which all `running` seeds have a checkpoint.

    Where one has none, they are `states`, which begin anew.
    Raises:
        RunError: a seed has checkpoints, and none that is intact and fits.
    """
    newest = None
    while True:
        found = {place: members[place].saver.restore(states[place], newest) for place in running}
        updates = {-1 if one is None else int(one.state.update) for one in found.values()}
        if len(updates) == 1:
            break
        newest = min(updates)
    if updates == {-1}:
        return states
    states = list(states)
    for place, restored in found.items():
        state, members[place].wall_time = restored.state, restored.extra["wall_time"]
        states[place] = state if restored.has_episodes else learner.restart(state, states[place].actor.env)
    state = states[running[0]]
    print(f"resuming from update {int(state.update):,} ({int(state.env_steps):,} steps)", flush=True)
    # Those that have stopped share the count of updates with the others.
    return [each._replace(update=state.update) for each in states]
