"""Deep Variational Reinforcement Learning in JAX, for use in programs and notebooks.

    import jax
    import dvrl_jax

    config = dvrl_jax.make_config("mountain_hike_dvrl", model__num_particles=30, log__interval=100)
    env = dvrl_jax.make_env(config)
    train = dvrl_jax.make_train(config, env)
    state, history = train(seed=0, num_updates=500)  # The final state, and metrics per log interval.
    agent = dvrl_jax.trained_agent(config, env, state)
    game = dvrl_jax.record(agent, dvrl_jax.make_env(config, num_envs=1, keep_view=True), jax.random.PRNGKey(1))
    pixels = dvrl_jax.painter_for(env).still(game)

What an agent believes, that train.py has trained:

    run = dvrl_jax.load_run("saved_runs/3")
    many = dvrl_jax.make_env(run.config, num_envs=100, seed=1, keep_view=True)
    seen = dvrl_jax.watch(run.agent, many, jax.random.PRNGKey(1), steps=75)
    seen.belief.h, seen.belief.log_weight, seen.view  # [75, 100, ...] each.

These write nothing but compiled programs, into JAX's cache in the user's cache directory (`XDG_CACHE_HOME`); runs with
directories, checkpoints and resuming are made by `train.py`.
"""

import importlib

# What is offered, by the module that has it. Imported when asked for: most programs need only a part.
_HOMES = {
    "ActionSpec": "envs",
    "Agent": "agents",
    "Batched": "envs",
    "BatchedEnvironment": "envs",
    "Environment": "envs",
    "Games": "viewing.evaluation",
    "Gymnax": "envs",
    "ObservationSpec": "envs",
    "Recording": "viewing.recording",
    "Run": "api",
    "Step": "envs",
    "Turn": "viewing.playing",
    "Watched": "viewing.playing",
    "load_run": "api",
    "make_agent": "api",
    "make_config": "api",
    "make_env": "api",
    "make_train": "api",
    "painter_for": "viewing.pictures",
    "play_games": "viewing.evaluation",
    "record": "viewing.recording",
    "trained_agent": "api",
    "watch": "viewing.playing",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'dvrl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dvrl_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
