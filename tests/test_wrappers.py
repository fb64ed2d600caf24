"""Wrappers, each against a computation by hand, and what a configuration makes of them together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import envs
from dvrl_jax.envs import (
    ActionSpec,
    Batched,
    BatchedEnvironment,
    Environment,
    EnvState,
    MountainHike,
    ObservationSpec,
    Step,
)
from dvrl_jax.envs.wrappers import Delay, GaussianNoise, KeepComponents, NoiseComponents, RevealState, Sticky
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import pictures
from tests.test_envs import Walk, assert_same, play
from tests.tiny import tiny_config, tiny_hike

LENGTH = 4


class Count(Environment):
    """Observes (n, 10 n, 100 n) in step n of an episode, which is cut off after step `LENGTH`."""

    name = None
    observation = ObservationSpec((3,), jnp.float32)
    action = ActionSpec(discrete=True, size=2)

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(3)

    def step(self, key, state, action):
        n = state + 1
        return Step(n, self.observe(n), jnp.float32(n), jnp.zeros((), bool), n == LENGTH)

    def observe(self, n):
        return n * jnp.array([1.0, 10.0, 100.0])

    def view(self, state, obs):
        return state


class Late(BatchedEnvironment):
    """Counts 1 .. 4, ends, and delivers the next episode's first observation, 0, one call late, as EnvPool does."""

    num_envs, restorable = 2, True
    observation = ObservationSpec((1,), jnp.float32)
    action = ActionSpec(discrete=True, size=2)

    def reset(self, key):
        return EnvState.begin(jnp.zeros(2), jnp.zeros((2, 1)))

    def step(self, state, action):
        was_done = state.inner == LENGTH
        n = jnp.where(was_done, 0.0, state.inner + 1)
        after = EnvState.go_on(n, n[:, None], n, n == LENGTH)
        return after._replace(valid=~was_done)


def steps_of(batch, steps, seed=0):
    """The first state and `steps` more, [T + 1, B, ...]."""
    action = jnp.zeros((steps, batch.num_envs), jnp.int32)
    if not batch.action.discrete:
        action = 0.1 * jax.random.normal(jax.random.key(1), (steps, batch.num_envs, batch.action.size))
    return play(batch, batch.reset(jax.random.PRNGKey(seed)), action)


def first_components(states):
    """The first component of `obs` and `final_obs` in the first environment, as lists."""
    return states.obs[:, 0, 0].tolist(), states.final_obs[:, 0, 0].tolist()


def test_a_delay_is_of_steps_and_begins_anew_with_each_episode():
    shown, final = first_components(steps_of(Delay(Batched(Count(), 2), 2), 9))
    assert shown == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert final == [0, 0, 0, 1, 2, 0, 0, 1, 2, 0]
    # Longer than an episode, and of an environment that begins its episodes late.
    shown, final = first_components(steps_of(Delay(Batched(Count(), 2), 5), 9))
    assert shown == [0] * 10 and final == [0] * 10
    states = steps_of(Delay(Late(), 1), 9)
    assert states.valid[:, 0].tolist() == [True] * 5 + [False] + [True] * 4
    shown, final = first_components(states)
    assert shown == [0, 0, 1, 2, 4, 0, 0, 1, 2, 4]  # With an episode's end, its last frame, of which no step is made.
    assert final == [0, 0, 1, 2, 3, 0, 0, 1, 2, 3]


def test_a_sticky_observation_is_the_one_shown_before_and_never_of_another_episode():
    shown, final = first_components(steps_of(Sticky(Batched(Count(), 2), 1.0), 9))
    assert shown == [0] * 10 and final == [0] * 10
    shown, _ = first_components(steps_of(Sticky(Late(), 1.0), 9))
    assert shown == [0, 0, 0, 0, 4, 0, 0, 0, 0, 4]
    batch, plain = Sticky(Batched(Count(), 500), 0.3), Batched(Count(), 500)
    states, true = steps_of(batch, 20), steps_of(plain, 20)
    obs, final, done = (x[1:] for x in (states.obs, states.final_obs, true.done))
    before = states.obs[:-1]
    np.testing.assert_array_equal(obs[done], true.obs[1:][done])
    np.testing.assert_array_equal(obs[~done], final[~done])
    repeated = np.all(final == before, axis=-1)
    np.testing.assert_array_equal(final[~repeated], true.final_obs[1:][~repeated])  # New or repeated, nothing else.
    for share in (repeated[~done].mean(), repeated[done].mean()):
        assert abs(share - 0.3) < 0.04
    assert abs(repeated[0].mean() - 0.3) < 0.1 and abs(repeated[:, 0].mean() - 0.3) < 0.4


