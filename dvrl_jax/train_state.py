"""What training carries from update to update; checkpoints hold all of it."""

from typing import NamedTuple

import jax
import optax
from flax import nnx

from dvrl_jax.acting import Actor
from dvrl_jax.bptt import Window
from dvrl_jax.statistics import EpisodeStatistics, Metrics

Array = jax.Array


class TrainState(NamedTuple):
    """Everything training carries. `update` counts updates; `env_steps` counts transitions (uint32).

    `skipped` counts the updates that were left out for NaN or inf, `skipped_in_row` the latest such without a good one
    in between. The randomness of update i comes from `key` and i alone.
    """

    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    actor: Actor
    window: Window
    episodes: EpisodeStatistics
    metrics: Metrics
    key: Array
    update: Array
    env_steps: Array
    skipped: Array
    skipped_in_row: Array
