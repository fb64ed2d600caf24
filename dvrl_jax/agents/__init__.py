"""The belief models by name. A new one is a module here, with a subclass of `Agent` that says its `name`."""

from dvrl_jax import discovery
from dvrl_jax.agents.base import Agent, Inputs, PredictionStart, Timestep, UpdateInfo, bind, check, select
from dvrl_jax.agents.dvrl import DVRL
from dvrl_jax.agents.rnn import RNN


def named() -> dict[str, type[Agent]]:
    """The belief models, by what configurations call them (`algorithm`)."""
    return discovery.named(Agent, __name__)


__all__ = [
    "DVRL",
    "RNN",
    "Agent",
    "Inputs",
    "PredictionStart",
    "Timestep",
    "UpdateInfo",
    "bind",
    "check",
    "named",
    "select",
]