def test_components_are_kept_noised_and_appended_in_this_order():
    env = NoiseComponents(GaussianNoise(KeepComponents(Count(), (2, 0)), 0.5), 2, 3.0)
    assert env.observation == ObservationSpec((4,), jnp.float32)
    states, true = steps_of(Batched(env, 400), 9), steps_of(Batched(Count(), 400), 9)
    for name in ("reward", "done", "truncated"):
        np.testing.assert_array_equal(getattr(states, name), getattr(true, name))
    np.testing.assert_array_equal(states.inner.state, true.inner.state)
    noise = states.final_obs.copy()
    noise[..., :2] -= true.final_obs[..., [2, 0]]
    noise /= np.array([0.5, 0.5, 3.0, 3.0])
    np.testing.assert_allclose(noise.std(axis=(0, 1)), 1.0, atol=0.05)
    np.testing.assert_allclose(np.corrcoef(noise.reshape(-1, 4).T), np.eye(4), atol=0.07)
    assert abs(np.mean(noise[1:] * noise[:-1])) < 0.05  # New with every step.
    later = states.obs[true.done] - np.pad(true.obs[true.done][:, [2, 0]], ((0, 0), (0, 2)))
    np.testing.assert_allclose(later.std(axis=0), [0.5, 0.5, 3.0, 3.0], rtol=0.15)


def test_wrappers_do_not_change_the_random_numbers_of_what_they_wrap():
    config = fields(obs_noise_std=0.1, noise_components=1, obs_delay=1, p_repeat=0.5)
    plain = steps_of(Batched(Walk(), 6), 12)
    wrapped = steps_of(envs.wrap_batch(Batched(envs.wrap(Walk(), config), 6), config), 12)
    np.testing.assert_array_equal(wrapped.reward, plain.reward)
    assert_same(wrapped.inner[0][0].state, plain.inner.state)


def fields(**changes):
    """The `env` group of a configuration of Mountain Hike."""
    return tiny_hike("rnn", env__observation_std=0.0, **{f"env__{name}": x for name, x in changes.items()}).env


EVERY = {"keep_components": (1,), "obs_noise_std": 0.1, "noise_components": 3, "noise_components_std": 2.0}
EVERY |= {"obs_delay": 2, "p_repeat": 0.25, "p_blank": 0.5}


def chain(env):
    """The classes from the outermost wrapper to the environment."""
    return [type(env).__name__, *(chain(env.env) if hasattr(env, "env") else [])]


def test_a_configuration_says_what_is_seen():
    assert chain(envs.make_env(fields(), 2, 0)) == ["Batched", "MountainHike"]
    env = envs.make_env(fields(**EVERY), 2, 0)
    batched, one = ["Flicker", "Sticky", "Delay", "Batched"], ["NoiseComponents", "GaussianNoise", "KeepComponents"]
    assert chain(env) == [*batched, *one, "MountainHike"]
    assert env.observation == envs.observation_of(fields(**EVERY)) == ObservationSpec((4,), jnp.float32)
    envs.check(env, env.reset(jax.random.PRNGKey(0)))
    # The state itself, whatever would be seen otherwise.
    env = envs.make_env(fields(**EVERY, reveal_state=True), 2, 0)
    assert chain(env) == ["Batched", "RevealState", "MountainHike"]
    states = steps_of(env, 3)
    np.testing.assert_allclose(states.obs, 10 * states.inner.state.position, rtol=1e-6)
    assert RevealState(MountainHike(0.3)).observation == ObservationSpec((2,), jnp.float32)


