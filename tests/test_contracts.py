"""An environment or a belief that is not as its interface says is refused in one sentence, before it is trained."""

import jax
import jax.numpy as jnp
import pytest

from dvrl_jax import acting, agents, discovery, envs
from dvrl_jax.agents.rnn import RNN, Belief
from dvrl_jax.envs import Batched, EnvState, MountainHike, ObservationSpec
from dvrl_jax.envs.batched import Inner
from dvrl_jax.errors import DiscoveryError, RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import training
from tests.tiny import Recall, recall, tiny_config, tiny_hike, train


class Changed(Recall):
    """Recall, with some fields of what `step` returns replaced, and what `reset` returns."""

    def __init__(self, reset=None, **fields):
        self.fields, self.reset_to = fields, reset

    def reset(self, key):
        return super().reset(key) if self.reset_to is None else self.reset_to

    def step(self, key, state, action):
        return super().step(key, state, action)._replace(**self.fields)


class Gym(Recall):
    def step(self, key, state, action):
        return tuple(super().step(key, state, action))[1:]


class Integers(Recall):
    observation = ObservationSpec((2,), jnp.int32)


class ChangedBatch(Batched):
    """A batch of Recall, with some fields of what `step`, or `reset` too, returns replaced."""

    def __init__(self, reset=False, **fields):
        super().__init__(Recall(), 3)
        self.fields, self.in_reset = fields, reset

    def reset(self, key):
        state = super().reset(key)
        return state._replace(**self.fields) if self.in_reset else state

    def step(self, state, action):
        return super().step(state, action)._replace(**self.fields)


class GymBatch(Batched):
    def step(self, state, action):
        return tuple(super().step(state, action))[:4]


def refused(env, message):
    learner = make_learner(tiny_config("rnn"), env)
    with pytest.raises(RunError) as error:
        learner.init(jax.random.PRNGKey(0))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Changed(obs=jnp.zeros(4)), "Changed: step returns obs as float32[4], and must return float32[2]"),
        (
            Changed(obs=jnp.zeros(2, jnp.int32)),
            "Changed: step returns obs as int32[2], and must return float32[2]",
        ),
        (
            Changed(reset=((), jnp.zeros((3, 2)))),
            "Changed: reset returns obs as float32[3, 2], and must return float32[2]",
        ),
        (Changed(reset=jnp.zeros(2)), "Changed: reset returns ArrayImpl, and must return (state, obs)"),
        (Changed(reset=((), 0, {})), "Changed: reset returns a tuple of 3, and must return (state, obs)"),
        (Changed(reset=((), "none")), "Changed: reset returns obs as str, and must return an array"),
        (Changed(reward=jnp.zeros(1)), "Changed: step returns reward as float32[1], and must return float32[]"),
        (Changed(reward=1), "Changed: step returns reward as int32[], and must return float32[]"),
        (Changed(terminated=0.0), "Changed: step returns terminated as float32[], and must return bool[]"),
        (Changed(truncated=jnp.zeros(3, bool)), "Changed: step returns truncated as bool[3], and must return bool[]"),
        (Integers(), "Integers: reset returns obs as float32[2], and must return int32[2]"),
        (Changed(state=()), "Changed: step returns `state` of other parts than reset does"),
        (
            Changed(state=Recall.State(jnp.zeros(()), jnp.zeros(()))),
            "Changed: step returns state.time as float32[], and reset as int32[]",
        ),
        (Gym(), "Gym: step returns a tuple of 4, and must return a Step"),
    ],
)
def test_an_environment_that_breaks_its_promises_is_refused(env, message):
    refused(Batched(env, 3), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ChangedBatch(obs=jnp.zeros((3, 4))),
            "ChangedBatch: step returns obs as float32[3, 4], and must return float32[3, 2]",
        ),
        (
            lambda: ChangedBatch(reset=True, obs=jnp.zeros(2)),
            "reset returns obs as float32[2], and must return float32[3, 2]",
        ),
        (
            lambda: ChangedBatch(final_obs=jnp.zeros((3, 2), bool)),
            "step returns final_obs as bool[3, 2], and must return float32[3, 2]",
        ),
        (
            lambda: ChangedBatch(reward=jnp.zeros((3, 1))),
            "step returns reward as float32[3, 1], and must return float32[3]",
        ),
        (lambda: ChangedBatch(true_reward=1.0), "step returns true_reward as float32[], and must return float32[3]"),
        (
            lambda: ChangedBatch(reward=jnp.zeros(3, jnp.int32)),
            "step returns reward as int32[3], and must return float32[3]",
        ),
        (lambda: ChangedBatch(done=jnp.zeros(3)), "step returns done as float32[3], and must return bool[3]"),
        (lambda: ChangedBatch(inner=()), "ChangedBatch: step returns `inner` of other parts than reset does"),
        (
            lambda: ChangedBatch(inner=Inner(Recall.State(jnp.zeros(3), jnp.zeros(3)), jnp.zeros((3, 2), jnp.uint32))),
            "ChangedBatch: step returns inner.state.time as float32[3], and reset as int32[3]",
        ),
        (lambda: GymBatch(Recall(), 3), "GymBatch: step returns a tuple of 4, and must return an EnvState"),
    ],
)
def test_a_batch_that_breaks_its_promises_is_refused(make, message):
    refused(make(), message)


