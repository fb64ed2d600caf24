"""An environment or a belief that is not as its interface says is refused in one sentence, before it is trained."""

import jax
import jax.numpy as jnp
import pytest

from dvrl_jax import a2c, agents, discovery, envs
from dvrl_jax.agents.rnn import RNN, Belief
from dvrl_jax.envs import EnvState, MountainHike, ObservationSpec
from dvrl_jax.errors import DiscoveryError, RunError
from dvrl_jax.runs import training
from tests.tiny import Recall, tiny_config, tiny_hike, train


class Changed(Recall):
    """Recall, with some fields of what `step`, or `reset` too, returns replaced."""

    def __init__(self, reset=False, **fields):
        super().__init__(3)
        self.fields, self.in_reset = fields, reset

    def reset(self, key):
        state = super().reset(key)
        return state._replace(**self.fields) if self.in_reset else state

    def step(self, state, action):
        return super().step(state, action)._replace(**self.fields)


class Gym(Recall):
    def step(self, state, action):
        return tuple(super().step(state, action))[:4]


def of_other_parts():
    env = Recall(3)
    env.step = lambda state, action: Recall.step(env, state, action)._replace(inner=())
    return env


def of_integers():
    env = Recall(3)
    env.observation = ObservationSpec((2,), jnp.int32)
    return env


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Changed(obs=jnp.zeros((3, 4))),
            r"Changed: step returns obs as float32[3, 4], and must return float32[3, 2]",
        ),
        (
            lambda: Changed(reset=True, obs=jnp.zeros(2)),
            "reset returns obs as float32[2], and must return float32[3, 2]",
        ),
        (lambda: Changed(reward=jnp.zeros((3, 1))), "step returns reward as float32[3, 1], and must return float32[3]"),
        (lambda: Changed(true_reward=1.0), "step returns true_reward as float32[], and must return float32[3]"),
        (
            lambda: Changed(reward=jnp.zeros(3, jnp.int32)),
            "step returns reward as int32[3], and must return float32[3]",
        ),
        (lambda: Changed(done=jnp.zeros(3)), "step returns done as float32[3], and must return bool[3]"),
        (of_integers, "Recall: reset returns obs as float32[3, 2], and must return int32[3, 2]"),
        (of_other_parts, "Recall: step returns an `inner` of other parts than reset does"),
        (
            lambda: Changed(inner=Recall.Inner(jnp.zeros(3), jnp.zeros(3), jax.random.PRNGKey(0))),
            "Changed: step returns inner.time as float32[3], and reset as int32[3]",
        ),
        (lambda: Gym(3), "Gym: step returns tuple, and must return an EnvState"),
    ],
)
def test_an_environment_that_breaks_its_promises_is_refused(make, message):
    learner = a2c.make_learner(tiny_config("rnn"), make())
    with pytest.raises(RunError) as error:
        learner.init(jax.random.PRNGKey(0))
    assert message in str(error.value)


def test_an_environment_in_which_no_step_counts_is_not_trained_for_ever(tmp_path, monkeypatch):
    intact = MountainHike.step
    idle = lambda env, state, action: intact(env, state, action)._replace(transition=jnp.zeros(env.num_envs, bool))
    monkeypatch.setattr(MountainHike, "step", idle)
    monkeypatch.setattr(training, "MAX_UPDATES_WITHOUT_STEPS", 20)
    with pytest.raises(RunError, match=r"^MountainHike: no call of step in the last 20 updates was a `transition`"):
        train(tmp_path / "run", tiny_hike("rnn", total_env_steps=1000))
    assert [step.name for step in (tmp_path / "run" / "checkpoints").glob("*")] == []


def test_an_environment_without_an_attribute_is_refused(monkeypatch):
    class Lasting(MountainHike):
        @property
        def restorable(self):
            raise AttributeError

    monkeypatch.setattr("dvrl_jax.envs.find", lambda name: Lasting)
    with pytest.raises(RunError, match=r"^MountainHike: has no restorable"):
        envs.make_env(tiny_hike("rnn").env, 2, seed=0)


def test_settings_are_what_a_configuration_can_hold_and_the_class_takes():
    class Unlike(Recall):
        settings = {"doors": 3}

    with pytest.raises(ValueError, match=r"its __init__ does not take num_envs and its settings: .*'doors'"):
        Unlike.from_config({"doors": 3}, 3, seed=0)

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
    assert not state.done.any() and state.transition.all() and state.observed.all() and not state.reward.any()
    reward, done = jnp.arange(3.0), jnp.array([True, False, True])
    state = EnvState.go_on((), jnp.ones((3, 2)), reward, done)
    assert state.transition.all() and state.observed.all()
    assert (state.true_reward == reward).all() and (state.game_over == done).all()


class Two(RNN):
    name = None

    def initial(self, num_envs):
        return Belief((jnp.zeros((num_envs, 8)), jnp.zeros((num_envs, 8))))


class Bare(RNN):
    name = None

    def initial(self, num_envs):
        return jnp.zeros((num_envs, 8))


class Weighing(RNN):
    """Changes h where learning does not see it."""

    name = None

    def weigh(self, step, inputs, trace, obs, *tape):
        belief, info = super().weigh(step, inputs, trace, obs, *tape)
        return belief._replace(h=0.5 * belief.h), info


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Two, r"Two: initial returns Belief, and must return a named tuple with the field h, one array \[3, \.\.\.\]"),
        (Bare, r"Bare: initial returns .*, and must return a named tuple"),
        (Weighing, r"Weighing: weigh changes h, and must leave it as it is in the step"),
    ],
)
def test_a_belief_that_breaks_its_promises_is_refused(kind, message, monkeypatch):
    monkeypatch.setattr(agents, "named", lambda: {"rnn": kind})
    with pytest.raises(RunError, match=message):
        a2c.make_learner(tiny_config("rnn"), Recall(3)).init(jax.random.PRNGKey(0))


def test_only_pixels_are_divided_by_255():
    agent = a2c.make_agent(tiny_config("rnn"), Recall(3), jax.random.PRNGKey(0))
    for given, expected in ((jnp.uint8(255), 1.0), (jnp.int32(3), 3.0), (jnp.float32(0.5), 0.5)):
        seen = agent.as_float(given)
        assert seen == expected and seen.dtype == jnp.float32
