"""Mountain Hike against a NumPy version written from the task's description alone, and against its statistics.

Statistics are taken over many environments; the tolerance is five standard errors of each estimate.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax.envs import Batched, MountainHike

MANY = 40_000
SIGMAS = [0.0, 0.15, 0.3]


# --- The task in NumPy -----------------------------------------------------------------------------------------------


def normal_density(point, mean, std):
    """Density of N(mean, diag(std^2)) at point, in two dimensions."""
    deviation = (np.asarray(point) - np.asarray(mean)) / np.asarray(std)
    return np.exp(-0.5 * np.sum(deviation**2, axis=-1)) / (2 * np.pi * std[0] * std[1])


def surface(point):
    """Reward of a position [..., 2] without the action's penalty."""
    point = np.asarray(point, np.float64)
    z = np.max(
        [
            1.0 * normal_density(point, (0.5, 0.5), (0.75, 0.1)) / 3,
            0.8 * normal_density(point, (0.0, 0.2), (0.1, 0.75)) / 3,
            0.55 * normal_density(point, (-0.375, -0.5), (0.75, 0.1)) / 3,
        ],
        axis=0,
    )
    reward = 4 * (1 - (1 - z) ** 4) - 4.5 + (point[..., 0] + point[..., 1]) / 4
    return np.where(np.all(np.abs(point) <= 1, axis=-1), reward, -6.0)


def clipped(action):
    """Actions [..., 2] shortened to a norm of 0.05."""
    action = np.asarray(action, np.float64)
    norm = np.sqrt(np.sum(action**2, axis=-1, keepdims=True))
    return np.where(norm > 0.05, 0.05 * action / np.where(norm > 0, norm, 1), action)


# --- Helpers ---------------------------------------------------------------------------------------------------------


def hikers(num_envs, observation_std):
    return Batched(MountainHike(observation_std), num_envs)


def start_at(env, position, key=0):
    """A state with the given positions [B, 2], everything else as after `reset`."""
    state = env.reset(jax.random.key(key))
    return with_hike(state, position=jnp.asarray(position, jnp.float32))


def with_hike(state, **fields):
    """The same state with these fields of `HikeState` [B, ...]."""
    return state._replace(inner=state.inner._replace(state=state.inner.state._replace(**fields)))


def play(env, actions, key=0):
    """The first state and the stacked states of an episode under actions [T, B, 2]."""
    first = env.reset(jax.random.key(key))

    @jax.jit
    def scan(state, actions):
        def step(state, action):
            state = env.step(state, action)
            return state, state

        return jax.lax.scan(step, state, actions)[1]

    return first, scan(first, jnp.asarray(actions, jnp.float32))


def assert_standard_normal(sample, name):
    """Each column of sample [N, D] has mean 0, variance 1 and a normal's kurtosis, uncorrelated with the others."""
    n = len(sample)
    assert np.max(np.abs(sample.mean(axis=0))) < 5 / np.sqrt(n), f"{name}: mean"
    assert np.max(np.abs(sample.var(axis=0) - 1)) < 5 * np.sqrt(2 / n), f"{name}: variance"
    kurtosis = np.mean(sample**4, axis=0)  # 3 for a normal; the variance of x^4 is 105 - 9 = 96.
    assert np.max(np.abs(kurtosis - 3)) < 5 * np.sqrt(96 / n), f"{name}: kurtosis"
    products = sample.T @ sample / n
    assert np.max(np.abs(products - np.diag(np.diag(products)))) < 5 / np.sqrt(n), f"{name}: correlation"


def random_actions(seed, *shape, norm=0.15):
    """Actions [..., 2] of norms between 0 and `norm`, in all directions."""
    rng = np.random.default_rng(seed)
    angle, length = rng.uniform(0, 2 * np.pi, shape), rng.uniform(0, norm, shape)
    return (length[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)).astype(np.float32)


# --- Reward ----------------------------------------------------------------------------------------------------------


def test_surface_known_values():
    """The reference itself, by hand: on the ridges' centres only their own densities matter, outside it is -6."""
    peak = 1 / (2 * np.pi * 0.75 * 0.1 * 3)
    np.testing.assert_allclose(surface((0.5, 0.5)), 4 * (1 - (1 - peak) ** 4) - 4.5 + 0.25)
    np.testing.assert_allclose(surface((-0.375, -0.5)), 4 * (1 - (1 - 0.55 * peak) ** 4) - 4.5 - 0.875 / 4)
    np.testing.assert_allclose(surface([(1.01, 0), (0, -1.5), (-2, 2)]), -6)
    assert surface((1.0, -1.0)) > -6