def test_an_environment_in_which_no_step_counts_is_not_trained_for_ever(tmp_path, monkeypatch):
    intact = Batched.step
    idle = lambda env, state, action: intact(env, state, action)._replace(valid=jnp.zeros(env.num_envs, bool))
    monkeypatch.setattr(Batched, "step", idle)
    monkeypatch.setattr(training, "MAX_UPDATES_WITHOUT_STEPS", 20)
    with pytest.raises(RunError, match=r"^MountainHike: no call of step in the last 20 updates was `valid`"):
        train(tmp_path / "run", tiny_hike("rnn", total_env_steps=1000))
    assert [step.name for step in (tmp_path / "run" / "checkpoints").glob("*")] == []


def test_an_environment_without_an_attribute_is_refused(monkeypatch):
    class Blind(MountainHike):
        @property
        def observation(self):
            raise AttributeError

    class Lasting(Batched):
        name = "Lasting"

        @classmethod
        def from_config(cls, config, num_envs, seed):
            return cls(MountainHike(), num_envs)

        @property
        def restorable(self):
            raise AttributeError

    for kind, message in (
        (Blind, r"^MountainHike: has no observation \(see the attributes of Environment\)"),
        (Lasting, r"^MountainHike: has no restorable \(see the attributes of BatchedEnvironment\)"),
    ):
        monkeypatch.setattr("dvrl_jax.envs.find", lambda name, kind=kind: kind)
        with pytest.raises(RunError, match=message):
            envs.make_env(tiny_hike("rnn").env, 2, seed=0)


def test_settings_are_what_a_configuration_can_hold_and_the_class_takes():
    class Unlike(Recall):
        settings = {"doors": 3}

    with pytest.raises(ValueError, match=r"its __init__ does not take its settings: .*'doors'"):
        Unlike.from_config({"doors": 3})

    class Kind:
        settings = {}

    class Fine(Kind):
        name, settings = "fine", {"a": 1, "b": 0.5, "c": "text", "d": True, "e": (1, 2)}

    assert discovery.named(Kind, "dvrl_jax.agents") == {"fine": Fine}

    class Listed(Kind):
        name, settings = "listed", {"doors": [1, 2]}

    with pytest.raises(DiscoveryError, match=r"Listed has the setting doors = \[1, 2\], which must be a number"):
        discovery.named(Kind, "dvrl_jax.agents")


def test_reset_and_step_have_short_ways_of_saying_the_usual():
    state = EnvState.begin((), jnp.ones((3, 2)))
    assert not state.done.any() and state.valid.all() and state.observed.all() and not state.reward.any()
    assert not state.truncated.any() and (state.final_obs == 1).all()
    reward, done = jnp.arange(3.0), jnp.array([True, False, True])
    state = EnvState.go_on((), jnp.ones((3, 2)), reward, done)
    assert state.valid.all() and state.observed.all() and not state.truncated.any()
    assert (state.true_reward == reward).all() and (state.game_over == done).all()


class Flat(RNN):
    name = None

    def initial(self, num_envs):
        return Belief({"h": jnp.zeros((num_envs, 8)), "m": jnp.zeros(8)})


class Counting(RNN):
    name = None

    def initial(self, num_envs):
        return Belief(jnp.zeros((num_envs, 8), jnp.int32))


class Bare(RNN):
    name = None

    def initial(self, num_envs):
        return jnp.zeros((num_envs, 8))


class Scoring(RNN):
    """Changes h where learning does not see it."""

    name = None

    def score(self, step, inputs, trace, timestep):
        belief, info = super().score(step, inputs, trace, timestep)
        return belief._replace(h=0.5 * belief.h), info


class Losing(RNN):
    """Returns a loss that it does not name."""

    name = None

    def score(self, step, inputs, trace, timestep):
        belief, info = super().score(step, inputs, trace, timestep)
        return belief, info._replace(losses=info.losses | {"other": info.losses["encoding"]})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Flat, r"Flat: initial returns carry\['m'\] as float32\[8\], and must return float32\[3, \.\.\.\]"),
        (Counting, r"Counting: initial returns carry as int32\[3, 8\], and must return float32\[3, \.\.\.\]"),
        (Bare, r"Bare: initial returns .*, and must return a named tuple with a `carry`"),
        (Losing, r"Losing: score returns the losses encoding, other, and its class names encoding"),
        (Scoring, r"Scoring: score changes the carry, and must leave it as it is in the step"),
    ],
)
def test_a_belief_that_breaks_its_promises_is_refused(kind, message, monkeypatch):
    monkeypatch.setattr(agents, "named", lambda: {"rnn": kind})
    with pytest.raises(RunError, match=message):
        make_learner(tiny_config("rnn"), recall(3)).init(jax.random.PRNGKey(0))


def test_only_pixels_are_divided_by_255():
    agent = acting.make_agent(tiny_config("rnn"), recall(3), jax.random.PRNGKey(0))
    for given, expected in ((jnp.uint8(255), 1.0), (jnp.int32(3), 3.0), (jnp.float32(0.5), 0.5)):
        seen = agent.as_float(given)
        assert seen == expected and seen.dtype == jnp.float32
