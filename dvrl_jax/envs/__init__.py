"""Environments by name. A new one is a module here, with a class that says its `name`."""

from collections.abc import Sequence

from jax.sharding import Mesh

from dvrl_jax import discovery
from dvrl_jax.envs.atari import Atari
from dvrl_jax.envs.base import ActionSpec, Environment, ObservationSpec, Step, Task
from dvrl_jax.envs.batched import Batched, BatchedEnvironment, EnvState, check
from dvrl_jax.envs.divided import Divided, own_places
from dvrl_jax.envs.gymnax import Gymnax, is_gymnax
from dvrl_jax.envs.mountain_hike import MountainHike
from dvrl_jax.envs.wrappers import Flicker, check_batch, in_use, wrap, wrap_batch
from dvrl_jax.errors import DiscoveryError, RunError


def named() -> dict[str, type[Environment] | type[BatchedEnvironment]]:
    """The environments that have a name of their own: all but the Atari games.

    Raises:
        DiscoveryError: one of them cannot be used, or is called like an Atari game.
    """
    found = discovery.named(Task, __name__)
    for name, kind in found.items():
        if kind is not MountainHike and name in discovery.atari_games():
            raise DiscoveryError(f"{kind.__module__}: calls a class {name!r}, which is an Atari game")
    return found


def find(name: str) -> type[Environment] | type[BatchedEnvironment] | None:
    """The class of environment that configurations call `name`; None if it is not one of `named`, or an Atari game, or
    "gymnax/" and then anything.
    """
    if is_gymnax(name):
        return Gymnax
    return named().get(name) or (Atari if name in discovery.atari_games() else None)


def as_batch(env: Environment | BatchedEnvironment, num_envs: int) -> BatchedEnvironment:
    """`num_envs` copies of one environment; a batch is returned as it is.

    Raises:
        RunError: it lacks an attribute of its interface.
    """
    kind = Environment if isinstance(env, Environment) else BatchedEnvironment
    own = ("observation", "action") if kind is Environment else ("num_envs", "observation", "action", "restorable")
    if missing := [name for name in own if not hasattr(env, name)]:
        name = env.name or type(env).__name__
        raise RunError(f"{name}: has no {missing[0]} (see the attributes of {kind.__name__})")
    return Batched(env, num_envs) if kind is Environment else env


def observation_of(config) -> ObservationSpec:
    """What an agent sees of the environments that `config` (the `env` group of a configuration) describes.

    Raises:
        ValueError: they cannot be made so; the message says why.
        ConfigError: a wrapper does not fit them; the message names its field.
    """
    kind = find(config.name)
    if not issubclass(kind, Environment):
        check_batch(config)
    elif in_use(config):
        return wrap(kind.from_config(config), config).observation
    return kind.observation_of(config)


def make_env(
    config, num_envs: int, seed: int | Sequence[int], keep_view: bool = False, mesh: Mesh | None = None
) -> BatchedEnvironment:
    """Makes the environments that `config` (the `env` group of a configuration) describes.

    `seed` may be several, for as many seeds of one program (see `BatchedEnvironment.for_seeds`). With `keep_view`,
    `BatchedEnvironment.view` shows the true state also where observations are blanked. With `mesh`, what is no function
    of its state is divided over these devices (see `Divided`), with the same games.

    Raises:
        RunError: they cannot be made so, or lack an attribute of their interface.
        ConfigError: a wrapper does not fit them.
    """
    if num_envs < 1:
        raise RunError(f"num_envs = {num_envs}: must be at least 1")
    kind = find(config.name)
    one = issubclass(kind, Environment)
    if not one:
        check_batch(config)
    try:
        is_divided = mesh is not None and not getattr(kind, "restorable", True)
        parts = mesh.size if is_divided else 1
        seeds = [seed] if isinstance(seed, int) else seed
        size = num_envs // parts
        if parts > 1:
            own = [[seed + size * place for seed in seeds] for place in own_places(mesh)]
            env = Divided([kind.for_seeds(config, size, seeds) for seeds in own], mesh)
        else:
            env = kind.from_config(config) if one else kind.for_seeds(config, num_envs, seeds)
    except ValueError as error:
        raise RunError(f"env: {num_envs} of {config.name} cannot be made ({error})") from None
    batch = as_batch(env, num_envs)
    if one:
        batch = as_batch(wrap(env, config), num_envs)
    return wrap_batch(batch, config, keep_view)


__all__ = [
    "ActionSpec",
    "Atari",
    "Batched",
    "BatchedEnvironment",
    "EnvState",
    "Environment",
    "Flicker",
    "Gymnax",
    "MountainHike",
    "ObservationSpec",
    "Step",
    "as_batch",
    "check",
    "find",
    "in_use",
    "is_gymnax",
    "make_env",
    "named",
    "observation_of",
    "wrap",
    "wrap_batch",
]