def test_reward_on_a_grid_inside_and_outside_the_box():
    """A step's reward is the surface at the position reached: the grid is where the step starts."""
    side = np.linspace(-1.3, 1.3, 105)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    env = hikers(len(grid), 0.0)
    state = jax.jit(env.step)(start_at(env, grid), jnp.zeros((len(grid), 2)))
    reached = np.asarray(state.inner.state.position)
    outside = np.any(np.abs(reached) > 1, axis=-1)
    assert 0.2 < outside.mean() < 0.8
    assert np.all(np.asarray(state.reward)[outside] == -6)
    np.testing.assert_allclose(state.reward, surface(reached), atol=2e-5)


def test_penalty_is_a_tenth_of_the_norm_before_clipping():
    actions = random_actions(1, 1000, norm=3.0)
    env = hikers(1000, 0.0)
    start = start_at(env, np.random.default_rng(2).uniform(-0.9, 0.9, (1000, 2)))
    state = env.step(start, jnp.asarray(actions))
    norm = np.linalg.norm(actions.astype(np.float64), axis=-1)
    np.testing.assert_allclose(state.reward, surface(state.inner.state.position) - 0.1 * norm, atol=2e-5)


def test_penalty_is_paid_outside_the_box_too():
    env = hikers(3, 0.0)
    state = env.step(start_at(env, np.full((3, 2), 5.0)), jnp.array([[1.0, 0.0], [0.0, 0.03], [0.0, 0.0]]))
    np.testing.assert_allclose(state.reward, [-6.1, -6.003, -6.0], rtol=1e-6)


def test_reward_of_the_last_step_is_for_the_position_reached_not_for_the_new_start():
    env = hikers(500, 0.3)
    state = start_at(env, np.random.default_rng(3).uniform(-1, 1, (500, 2)))
    action = jnp.asarray(random_actions(4, 500))
    last = with_hike(state, time=jnp.full(500, 74, jnp.int32))
    usual, ending = env.step(state, action), env.step(last, action)
    assert np.all(ending.done) and not np.any(usual.done)
    np.testing.assert_array_equal(ending.reward, usual.reward)


# --- Movement --------------------------------------------------------------------------------------------------------


def test_actions_move_by_at_most_a_norm_of_a_twentieth():
    """The same key gives the same noise, so the difference to a step without action is the action's effect."""
    actions = np.concatenate([random_actions(5, 500), random_actions(6, 500, norm=50.0), [[0.0, 0.0], [0.03, -0.04]]])
    env = hikers(len(actions), 0.0)
    state = start_at(env, np.zeros((len(actions), 2)))
    moved = env.step(state, jnp.asarray(actions, jnp.float32)).inner.state.position
    unmoved = env.step(state, jnp.zeros_like(moved)).inner.state.position
    effect = np.asarray(moved) - np.asarray(unmoved)
    np.testing.assert_allclose(effect, clipped(actions), atol=1e-7)
    assert np.linalg.norm(effect, axis=-1).max() < 0.05 + 1e-6


def test_transition_noise_is_normal_with_the_right_deviation():
    env = hikers(MANY, 0.3)
    first, states = play(env, random_actions(7, 2, MANY))
    positions = np.stack([first.inner.state.position, *states.inner.state.position]).astype(np.float64)
    noise = np.diff(positions, axis=0) - clipped(random_actions(7, 2, MANY))
    # Both coordinates of both steps: independent of each other, too.
    assert_standard_normal(np.concatenate(list(noise / 0.025), axis=-1), "transition noise")


def test_positions_are_not_confined_to_the_box():
    env = hikers(100, 0.0)
    _, states = play(env, np.full((74, 100, 2), -1.0))
    np.testing.assert_array_less(states.inner.state.position[-1], -2.0)


# --- Start and observation -------------------------------------------------------------------------------------------


def test_start_is_normal_around_the_lower_left():
    position = np.asarray(hikers(MANY, 0.0).reset(jax.random.key(8)).inner.state.position, np.float64)
    assert_standard_normal((position + 0.85) / 0.1, "start")


