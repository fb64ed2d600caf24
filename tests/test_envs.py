"""One environment and batches of it: keys, ends of episodes, resets, and what wrappers make of them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dvrl_jax
from dvrl_jax import choices
from dvrl_jax.envs import (
    ActionSpec,
    Batched,
    Environment,
    Flicker,
    MountainHike,
    ObservationSpec,
    Step,
    as_batch,
    make_env,
)
from dvrl_jax.viewing import pictures
from tests.tiny import Recall, recall, tiny_config, tiny_hike

NUM_ENVS, STEPS = 6, 40


class Walk(Environment):
    """A random walk on the integers that terminates at +-3 and is cut off after 5 steps, sometimes both at once."""

    observation = ObservationSpec((2,), jnp.float32)
    action = ActionSpec(discrete=False, size=1)

    class State(NamedTuple):
        place: jax.Array
        time: jax.Array

    def reset(self, key):
        state = self.State(jax.random.randint(key, (), -1, 2), jnp.int32(0))
        return state, self._observe(state)

    def step(self, key, state, action):
        move = jnp.where(jax.random.bernoulli(key), 1, -1)
        state = self.State(state.place + move, state.time + 1)
        reward = 10.0 * state.time + action[0]
        return Step(state, self._observe(state), reward, jnp.abs(state.place) == 3, state.time == 5)

    def view(self, state, obs):
        return {"place": state.place, "obs": obs}

    def _observe(self, state):
        return jnp.stack([state.place, state.time]).astype(jnp.float32)


ENVS = {"hike": MountainHike(0.3), "walk": Walk(), "recall": Recall()}


@pytest.fixture(params=ENVS)
def env(request):
    return ENVS[request.param]


def actions_for(env, steps=STEPS, num_envs=NUM_ENVS):
    rng = np.random.default_rng(0)
    if env.action.discrete:
        return jnp.asarray(rng.integers(0, env.action.size, (steps, num_envs)), jnp.int32)
    return jnp.asarray(0.1 * rng.normal(size=(steps, num_envs, env.action.size)), jnp.float32)


def play(batch, state, actions):
    """The state, then its successors, stacked: [T + 1, B, ...]."""

    def step(state, action):
        state = batch.step(state, action)
        return state, state

    after = jax.jit(lambda state: jax.lax.scan(step, state, actions)[1])(state)
    return jax.tree.map(lambda first, rest: np.concatenate([first[None], rest]), state, after)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_environment_of_a_batch_goes_as_the_same_one_alone_with_its_key(env):
    actions = actions_for(env)
    key = jax.random.PRNGKey(1)
    states = play(Batched(env, NUM_ENVS), Batched(env, NUM_ENVS).reset(key), actions)
    assert np.any(states.done) or isinstance(env, MountainHike)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    for i, own in enumerate(jax.random.split(key, NUM_ENVS)):
        own, reset_key = jax.random.split(own)
        state, obs = reset(reset_key)
        np.testing.assert_allclose(states.obs[0, i], obs, rtol=1e-6)
        for t, action in enumerate(actions[:, i], start=1):
            own, step_key, reset_key = jax.random.split(own, 3)
            state, obs, reward, terminated, truncated = step(step_key, state, action)
            np.testing.assert_allclose(states.final_obs[t, i], obs, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(states.reward[t, i], reward, rtol=1e-5)
            assert states.done[t, i] == (terminated | truncated)
            assert states.truncated[t, i] == (truncated & ~terminated)
            if states.done[t, i]:
                state, obs = reset(reset_key)
            np.testing.assert_allclose(states.obs[t, i], obs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p_blank", [0.0, 0.4])
def test_a_batch_in_two_halves_gives_what_the_whole_gives(env, p_blank):
    """So that environments divide over devices."""

    def batch(num_envs):
        return Flicker(Batched(env, num_envs), p_blank) if p_blank else Batched(env, num_envs)

    actions, half = actions_for(env), NUM_ENVS // 2
    first = batch(NUM_ENVS).reset(jax.random.PRNGKey(2))
    whole = play(batch(NUM_ENVS), first, actions)
    parts = [
        play(batch(half), jax.tree.map(lambda x, part=part: x[part], first), actions[:, part])
        for part in (slice(None, half), slice(half, None))
    ]
    assert_same(whole, jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts))


def test_reset_is_traceable(env):
    batch, keys = Batched(env, NUM_ENVS), jax.random.split(jax.random.PRNGKey(3), 4)
    plain = [batch.reset(key) for key in keys]
    assert_same(plain[0], jax.jit(batch.reset)(keys[0]))
    assert_same(jax.tree.map(lambda *x: jnp.stack(x), *plain), jax.vmap(batch.reset)(keys))
    # Several batches at once, as for several seeds.
    actions = actions_for(env, steps=1)[0]
    stepped = jax.vmap(lambda key: batch.step(batch.reset(key), actions))(keys)
    for i in range(4):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6),
            stepped,
            batch.step(plain[i], actions),
        )


class Stencil(Environment):
    """Each of its numbers follows from several of the step before, as pixels do."""

    observation, action = ObservationSpec((8,), jnp.float32), ActionSpec(True, 2)

    def reset(self, key):
        numbers = jax.random.normal(key, (8,))
        return numbers, numbers

    def step(self, key, state, action):
        turned = jnp.where(state > 0.5, jnp.sin(state), jnp.cos(state))
        state = jnp.where(jnp.roll(turned, 1) > 0.2, turned + jnp.roll(turned, 2), turned - turned[::-1])
        return Step(state, state, 0.0, False, False)


@pytest.mark.parametrize("materialise", [True, False])
def test_a_step_is_computed_once(materialise):
    """On a CPU: over steps that are written out, what XLA fuses would be computed again and again."""
    env = Batched(Stencil(), 3)

    def operations(steps):
        def run(state):
            found = []
            for _ in range(steps):
                state = env.step(state, jnp.zeros(3, jnp.int32))
                found.append(jnp.sum(state.obs, axis=1))
            return state, found

        with dataclasses.replace(choices.Choices(), materialise=materialise).in_use():
            program = jax.jit(run).lower(env.reset(jax.random.PRNGKey(0))).compile()
        return program.cost_analysis()["transcendentals"]

    assert (operations(6) < 7 * operations(1)) is materialise


def test_keys_may_be_typed():
    batch, action = Flicker(Batched(MountainHike(0.3), 3), 0.5), jnp.zeros((3, 2))
    raw, typed = (batch.step(batch.reset(make(4)), action) for make in (jax.random.PRNGKey, jax.random.key))
    np.testing.assert_array_equal(raw.obs, typed.obs)


def test_terminated_and_truncated_episodes_are_told_apart():
    batch = Batched(Walk(), 200)
    actions = actions_for(batch, num_envs=200)
    states = play(batch, batch.reset(jax.random.PRNGKey(5)), actions)
    after = jax.tree.map(lambda x: x[1:], states)
    place, time = np.moveaxis(after.final_obs, -1, 0)
    terminal, late = np.abs(place) == 3, time == 5
    for kind in (terminal & ~late, late & ~terminal, terminal & late, ~terminal & ~late):
        assert kind.sum() > 20
    np.testing.assert_array_equal(after.done, terminal | late)
    np.testing.assert_array_equal(after.truncated, late & ~terminal)
    np.testing.assert_array_equal(after.game_over, after.done)
    np.testing.assert_allclose(after.reward, 10 * time + actions[..., 0], rtol=1e-6)  # Of the step that was taken.
    assert np.all(after.valid) and np.all(after.observed)
    # After an end, the next episode's first observation; elsewhere, the last one.
    assert np.all(after.obs[after.done][:, 1] == 0) and np.all(np.abs(after.obs[after.done][:, 0]) <= 1)
    np.testing.assert_array_equal(after.obs[~after.done], after.final_obs[~after.done])
    np.testing.assert_array_equal(states.obs, np.stack(states.inner.state, axis=-1))
    # Starts are drawn anew.
    assert len(np.unique(after.obs[after.done][:, 0])) == 3
    moved = np.diff(np.stack([states.obs[:-1, :, 0], place]), axis=0)
    assert set(np.unique(moved)) == {-1, 1} and abs(moved.mean()) < 5 / np.sqrt(moved.size)


def test_flicker_blanks_the_final_observation_with_the_observation():
    batch = Flicker(Batched(Walk(), 200), 0.4, keep_view=True)
    actions = actions_for(batch, num_envs=200)
    first = batch.reset(jax.random.PRNGKey(6))
    states, plain = play(batch, first, actions), play(batch.env, first._replace(inner=first.inner[0]), actions)
    for name in ("obs", "final_obs"):
        shown, seen = getattr(states, name)[1:], states.observed[1:]
        assert not np.any(shown[~seen])
        np.testing.assert_array_equal(shown[seen], getattr(plain, name)[1:][seen])
    for name in ("reward", "done", "truncated", "valid", "game_over"):
        np.testing.assert_array_equal(getattr(states, name)[1:], getattr(plain, name)[1:])
    view = batch.view(states)
    np.testing.assert_array_equal(view["place"][1:], plain.inner.state.place[1:])
    np.testing.assert_array_equal(view["obs"][1:], plain.obs[1:])


def test_a_batch_shows_what_its_environments_show():
    batch = Batched(Walk(), 4)
    state = batch.reset(jax.random.PRNGKey(7))
    view = batch.view(state)
    assert_same(view, {"place": state.inner.state.place, "obs": state.obs})
    np.testing.assert_array_equal(recall(4).view(state), state.obs)


def test_as_batch_leaves_a_batch_as_it_is():
    batch = recall(3)
    assert as_batch(batch, 5) is batch
    made = as_batch(MountainHike(), 5)
    assert (made.num_envs, made.name, made.restorable, type(made.env)) == (5, "MountainHike", True, MountainHike)
    assert pictures.find_painter(made, is_image=False) is not None
    assert made.steps_per_second == MountainHike.steps_per_second


def test_one_environment_can_be_trained_in_as_it_is():
    config = tiny_config("rnn", log__interval=2)
    state, history = dvrl_jax.make_train(config, Recall())(num_updates=4)
    _, expected = dvrl_jax.make_train(config, recall(config.num_envs))(num_updates=4)
    assert history == expected and int(state.env_steps) == 4 * config.num_envs * config.num_steps
    agent = dvrl_jax.trained_agent(config, Recall(), state)
    seen = dvrl_jax.watch(agent, recall(7), jax.random.PRNGKey(0), steps=12)
    assert seen.obs.shape == (12, 7, 2) and seen.game_over.sum() == 14


def test_an_environment_is_made_from_its_settings():
    config = tiny_hike("rnn", env__observation_std=0.15).env
    assert MountainHike.from_config(config).observation_std == 0.15
    assert MountainHike.observation_of(config) == MountainHike.observation
    batch = make_env(config, 3, seed=0)
    assert batch.num_envs == 3 and batch.env.observation_std == 0.15
