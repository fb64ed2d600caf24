"""Truncated backpropagation through time: the gradient that training uses against plain autodiff of the window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvrl_jax.agents import bind
from dvrl_jax.choices import Choices
from dvrl_jax.envs import ActionSpec
from dvrl_jax.learner import make_learner
from tests import toy  # noqa: F401 (it is found by its name)
from tests.golden import Recording
from tests.tiny import tiny_config

NUM_STEPS, NUM_ENVS, MOST_SEGMENTS = 2, 3, 5

# Beliefs by name, with a policy (categorical or gaussian). Then: batch norm (bn), one particle (one), lineages not
# in use (whole), soft resampling and moment-generating features (soft).
CASES = [
    "dvrl-categorical-bn",
    "dvrl-gaussian",
    "dvrl-gaussian-whole",
    "dvrl-categorical-one",
    "rnn-gaussian-reward",
    "toy-categorical",
]
# Of these, a window of two segments alone: each case above takes long to compile.
SHORT_CASES = ["dpfrl-gaussian-soft", "dvrl-categorical-soft", "lru-gaussian"]


def recorded_episodes(discrete: bool) -> Recording:
    """Random observations, some of them blank, and rewards; episodes end in the first, a middle and the last step of
    segments."""
    rng = np.random.default_rng(0)
    steps = NUM_STEPS * MOST_SEGMENTS
    done = np.zeros((steps, NUM_ENVS), bool)
    done[0, 0] = done[3, 1] = done[6, 0] = done[6, 1] = done[9, 2] = True
    obs = rng.normal(size=(steps + 1, NUM_ENVS, 2)).astype(np.float32)
    obs[::3, 1:] = obs[1::3, 0] = 0.0
    return Recording(obs, rng.normal(size=(steps, NUM_ENVS)).astype(np.float32), done, ActionSpec(discrete, 2))


def off_the_kink(params):
    """The weights, moved a little.

    Fresh biases are 0: where all environments took the same action, batch norm leaves of it what the rounding of a
    mean leaves, and on which side of a ReLU's kink that lies is decided by the compiler.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(7), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@functools.cache
def gradient_of(learner):
    """Compiled once for all tests of a case."""
    return jax.jit(learner.gradient)


def window_of(learner, state, num_segments):
    """Acts for `num_segments` segments with fixed weights; returns what each did, and the windows."""
    gradient = gradient_of(learner)
    actor, window, results, windows = state.actor, state.window, [], []
    for place in range(num_segments):
        draws = learner.draw(jax.random.PRNGKey(place))
        grads, outcome = gradient(state.params, state.batch_stats, actor, window, place, draws)
        windows.append((actor, window, draws))
        results.append((grads, outcome, draws))
        actor, window = outcome.rollout.actor, window.put(outcome.rollout.segment, place)
    return results, windows


def unrolled_loss(params, agent, config, env, results, first):
    """The last segment's loss as one plain computation from the start of segment `first`: no window, no replay."""
    graphdef, _, stats = nnx.split(agent, nnx.Param, ...)
    segments = [outcome.rollout.segment for _, outcome, _ in results]
    belief = agent.initial(NUM_ENVS)
    for index in range(len(results)):
        segment, draws = segments[index], results[index][2]
        if index == first:
            belief = jax.lax.stop_gradient(belief)
        outputs, losses = [], []
        for t in range(NUM_STEPS):
            step_agent = bind(graphdef, params, stats)
            timestep = jax.tree.map(lambda x, t=t: x[t], segment.timesteps)
            belief = step_agent.restart(belief, timestep.is_first)
            belief, info = step_agent.update(belief, timestep, jax.tree.map(lambda x, t=t: x[t], draws.noise))
            policy, value = step_agent.heads(belief)
            action = policy.sample(seed=draws.action_keys[t])
            outputs.append((value, policy.log_prob(jax.lax.stop_gradient(action)), policy.entropy()))
            losses.append(info.losses)
    value, log_prob, entropy = (jnp.stack(x) for x in zip(*outputs, strict=True))
    advantage = results[-1][1].returns - value
    c = config.loss
    loss = c.value_coef * jnp.mean(advantage**2) - jnp.mean(jax.lax.stop_gradient(advantage) * log_prob)
    loss -= c.entropy_coef * jnp.mean(entropy)
    return loss + sum(c[f"{name}_coef"] * jnp.mean(jnp.stack([x[name] for x in losses])) for name in agent.losses)


def relative_difference(a, b):
    differences = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), a, b)
    total = sum(map(float, jax.tree.leaves(differences)))
    return (total / sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(b))) ** 0.5


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return case_of(request.param, MOST_SEGMENTS)


def case_of(name, segments):
    algorithm, policy, *more = name.split("-")
    env = recorded_episodes(policy == "categorical")
    config = tiny_config(algorithm, bptt_segments=segments, model__batch_norm="bn" in more)
    config.model.num_particles, config.model.reward_input = 1 if "one" in more else 3, "reward" in more
    if "soft" in more:
        config.model.resampling, config.model.summary = "soft", "mgf"
    learner = make_learner(config, env, Choices(lineages="whole" not in more))
    assert ("through_recurrence" in learner.way_back) == (name == "dvrl-gaussian")
    state = learner.init(jax.random.PRNGKey(3))
    state = state._replace(params=off_the_kink(state.params))
    results, windows = window_of(learner, state, segments)
    agent = nnx.merge(learner.graphdef, state.params, state.batch_stats)
    return config, env, learner, state, agent, results, windows