def test_pictures_show_the_true_state_behind_all_wrappers():
    config = fields(obs_delay=1, p_repeat=0.5, p_blank=0.5, noise_components=1)
    env = envs.make_env(config, 3, 0, keep_view=True)
    states = steps_of(env, 5)
    np.testing.assert_array_equal(env.view(states), states.inner[0][0][0].state.position)
    assert isinstance(pictures.painter_for(env), pictures.HikePainter)
    painter = pictures.HikePainter()
    image = painter.predictions(states.obs[0], states.observed[0], {0: states.obs[1], 1: states.obs[2]})
    assert image.dtype == np.uint8
    with pytest.raises(RunError, match=r"observed with env\.keep_components, env\.obs_noise_std"):
        pictures.painter_for(envs.make_env(fields(**EVERY), 2, 0))
    with pytest.raises(ValueError, match="keep_view=True"):
        envs.make_env(config, 3, 0).view(states)


@pytest.mark.parametrize("name", ["AliasedHike", "RockSample"])
def test_an_exact_belief_is_drawn_of_the_observations_that_it_knows_alone(name):
    """It counts readings as they are, in time and once; a blank one it leaves out."""
    find = lambda *wrapped: pictures.find_painter(envs.find(name), False, wrapped)
    assert isinstance(find("p_blank"), pictures.PAINTERS[name])
    assert not any(find("p_blank", field) for field in EVERY if field not in ("p_blank", "noise_components_std"))


REFUSED = [
    ({"keep_components": (2,)}, r"env.keep_components = \(2,\): must be numbers from 0 to 1 \(env.name is Mount"),
    ({"keep_components": (-1,)}, r"env.keep_components = \(-1,\): must be different whole numbers, each at least 0"),
    ({"keep_components": (0, 0)}, "must be different whole numbers"),
    ({"keep_components": (0.5,)}, "must be different whole numbers"),
    ({"obs_noise_std": -0.1}, "env.obs_noise_std = -0.1: must be at least 0"),
    ({"noise_components": 10**7}, "env.noise_components = 10000000: must be at most"),
    ({"obs_delay": -1}, "env.obs_delay = -1: must be at least 0"),
    ({"p_repeat": 2.0}, "env.p_repeat = 2.0: must be a probability"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused(changes, message):
    config = tiny_hike("rnn", **{f"env__{name}": x for name, x in changes.items()})
    with pytest.raises(ConfigError, match=message):
        config_lib.finalise(config)


PONG = {"env__name": "Pong", "model__channels": (8, 8, 8)}


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep_components", (0,)), ("obs_noise_std", 0.5), ("noise_components", 1), ("reveal_state", True)],
)
def test_atari_takes_the_wrappers_of_batches_alone(field, value):
    config = tiny_config("rnn", **PONG, env__obs_delay=1, env__p_repeat=0.5)
    config.env[field] = value
    said = rf"^env.{field} = .*: must be .* for Pong, which is stepped as a whole batch$"
    with pytest.raises(ConfigError, match=said):
        config_lib.finalise(config)
    with pytest.raises(ConfigError, match=said):
        envs.make_env(config.env, 2, 0)


class Pixels(Count):
    observation = ObservationSpec((4, 4, 1), jnp.uint8)


def test_an_environment_is_refused_what_it_cannot_do():
    for env, changes, message in [
        (Count(), {"reveal_state": True}, "env.reveal_state = True: must be False for Count, which does not say"),
        (Pixels(), {"keep_components": (0,)}, r"env.keep_components = \(0,\): must be \(\) for images"),
        (Pixels(), {"obs_noise_std": 1.0}, "env.obs_noise_std = 1.0: must be 0 for Pixels"),
        (Pixels(), {"noise_components": 1}, "env.noise_components = 1: must be 0 for Pixels"),
    ]:
        with pytest.raises(ConfigError, match=message):
            envs.wrap(env, fields(**changes))
