"""The belief models. A new one is a subclass of `Agent` and a line in `AGENTS`."""

from dvrl_jax.agents.base import NO_TAPES, Agent, Inputs, Tapes, UpdateInfo, bind
from dvrl_jax.agents.dvrl import DVRL
from dvrl_jax.agents.rnn import RNN

AGENTS: dict[str, type[Agent]] = {"dvrl": DVRL, "rnn": RNN}

__all__ = ["AGENTS", "DVRL", "NO_TAPES", "RNN", "Agent", "Inputs", "Tapes", "UpdateInfo", "bind"]
