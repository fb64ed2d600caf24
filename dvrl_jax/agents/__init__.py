"""The belief models by name. A new one is a module here, with a subclass of `Agent` that says its `name`."""

from dvrl_jax import discovery
from dvrl_jax.agents.base import Agent, Inputs, PredictionStart, Timestep, UpdateInfo, bind, check, select
from dvrl_jax.agents.dvrl import DVRL
from dvrl_jax.agents.memoryless import Memoryless
from dvrl_jax.agents.rnn import RNN
from dvrl_jax.errors import DiscoveryError

TAKEN = ("action", "entropy", "lambda_discrepancy", "second_value", "total", "value")  # Losses that every agent has.


def named() -> dict[str, type[Agent]]:
    """The belief models, by what configurations call them (`algorithm`).

    Raises:
        DiscoveryError: one of them cannot be used.
    """
    found = discovery.named(Agent, __name__)
    for kind in found.values():
        for loss, coef in kind.losses.items():
            said = f"{kind.__module__}: {kind.__name__} has the loss {loss!r}"
            if loss in TAKEN:
                raise DiscoveryError(f"{said}, which every agent has; give it another name")
            if not isinstance(coef, int | float) or coef < 0:
                raise DiscoveryError(f"{said} with the coefficient {coef!r}, which must be a number, at least 0")
    return found


__all__ = [
    "DVRL",
    "RNN",
    "Agent",
    "Inputs",
    "Memoryless",
    "PredictionStart",
    "Timestep",
    "UpdateInfo",
    "bind",
    "check",
    "named",
    "select",
]