@pytest.mark.parametrize("sigma", SIGMAS)
def test_observation_is_ten_times_the_noisy_position(sigma):
    env = hikers(MANY, sigma)
    first, states = play(env, random_actions(9, 2, MANY))
    positions = np.stack([first.inner.state.position, *states.inner.state.position])
    observations = np.stack([first.obs, *states.obs])
    if sigma == 0:
        np.testing.assert_array_equal(observations, np.float32(10) * positions)
        return
    noise = (observations.astype(np.float64) / 10 - positions) / sigma
    moves = np.diff(positions, axis=0).astype(np.float64) - clipped(random_actions(9, 2, MANY))
    # The readings' noise is independent from one reading to the next, of the start, and of the movements.
    sample = [*noise, *(moves / 0.025), (positions[0] + 0.85) / 0.1]
    assert_standard_normal(np.concatenate(sample, axis=-1), "observation noise")


@pytest.mark.parametrize("sigma", [0.15, 0.3])
def test_reading_noise_does_not_change_where_one_is(sigma):
    exact, noisy = (play(hikers(50, s), random_actions(10, 80, 50)) for s in (0.0, sigma))
    np.testing.assert_array_equal(exact[1].inner.state.position, noisy[1].inner.state.position)
    np.testing.assert_array_equal(exact[1].reward, noisy[1].reward)


# --- Episodes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_episodes():
    """Always up and right, for three episodes and two steps."""
    return play(hikers(2000, 0.0), np.full((3 * 75 + 2, 2000, 2), 0.04))


def test_reset_reports_an_episodes_beginning(three_episodes):
    first, _ = three_episodes
    assert not np.any(first.done) and not np.any(first.game_over) and not np.any(first.reward)
    assert np.all(first.valid) and np.all(first.observed) and not np.any(first.true_reward)


def test_episodes_last_exactly_75_steps(three_episodes):
    _, states = three_episodes
    expected = np.zeros((3 * 75 + 2, 2000), bool)
    expected[[74, 149, 224]] = True
    np.testing.assert_array_equal(states.done, expected)
    np.testing.assert_array_equal(states.game_over, expected)
    np.testing.assert_array_equal(states.truncated, expected)  # By the time limit: no state of the hike is terminal.
    np.testing.assert_array_equal(states.true_reward, states.reward)
    # There is no call that only delivers a new episode: every one is a step.
    assert np.all(states.valid)


def test_observation_after_the_end_is_a_new_episodes_start(three_episodes):
    _, states = three_episodes
    for end in (74, 149, 224):
        before, start, after = (np.asarray(states.obs[t], np.float64) / 10 for t in (end - 1, end, end + 1))
        assert before.min() > 0.5  # Far from the start: at 1.8 on average, with a standard deviation of 0.24.
        assert_standard_normal((start + 0.85) / 0.1, f"start after step {end}")
        # And the new episode goes on from there.
        assert_standard_normal((after - start - 0.05 / np.sqrt(2)) / 0.025, "first move")
    starts = [np.asarray(states.obs[t]) for t in (74, 149, 224)]
    assert not np.any(starts[0] == starts[1]) and not np.any(starts[1] == starts[2])


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_same_key_gives_the_same_episode_and_another_key_another():
    env, actions = hikers(8, 0.3), random_actions(11, 100, 8)
    (first, states), (first_again, states_again), (first_other, states_other) = (
        play(env, actions, key) for key in (1, 1, 2)
    )
    for name in ("obs", "reward", "done"):
        np.testing.assert_array_equal(getattr(states, name), getattr(states_again, name))
    np.testing.assert_array_equal(first.obs, first_again.obs)
    assert not np.any(np.asarray(first.obs) == np.asarray(first_other.obs))
    assert not np.any(np.asarray(states.obs) == np.asarray(states_other.obs))
    assert not np.any(np.asarray(states.inner.state.position) == np.asarray(states_other.inner.state.position))


def test_environments_of_a_batch_differ():
    _, states = play(hikers(8, 0.3), np.zeros((10, 8, 2)))
    position = np.asarray(states.inner.state.position[-1])
    assert len(np.unique(position[:, 0])) == 8 and len(np.unique(position[:, 1])) == 8