@pytest.mark.parametrize("name", SHORT_CASES)
def test_gradient_equals_autodiff_through_two_segments(name):
    config, env, learner, state, agent, results, windows = case_of(name, 2)
    expected = jax.jit(jax.grad(lambda p: unrolled_loss(p, agent, config, env, results, 0)))(state.params)
    assert relative_difference(results[-1][0], expected) < 1e-5
    # Of which the earlier segment has a share.
    actor, window, draws = windows[-1]
    alone, _ = gradient_of(learner)(state.params, state.batch_stats, actor, window, 0, draws)
    assert relative_difference(alone, expected) > 1e-4


def shortened(window, segments):
    """The window, as if it had started later: of its earlier segments the last `segments` only."""
    kept = MOST_SEGMENTS - 1 - segments
    return window._replace(segments=jax.tree.map(lambda x: jnp.roll(x, -kept, axis=0), window.segments)), segments


@pytest.mark.parametrize("num_segments", [1, 2, 5])
def test_gradient_equals_autodiff_through_the_unrolled_window(case, num_segments):
    config, env, learner, state, agent, results, windows = case
    actor, window, draws = windows[-1]
    shorter, place = shortened(window, num_segments - 1)
    actual, _ = gradient_of(learner)(state.params, state.batch_stats, actor, shorter, place, draws)
    first = MOST_SEGMENTS - num_segments
    expected = jax.jit(jax.grad(lambda p: unrolled_loss(p, agent, config, env, results, first)))(state.params)
    assert relative_difference(actual, expected) < 1e-5
    # A window of which the earlier segments were cut off is one that started later.
    cut = window.cut(first - 1, True)
    same, _ = gradient_of(learner)(state.params, state.batch_stats, actor, cut, MOST_SEGMENTS - 1, draws)
    assert relative_difference(same, expected) < 1e-5


def test_gradient_differs_when_a_segment_is_left_out(case):
    _, _, learner, state, _, results, windows = case
    actor, window, draws = windows[-1]
    full = results[-1][0]
    previous = None
    for length in range(MOST_SEGMENTS - 1):
        shorter, place = shortened(window, length)
        partial, _ = gradient_of(learner)(state.params, state.batch_stats, actor, shorter, place, draws)
        difference = relative_difference(partial, full)
        assert difference > 1e-4
        assert previous is None or difference < previous * 1.5
        previous = difference


def test_recomputed_activations_are_those_of_acting_as_long_as_the_weights_are(case):
    """`past = "recomputed"`: the same gradient under fixed weights, another one once they have changed."""
    _, _, learner, state, _, results, windows = case
    actor, window, draws = windows[-1]
    recomputing = dataclasses.replace(learner, way_back={"past": "recomputed"})
    place, full = MOST_SEGMENTS - 1, results[-1][0]
    grads, _ = gradient_of(recomputing)(state.params, state.batch_stats, actor, window, place, draws)
    assert relative_difference(grads, full) < 1e-5
    moved = jax.tree.map(lambda x: 1.1 * x, state.params)
    both = [
        gradient_of(each)(moved, state.batch_stats, actor, window, place, draws)[0] for each in (learner, recomputing)
    ]
    assert relative_difference(*both) > 1e-3


def test_window_fills_and_starts_anew(case):
    _, _, learner, _, _, results, _ = case
    window, segment = learner.init(jax.random.PRNGKey(0)).window, results[0][1].rollout.segment
    for update in range(2 * MOST_SEGMENTS):
        place = update % MOST_SEGMENTS
        marked = jax.tree.map(lambda x, n=update: jnp.full_like(x, n), segment)
        window = window.put(marked, place)
        found = [int(x) for x in window.segments.timesteps.prev_reward[:, 0, 0]]
        assert found[: place + 1] == list(range(update - place, update + 1))
        assert int(window.first) == 0
    assert int(window.cut(2, True).first) == 3 and int(window.cut(2, False).first) == 0
    assert int(window.cut(2, True).put(segment, 3).first) == 3 and int(window.cut(2, True).put(segment, 0).first) == 0


def test_where_nothing_is_carried_a_window_is_one_segment():
    env, config = recorded_episodes(discrete=True), tiny_config("memoryless", bptt_segments=5, model__batch_norm=True)
    learner = make_learner(config, env)
    state = learner.init(jax.random.PRNGKey(3))
    state = state._replace(params=off_the_kink(state.params))
    assert state.window.capacity == 1 and not learner.way_back
    results, _ = window_of(learner, state, 1)
    agent = nnx.merge(learner.graphdef, state.params, state.batch_stats)
    expected = jax.jit(jax.grad(lambda p: unrolled_loss(p, agent, config, env, results, 0)))(state.params)
    assert relative_difference(results[0][0], expected) < 1e-5


def test_no_gradient_crosses_the_start_of_an_episode():
    """If all episodes end between two segments, earlier segments add nothing."""
    env = recorded_episodes(discrete=True)
    env.done = env.done.at[NUM_STEPS - 1].set(True)
    learner = make_learner(tiny_config("dvrl"), env)
    state = learner.init(jax.random.PRNGKey(0))
    results, windows = window_of(learner, state, 2)
    actor, window, draws = windows[-1]
    alone, _ = gradient_of(learner)(state.params, state.batch_stats, actor, window, 0, draws)
    assert relative_difference(results[-1][0], alone) < 1e-6
