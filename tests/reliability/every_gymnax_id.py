"""Trains every environment of Gymnax for two updates: python -m tests.reliability.every_gymnax_id [--only=TEXT]

Both agents, with small networks and two environments. Prints a line per id: for each agent the losses, or why it is
refused. Ends with 1 if an id neither trains nor is refused. It takes some minutes of a processor.
"""

import argparse
import sys

import gymnax
import numpy as np
from ml_collections import ConfigDict

import dvrl_jax
from dvrl_jax.envs import Gymnax
from dvrl_jax.errors import ConfigError
from tests.tiny import tiny_config


def train(env: Gymnax, algorithm: str) -> str:
    """What came of two updates: the losses.

    Raises:
        RuntimeError: an update was skipped, or a loss is NaN or inf.
    """
    channels = (4, 4, 4) if env.observation.is_image else (8, 8)
    fields = {"env__name": env.name, "model__channels": channels, "model__num_particles": 2, "log__interval": 1}
    _, history = dvrl_jax.make_train(tiny_config(algorithm, num_envs=2, **fields), env)(num_updates=2)
    losses = [line["loss.total"] for line in history]
    if not np.all(np.isfinite(losses)) or history[-1]["updates.skipped"] or len(losses) != 2:
        raise RuntimeError(f"losses {losses}, {history[-1]['updates.skipped']} updates skipped")
    return ", ".join(f"{loss:.3g}" for loss in losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="Ids with this in their name.")
    failed = 0
    for name in gymnax.registered_envs:
        if parser.parse_args().only not in name:
            continue
        try:
            env = Gymnax.from_config(ConfigDict({"name": f"gymnax/{name}"}))
        except ConfigError as error:
            print(f"{name:30} refused: {error}", flush=True)
            continue
        for algorithm in ("rnn", "dvrl"):
            try:
                result = f"trains ({train(env, algorithm)})"
            except Exception as error:  # Whatever it is, the other ids are looked at too.
                result, failed = f"FAILS: {type(error).__name__}: {error}", failed + 1
            print(f"{name:30} {algorithm:5} {result}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
