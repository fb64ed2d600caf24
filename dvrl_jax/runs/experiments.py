"""Experiments as data: which configurations to train, and which of them are compared.

The paper's come first. Which values an ablation or a search takes is decided here. Numbers of the paper are not
repeated.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dvrl_jax.errors import RunError

AGENTS = ("dvrl", "rnn")
GAMES = (
    "Pong",
    "ChopperCommand",
    "MsPacman",
    "Centipede",
    "BeamRider",
    "Frostbite",
    "Bowling",
    "IceHockey",
    "DoubleDunk",
    "Asteroids",
)
ABLATION_GAME = "ChopperCommand"
PARTICLES = (1, 3, 5)  # Besides the configuration's own 15.
WINDOWS = (1, 2, 5)  # Segments, besides the configuration's own 10.
NOISE = (0.0, 0.15, 0.3)  # Standard deviations of Mountain Hike's readings.
# Mountain Hike's settings, by what experiments and configurations call them: rewards as they are; scaled by 0.1; scaled
# by 0.03 and learned from with a third of the learning rate, 1e-4.
HIKES = {"hike": "mountain_hike", "hike-scaled": "mountain_hike_scaled", "hike-small-step": "mountain_hike_small_step"}
# With small steps at noise 0.3, besides the configuration's own 10 particles, 5 segments, 1e-4 and 0.1.
HIKE_PARTICLES = (1, 5, 30)
HIKE_WINDOWS = (1, 10)
HIKE_LEARNING_RATES = {"3e-4": 3e-4, "1e-3": 1e-3}
HIKE_ENCODING_COEFS = (0.01, 1.0)
# Tasks that are not the paper's, by their experiments' names: a configuration, which the agent completes, and fields to
# change. Some need the extra `gymnax`, so that all of them are left out where none is asked for.
TASKS = {
    "task/aliased-hike": ("aliased_hike:", {}),
    "task/distractor-hike": ("distractor_hike:", {}),
    "task/memory-chain": ("gymnax:MemoryChain-bsuite,", {"env.params.memory_length": 30}),
    "task/cart-pole": (
        "gymnax:CartPole-v1,",
        {
            "env.keep_components": (0, 2),
            "loss.reward_scale": 0.1,
            "loss.entropy_coef": 0.001,
            "total_env_steps": 4_000_000,
        },
    ),
    **{f"task/rock-sample/{size}": (f"rock_sample:{size},", {}) for size in ("5x5", "7x8")},
    **{
        f"task/minatar/{game}": (f"minatar:{game},", {}) for game in ("Asterix", "Breakout", "Freeway", "SpaceInvaders")
    },
}
TASK_AGENTS = (*AGENTS, "memoryless")

# Beliefs compared (docs/results/protocol.md). Networks are small, so that five seeds of DVRL take half an hour.
SMALL = {"model.h_dim": 64, "model.z_dim": 64}
_DVRL = {"algorithm": "dvrl", "loss.encoding_coef": 0.1}
BELIEFS = {
    "memoryless": {"algorithm": "memoryless"},
    "state": {"algorithm": "memoryless", "env.reveal_state": True},
    "rnn": {"algorithm": "rnn"},
    "discrepancy": {"algorithm": "rnn", "loss.lambda_discrepancy_coef": 0.1},
    "dvrl": _DVRL,
    "detached": {**_DVRL, "model.detach_encoder": True},
    "one-particle": {**_DVRL, "model.num_particles": 1},
    "dpfrl": {"algorithm": "dpfrl", "model.resampling": "soft", "model.summary": "mgf"},
}
# What DVRL's belief can be besides, one change at a time (docs/beliefs.md).
CHOICES = {name: {"model.summary": name} for name in ("mean", "mgf", "attention")}
CHOICES |= {name: {"model.resampling": name} for name in ("soft", "none")}


class Experiment(NamedTuple):
    """One setting to train with several seeds: the name of a configuration, and fields to change by dotted name."""

    name: str
    config: str
    fields: Mapping[str, Any] = {}

    def arguments(self) -> list[str]:
        """What follows `dvrl-train`, without seed, steps and directory."""
        changes = [f"--config.{field}={value}" for field, value in self.fields.items()]
        return [f"--config={self.config}", *changes]

    def vary(self, name: str, field: str, value: Any) -> "Experiment":
        """Another experiment, which differs from this one in a single field."""
        return Experiment(name, self.config, {**self.fields, field: value})


def _atari(game: str, agent: str) -> Experiment:
    return Experiment(f"atari/{game}/{agent}", f"atari_{agent}:{game}")


def _hike(kind: str, noise: float, agent: str) -> Experiment:
    return Experiment(f"{kind}/{noise}/{agent}", f"{HIKES[kind]}_{agent}", {"env.observation_std": noise})


def _tasks() -> dict[str, Experiment]:
    """Where beliefs are compared, by task: an experiment to be given an agent."""
    hike = lambda noise: Experiment("", "mountain_hike_scaled_rnn", {"env.observation_std": noise})
    found = {f"hike-{noise}": hike(noise) for noise in NOISE}
    for name in ("aliased-hike", "distractor-hike"):
        config, fields = TASKS[f"task/{name}"]
        found[name] = Experiment("", f"{config}rnn", fields)
    return {name: task._replace(fields={**task.fields, "total_env_steps": 3_000_000}) for name, task in found.items()}


def _comparisons() -> dict[str, tuple[Experiment, ...]]:
    found = {f"atari/{game}": tuple(_atari(game, agent) for agent in AGENTS) for game in GAMES}
    for kind in HIKES:
        for noise in NOISE:
            found[f"{kind}/{noise}"] = tuple(_hike(kind, noise, agent) for agent in AGENTS)

    def compare(name: str, base: Experiment, field: str, values: Mapping[Any, Any], between: str = "/") -> None:
        """Compares `base` with what has other values of a field, called by the comparison's name and the value's."""
        varied = (base.vary(f"{name}{between}{key}", field, value) for key, value in values.items())
        found[name] = (*varied, base)

    same = lambda values: {f"{value:g}": value for value in values}
    for agent in AGENTS:
        compare(f"ablation/window/{agent}", _atari(ABLATION_GAME, agent), "bptt_segments", same(WINDOWS), "-")
    dvrl, rnn = (_atari(ABLATION_GAME, agent) for agent in AGENTS)
    compare("ablation/particles", dvrl, "model.num_particles", same(PARTICLES))
    compare("ablation/joint", dvrl, "model.detach_encoder", {"detached": True})
    compare("ablation/actions", rnn, "model.action_encoding", {"rnn-without": 0})

    hikes = {agent: _hike("hike-small-step", NOISE[-1], agent) for agent in AGENTS}
    for agent, base in hikes.items():
        compare(f"hike-ablation/window/{agent}", base, "bptt_segments", same(HIKE_WINDOWS), "-")
        search, field = f"hike-search/{agent}", "optimizer.learning_rate"
        rates = {name: base.vary(f"{search}/lr-{name}", field, rate) for name, rate in HIKE_LEARNING_RATES.items()}
        found[f"{search}/learning-rate"] = (*rates.values(), base)
        # At the learning rate of the other two: rewards scaled by 0.03, by 0.1, and as they are.
        others = (_hike(kind, NOISE[-1], agent) for kind in ("hike-scaled", "hike"))
        found[f"{search}/reward-scale"] = (rates["3e-4"], *others)
    compare("hike-ablation/particles", hikes["dvrl"], "model.num_particles", same(HIKE_PARTICLES))
    for kind, name in {"hike-small-step": "joint", "hike-scaled": "joint-scaled"}.items():
        for noise in NOISE:
            base = _hike(kind, noise, "dvrl")
            compare(f"hike-ablation/{name}/{noise}", base, "model.detach_encoder", {"detached": True})
    compare("hike-ablation/resampling", hikes["dvrl"], "model.resample", {"off": False})
    compare("hike-search/dvrl/elbo", hikes["dvrl"], "loss.encoding_coef", same(HIKE_ENCODING_COEFS), "-")
    for name, (config, fields) in TASKS.items():
        found[name] = tuple(Experiment(f"{name}/{agent}", config + agent, fields) for agent in TASK_AGENTS)
    return found | _beliefs()


def _beliefs() -> dict[str, tuple[Experiment, ...]]:
    """All agents on each task, and DVRL's choices on the hike with the most noise."""
    found = {}
    for name, task in _tasks().items():
        found[f"beliefs/{name}"] = tuple(
            Experiment(f"beliefs/{name}/{agent}", task.config, {**task.fields, **SMALL, **fields})
            for agent, fields in BELIEFS.items()
        )
    base = next(one for one in found[f"beliefs/hike-{NOISE[-1]}"] if one.name.endswith("/dvrl"))
    varied = (Experiment(f"choices/{name}", base.config, {**base.fields, **fields}) for name, fields in CHOICES.items())
    found["choices"] = (*varied, base)
    return found


