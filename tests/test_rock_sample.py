"""RockSample against its rules written again in NumPy, its belief against enumeration, its planners against routes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rock_sample as configuration
from dvrl_jax.envs import Batched, find
from dvrl_jax.envs import rock_sample as task
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import pictures, recording
from dvrl_jax.viewing.pictures import rocks as rock_pictures
from evidence import rock_planner, rock_sample

# The map of 5x5, a row a line from the north: rocks by number.
MAP = ["1.0..", "...2.", "..3..", "....4", "....."]
ROCKS = {int(cell): (y, x) for y, line in enumerate(MAP) for x, cell in enumerate(line) if cell != "."}


def rules(place, good, action):
    """Place and rocks after a step on 5x5, its reward, and whether it left the map."""
    (y, x), good = place, list(good)
    down, right = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}.get(action, (0, 0))
    if x + right == 5:
        return (y, 5), good, 10.0, True
    y, x = min(max(y + down, 0), 4), max(x + right, 0)
    reward = 0.0
    for rock, where in ROCKS.items():
        if action == 4 and where == (y, x):
            reward, good[rock] = (10.0 if good[rock] else -10.0), False
    return (y, x), good, reward, False


@pytest.fixture(scope="module")
def step():
    """Steps of many environments from any states, compiled once."""
    return jax.jit(jax.vmap(task.RockSample("5x5", rock_sample_steps=20).step))


def test_every_action_in_every_cell_does_what_the_rules_say(step):
    rng = np.random.default_rng(0)
    cases = [(y, x, a) for y in range(5) for x in range(5) for a in range(10) for _ in range(4)]
    y, x, action = np.array(cases).T
    good, time = rng.random((len(cases), 5)) < 0.5, rng.integers(0, 20, len(cases))
    state = task.RockState(jnp.stack([y, x], -1).astype(jnp.int32), jnp.asarray(good), jnp.asarray(time, jnp.int32))
    keys = jax.random.split(jax.random.key(0), len(cases))
    after = jax.tree.map(np.asarray, step(keys, state, jnp.asarray(action, jnp.int32)))
    for i, (y, x, action) in enumerate(cases):
        place, left_good, reward, left = rules((y, x), good[i], action)
        assert tuple(after.state.position[i].tolist()) == place and after.reward[i] == reward
        assert after.state.good[i].tolist() == left_good and after.terminated[i] == left
        row, column, readings = np.split(after.obs[i], [5, 10])
        np.testing.assert_array_equal(row, np.arange(5) == place[0])
        np.testing.assert_array_equal(column, np.arange(5) == place[1])
        assert np.flatnonzero(readings).tolist() == ([action - 5] if action >= 5 else [])
        assert set(np.abs(readings)) <= {0.0, 1.0}
    np.testing.assert_array_equal(after.truncated, time == 19)


def test_a_reading_is_right_as_often_as_the_distance_says(step):
    many = 40_000
    place, rock = (4, 0), 4  # At (3, 4), and right on it.
    for (y, x), distance in ((place, np.sqrt(17)), (ROCKS[rock], 0.0)):
        good = np.arange(many) % 2 == 0
        state = task.RockState(
            jnp.tile(jnp.array([y, x], jnp.int32), (many, 1)),
            jnp.asarray(np.repeat(good[:, None], 5, axis=1)),
            jnp.zeros(many, jnp.int32),
        )
        action = jnp.full(many, 5 + rock, jnp.int32)
        reading = np.asarray(step(jax.random.split(jax.random.key(1), many), state, action).obs[:, 10 + rock])
        accuracy = (1 + 2 ** (-distance / 20)) / 2
        for kind in (good, ~good):
            right = (reading[kind] > 0) == good[kind]
            assert abs(right.mean() - accuracy) <= 5 * np.sqrt(accuracy * (1 - accuracy) / kind.sum())


@pytest.fixture(scope="module")
def episodes():
    """States [T + 1, B] of 6 episodes on 5x5 under the same actions [T]: checks from afar and near, and samples."""
    north, east, south, sample = 0, 1, 2, 4
    actions = [
        5,
        6,
        7,
        8,
        9,
        6,
        north,
        north,
        6,
        sample,
        6,
        sample,
        east,
        5,
        east,
        5,
        sample,
        south,
        south,
        8,
        sample,
        8,
    ]
    batch = Batched(task.RockSample("5x5"), 6)

    def scan(state, actions):
        def step(state, action):
            after = batch.step(state, jnp.full(6, action, jnp.int32))
            return after, after

        return jax.lax.scan(step, state, actions)[1]

    first = batch.reset(jax.random.PRNGKey(3))
    after = jax.jit(scan)(first, jnp.array(actions))
    return np.array(actions), jax.tree.map(lambda a, b: np.concatenate([a[None], b]), first, after)


def record(actions, states, episode):
    """What a recording of one of the episodes would have, with made-up beliefs, values and policies."""
    steps, rng = len(actions), np.random.default_rng(0)
    inner = states.inner.state
    rocks = np.broadcast_to([ROCKS[i] for i in range(5)], (steps, 5, 2))
    return recording.Recording(
        view=task.RockView(inner.position[:-1, episode], inner.good[:-1, episode], rocks),
        obs=states.obs[:-1, episode],
        observed=np.ones(steps, bool),
        predictions={},
        particles=None,
        weights=None,
        value=rng.normal(size=steps),
        policy=rng.dirichlet(np.ones(10), steps),
        action=actions,
        reward=states.reward[1:, episode],
    )


def test_the_exact_belief_is_what_enumeration_gives(episodes):
    """All 32 combinations of rocks, each with the probability of all that was read and paid so far."""
    actions, states = episodes
    for episode in range(6):
        combinations = [list(good) for good in itertools.product([False, True], repeat=5)]
        weight, place, expected = np.full(32, 1 / 32), (2, 0), [np.full(5, 0.5)]
        for t, action in enumerate(actions):
            after = [rules(place, good, action) for good in combinations]
            place, combinations = after[0][0], [good for _, good, _, _ in after]
            weight *= [reward == states.reward[t + 1, episode] for _, _, reward, _ in after]
            if action >= 5:
                distance = np.hypot(*(np.array(place) - ROCKS[action - 5]))
                says_good = states.obs[t + 1, episode, 5 + action] > 0  # The readings follow 10 numbers.
                right = np.array([good[action - 5] == says_good for good in combinations])
                accuracy = (1 + 2 ** (-distance / 20)) / 2
                weight *= np.where(right, accuracy, 1 - accuracy)
            weight /= weight.sum()
            expected.append(weight @ np.array(combinations))
        belief = rock_pictures.exact_belief(record(actions, states, episode))
        np.testing.assert_allclose(belief, expected[:-1], atol=1e-5)
    assert np.any((np.array(expected) > 0.02) & (np.array(expected) < 0.45))


def test_pictures_show_the_belief_of_each_step(episodes):
    recorded = record(*episodes, 0)
    painter = pictures.find_painter(find("RockSample"), is_image=False)
    frames = list(itertools.islice(painter.frames(recorded), 2))
    assert frames[0].shape == frames[1].shape and np.any(frames[0] != frames[1])
    assert painter.still(recorded).shape == frames[0].shape
    obs = recorded.obs[:3]
    assert painter.predictions(obs, np.array([True, False, True]), {0: obs, 5: 0.5 * obs}).shape[-1] == 3


@pytest.mark.parametrize("size", task.LAYOUTS)
def test_a_size_has_its_rocks_and_shapes(size):
    env = task.RockSample(size, rock_sample_random_start=True)
    n, k = (int(number) for number in size.split("x"))
    assert len(set(env.rocks)) == k and all(0 <= z < n for rock in env.rocks for z in rock)
    assert env.observation.shape == (2 * n + k,) and env.action.size == 5 + k
    batch = Batched(env, 2)
    state = jax.eval_shape(batch.reset, jax.random.key(0))
    jax.eval_shape(batch.step, state, jax.ShapeDtypeStruct((2,), jnp.int32))  # Checks shapes and types as it is traced.


def test_starts_are_in_the_west_or_anywhere_and_half_of_the_rocks_are_good():
    keys = jax.random.split(jax.random.key(0), 5000)
    state, obs = jax.vmap(task.RockSample("5x5").reset)(keys)
    assert np.all(np.asarray(state.position) == (2, 0)) and not np.any(obs[:, 10:])
    assert np.all(np.abs(np.mean(state.good, axis=0) - 0.5) < 5 * 0.5 / np.sqrt(5000))
    anywhere = np.asarray(jax.vmap(task.RockSample("5x5", 200, True).reset)(keys)[0].position)
    assert len(np.unique(anywhere, axis=0)) == 25 and anywhere.min() == 0 and anywhere.max() == 4


def test_the_state_vector_tells_the_place_and_every_rock():
    state = task.RockState(jnp.array([1, 3]), jnp.array([True, False, True, True, False]), jnp.int32(7))
    vector = task.RockSample("5x5").state_vector(state)
    np.testing.assert_array_equal(vector, [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, -1, 1, 1, -1])


@pytest.mark.parametrize("argument", ["7x8,rnn", "15x15", "5x5,dvrl"])
def test_the_configuration_takes_a_size_and_an_agent(argument):
    config = config_lib.from_fields(config_lib.flatten(configuration.get_config(argument)))
    size, _, agent = argument.partition(",")
    assert (config.env.rock_sample_size, config.algorithm) == (size, agent or "dvrl")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("rock_sample_size", "9x9", "one of 5x5, 7x8, 11x11, 15x15"), ("rock_sample_steps", 0, "at least 1")],
)
def test_an_impossible_setting_is_named(field, value, message):
    fields = config_lib.flatten(configuration.get_config()) | {f"env.{field}": value}
    with pytest.raises(ConfigError, match=rf"env\.{field} = '?{value}'?: must be {message}"):
        config_lib.from_fields(fields)


# --- Planners --------------------------------------------------------------------------------------------------------


def best_route(good, gamma):
    """The best discounted return on 5x5 from the start when rocks are seen: all orders of all sets of good ones."""
    best = 0.0
    for count in range(sum(good) + 1):
        for order in itertools.permutations([i for i in range(5) if good[i]], count):
            (y, x), time, value = (2, 0), 0, 0.0
            for rock in order:
                time += abs(ROCKS[rock][0] - y) + abs(ROCKS[rock][1] - x)
                (y, x), value, time = ROCKS[rock], value + 10 * gamma**time, time + 1
            best = max(best, value + 10 * gamma ** (time + 4 - x))
    return best


@pytest.fixture(scope="module")
def model():
    return rock_planner.make_model(task.RockSample("5x5"))


def test_seen_rocks_are_visited_on_the_best_route(model):
    for gamma in (0.95, 0.8):
        values = np.max(rock_planner.qmdp(model, gamma)[2 * 6], axis=-1)
        for rocks in (0, 1, 6, 21, 31):
            assert values[rocks] == pytest.approx(best_route([rocks >> i & 1 for i in range(5)], gamma), rel=1e-5)


def test_a_backup_is_a_step_of_lookahead_at_its_points(model):
    """Tables over all combinations of rocks against the belief's own update, rock by rock."""
    env, gamma, rng = task.RockSample("5x5"), 0.9, np.random.default_rng(0)
    beliefs = jnp.asarray(rng.choice([0.0, 0.3, 0.5, 0.9, 1.0], (30, 8, 5)), jnp.float32)
    leaving = rock_planner.first_vectors(model, env, gamma, 8)
    points = rock_planner.joint(beliefs)
    before = rock_planner.back_up(model, points, leaving, gamma, 6)
    after = rock_planner.back_up(model, points, before, gamma, 1)
    place = jnp.array([(y, x) for y in range(5) for x in range(6)])
    values = jax.vmap(jax.vmap(lambda *x: rock_planner.action_values(env, before, gamma, *x), (None, 0)), (0, 0))
    expected = np.max(jax.jit(values)(place, beliefs), axis=-1)
    value = lambda vectors: np.asarray(jnp.max(jnp.einsum("cms,csj->cmj", points, vectors), axis=-1))
    inside = np.asarray(place)[:, 1] < 5
    # A backup keeps what the point had, should it be better.
    np.testing.assert_allclose(value(after)[inside], np.maximum(expected, value(before))[inside], rtol=1e-5)
    bound = value(rock_planner.qmdp(model, gamma))
    assert np.all(value(after) <= bound + 1e-4) and np.mean(value(after)[inside] > value(leaving)[inside] + 1) > 0.5


def test_points_are_the_beliefs_met_most_often():
    cells, beliefs = np.array([1, 1, 1, 2]), np.array([[0.25], [0.75], [0.75], [0.125]])
    points = rock_planner.choose_points(cells, beliefs, 1, 3)
    np.testing.assert_array_equal(points, [[[0.5]], [[0.75]], [[0.125]]])


def test_who_leaves_at_once_is_paid_for_leaving(model):
    env = task.RockSample("5x5")
    leaving = rock_planner.first_vectors(model, env, 0.9, 1)
    result = rock_sample.evaluate("leaves", env, leaving, 0.9, 2, seed=0)
    # Bad rocks on the way stay where they are, and checking tells nothing that this policy can use.
    assert result.mean == pytest.approx((10 * 0.9**4, 10.0, 5.0)) and result.standard_error == pytest.approx((0, 0, 0))
    assert "| 5x5 | leaves | 6.56 ± 0.00 | 10.00 ± 0.00 | 5.00 ± 0.00 |" in rock_sample.table({"5x5": [result]}, 0.9)
