"""The aliased hike: readings that fit several places, and the exact belief about them; the hike with distractors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from configs import aliased_hike as aliased_configuration
from configs import distractor_hike as distractor_configuration
from dvrl_jax.envs import Batched, MountainHike, find, hike_grid
from dvrl_jax.envs import aliased_hike as task
from dvrl_jax.envs.mountain_hike import height_reward
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import pictures, recording
from dvrl_jax.viewing.pictures import aliased as aliased_pictures
from evidence import aliased_hike as reference
from evidence import planner

STD, STEPS, EPISODES, SPACING = 0.3, 26, 16, 0.05
MIRRORS = [np.array(signs) for signs in itertools.product([1.0, -1.0], repeat=2)]


@pytest.fixture(scope="module")
def hikes():
    """Actions, observations, positions, beliefs, modes, each [2, EPISODES, T, ...]; at random, and always east."""
    rng = np.random.default_rng(0)
    at_random = rng.normal(size=(STEPS, EPISODES, 2))
    actions = jnp.asarray([at_random, np.broadcast_to([0.05, 0.0], at_random.shape)], jnp.float32)
    batch = Batched(task.AliasedHike(STD), EPISODES)

    def play(actions):
        def step(state, action):
            return batch.step(state, action), (state.obs, state.inner.state.position)

        obs, position = jax.lax.scan(step, batch.reset(jax.random.PRNGKey(0)), actions)[1]
        track = lambda obs, action: task.track(obs, action, STD, SPACING)
        belief = jax.lax.map(lambda x: track(*x), (jnp.swapaxes(obs, 0, 1), jnp.swapaxes(actions, 0, 1)))
        modes = jax.vmap(jax.vmap(hike_grid.count_modes))(belief)
        return jnp.swapaxes(obs, 0, 1), jnp.swapaxes(position, 0, 1), belief, modes

    obs, position, belief, modes = jax.tree.map(np.asarray, jax.jit(lambda a: jax.lax.map(play, a))(actions))
    return np.swapaxes(actions, 1, 2), obs, position, belief, modes


def particle_filter(obs, actions, rng, particles=200_000):
    """Probabilities of the quarters (x < 0, then y < 0 first), and the mean of the distance to the centre, [T, 5]."""
    corners = np.array([[x, y] for x in (-0.85, 0.85) for y in (-0.85, 0.85)])
    position = corners[rng.integers(0, 4, particles)] + 0.1 * rng.standard_normal((particles, 2))
    found = []
    for reading, action in zip(obs, actions, strict=True):
        distances = np.sort(np.stack([np.hypot(position[:, 0] - x, position[:, 1]) for x in (-1, 1)], -1), axis=-1)
        log_weight = -0.5 * np.sum((reading / 10 - distances) ** 2, axis=-1) / STD**2
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        quarter = 2 * (position[:, 0] > 0) + (position[:, 1] > 0)
        far = weight @ np.hypot(*position.T)
        found.append([*np.bincount(quarter, weight, minlength=4), far])
        chosen = np.minimum(
            np.searchsorted(np.cumsum(weight), (rng.random() + np.arange(particles)) / particles), particles - 1
        )
        move = action * min(1.0, 0.05 / max(np.linalg.norm(action), 1e-12))
        position = position[chosen] + move + 0.025 * rng.standard_normal((particles, 2))
    return np.array(found)


def test_the_belief_on_the_grid_agrees_with_many_particles(hikes):
    actions, obs, _, belief, _ = hikes
    axis = hike_grid.centres(SPACING)
    far = np.hypot(*np.meshgrid(axis, axis))
    for kind, episode in ((0, 0), (0, 1), (1, 2)):
        expected = particle_filter(obs[kind, episode, :12], actions[kind, episode, :12], np.random.default_rng(1))
        found = belief[kind, episode, :12]
        np.testing.assert_allclose(aliased_pictures.quarters(found), expected[:, :4], atol=0.02)
        np.testing.assert_allclose(np.sum(found * far, axis=(1, 2)), expected[:, 4], atol=0.01)
        np.testing.assert_allclose(found.sum(axis=(1, 2)), 1.0, rtol=1e-5)


def test_the_belief_has_several_modes_for_many_steps(hikes):
    *_, modes = hikes
    assert np.all(modes[:, :, 0] == 4)
    assert np.mean(modes[0, :, 10] >= 2) >= 0.9 and np.mean(modes[0, :, 10]) > 2.5


def test_walking_along_an_axis_tells_its_ends_apart_and_not_those_of_the_other(hikes):
    *_, position, belief, _ = hikes
    quarters = np.stack([aliased_pictures.quarters(one) for one in belief[1]])[:, -1].reshape(EPISODES, 2, 2)
    in_the_east = quarters.sum(axis=2)[:, 1]
    started_west = position[1, :, 0, 0] < 0
    assert 0 < started_west.sum() < EPISODES
    assert np.all(in_the_east[~started_west] > 0.9)
    in_the_south = quarters.sum(axis=1)[:, 0]
    assert np.all((in_the_south > 0.1) & (in_the_south < 0.9))


def test_mirrored_places_read_alike_and_pay_differently():
    place = np.array([0.6, 0.5])
    for mirror in MIRRORS:
        expected = [np.hypot(0.4, 0.5), np.hypot(1.6, 0.5)]
        np.testing.assert_allclose(task.beacon_distances(jnp.asarray(mirror * place)), expected, rtol=1e-6)
    rewards = [float(height_reward(jnp.asarray(mirror * place))) for mirror in MIRRORS]
    assert np.min(np.abs(np.subtract.outer(rewards, rewards))[~np.eye(4, dtype=bool)]) > 0.2


@pytest.mark.parametrize(("kind", "corners"), [(task.AliasedHike, 4), (task.DistractorHike, 3)])
def test_starts_are_spread_evenly_over_the_corners(kind, corners):
    many = 6000
    state, _ = jax.vmap(kind().reset)(jax.random.split(jax.random.key(0), many))
    position = np.asarray(state.position)
    found, counts = np.unique(np.sign(position), axis=0, return_counts=True)
    assert len(found) == corners and (-1, -1) in [tuple(one) for one in found]
    assert np.all(np.abs(counts / many - 1 / corners) < 5 * np.sqrt(1 / corners / many))
    noise = (np.abs(position) - 0.85) / 0.1
    assert abs(noise.mean()) < 5 / np.sqrt(2 * many) and abs(noise.std() - 1) < 5 / np.sqrt(4 * many)
    assert len(kind.starts) == corners and (corners == 4 or (-0.85, 0.85) not in kind.starts)


def test_distractors_say_nothing_and_the_rest_is_mountain_hike():
    env, many = task.DistractorHike(0.0, distractor_dims=3, distractor_size=0.5), 4000
    keys = jax.random.split(jax.random.key(1), many)
    state, first = jax.vmap(env.reset)(keys)
    action = jnp.full((many, 2), 0.02)
    keys = jax.random.split(jax.random.key(2), many)
    step = jax.vmap(env.step)(keys, state, action)
    np.testing.assert_array_equal(step.obs[:, :2], 10 * step.state.position)
    plain = jax.vmap(MountainHike().step)(jax.vmap(lambda key: jax.random.split(key)[0])(keys), state, action)
    np.testing.assert_allclose(step.reward, plain.reward, rtol=1e-6)
    for distractors in (np.asarray(first[:, 2:]), np.asarray(step.obs[:, 2:])):
        assert distractors.shape == (many, 3) and np.abs(distractors).max() <= 5.0
        assert np.all(np.abs(distractors.std(axis=0) - 10 / np.sqrt(12)) < 0.2)
        assert np.all(np.abs(np.corrcoef(distractors.T, step.obs[:, :2].T) - np.eye(5))[:3] < 5 / np.sqrt(many))
    assert not np.any(first[:, 2:] == step.obs[:, 2:])


def test_expected_outlooks_are_those_of_the_places_believed_in():
    rng, spacing, n = np.random.default_rng(0), 0.05, 12
    outlook, actions = rng.normal(size=(n, n)), planner.action_set(5)
    places = [(0.25, (4, 5)), (0.75, (6, 2))]  # Probability and cell.
    belief = np.zeros((n, n))
    expected = np.zeros(len(actions))
    for probability, cell in places:
        belief[cell] = probability
        expected += probability * ndimage.map_coordinates(outlook, (cell + actions / spacing).T, order=1)
    found = reference.expected_outlooks(jnp.asarray(outlook), jnp.asarray(belief), actions, spacing)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_configurations_name_their_hikes_and_agents():
    for module, name in ((aliased_configuration, "AliasedHike"), (distractor_configuration, "DistractorHike")):
        for agent in ("dvrl", "rnn"):
            config = config_lib.from_fields(config_lib.flatten(module.get_config(agent)))
            assert (config.env.name, config.algorithm) == (name, agent)
    fields = config_lib.flatten(distractor_configuration.get_config()) | {"env.distractor_dims": -1}
    with pytest.raises(ConfigError, match=r"env\.distractor_dims = -1: must be at least 0"):
        config_lib.from_fields(fields)


def test_pictures_show_the_belief_of_each_step(hikes):
    actions, obs, position, *_ = hikes
    rng, steps = np.random.default_rng(0), 9
    weights = rng.dirichlet(np.ones(3), steps)
    recorded = recording.Recording(
        view=task.AliasedView(position[0, 0, :steps], np.full(steps, STD, np.float32)),
        obs=obs[0, 0, :steps],
        observed=np.arange(steps) != 1,
        predictions={},
        particles=rng.uniform(5, 20, (steps, 3, 2)),
        weights=weights,
        value=rng.normal(size=steps),
        policy=actions[0, 0, :steps],
        action=actions[0, 0, :steps],
        reward=np.ones(steps),
    )
    belief = aliased_pictures.exact_belief(recorded)
    # A blank observation leaves the belief as the move has made it.
    moved = hike_grid.predict(jnp.asarray(belief[0]), recorded.action[0], hike_grid.centres())
    np.testing.assert_allclose(belief[1], moved, atol=1e-6)
    assert np.abs(belief[2] - belief[1]).sum() > 0.1
    painter = pictures.find_painter(find("AliasedHike"), is_image=False)
    first, second = itertools.islice(painter.frames(recorded), 2)
    assert first.shape == second.shape and np.any(first != second)
    assert painter.still(recorded).shape[-1] == 3
    assert painter.predictions(recorded.obs[:2], np.array([True, False]), {0: recorded.obs[:2]}).shape[-1] == 3