_COMPARED = _comparisons()

EXPERIMENTS = {experiment.name: experiment for compared in _COMPARED.values() for experiment in compared}

# What is drawn into one figure and compared in one table: names of experiments, by the comparison's own.
COMPARISONS = {name: tuple(experiment.name for experiment in compared) for name, compared in _COMPARED.items()}


def select(patterns: Iterable[str]) -> list[Experiment]:
    """Experiments whose name, or the beginning of it up to a slash, matches one of the patterns.

    Without any, all but those of `TASKS`.

    Raises:
        RunError: a pattern matches nothing.
    """
    patterns = list(patterns)
    chosen = set()
    for pattern in patterns:
        names = [name for name in EXPERIMENTS if any(fnmatch.fnmatchcase(part, pattern) for part in _prefixes(name))]
        names += [name for part in COMPARISONS if fnmatch.fnmatchcase(part, pattern) for name in COMPARISONS[part]]
        if not names:
            known = sorted({name.split("/")[0] for name in EXPERIMENTS})
            raise RunError(f"--only: nothing is called {pattern!r}; --list shows all ({', '.join(known)})")
        chosen |= set(names)
    default = lambda name: not patterns and not name.startswith("task/")
    return [experiment for name, experiment in EXPERIMENTS.items() if name in chosen or default(name)]


def _prefixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def load_config(experiment: Experiment):
    """The experiment's configuration."""
    from dvrl_jax.api import make_config

    name, _, argument = experiment.config.partition(":")
    fields = {field.replace(".", "__"): value for field, value in experiment.fields.items()}
    return make_config(name, *([argument] if argument else []), **fields)
