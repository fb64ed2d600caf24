"""Every option of the agents trains, predicts and means what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.random import fold_in

from dvrl_jax import acting
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents import DVRL, Inputs, Timestep, bind
from dvrl_jax.agents.original_weights import from_original
from dvrl_jax.envs import ActionSpec
from dvrl_jax.learner import make_learner
from dvrl_jax.viewing import playing
from tests.golden import Recording
from tests.tiny import tiny_config

NUM_ENVS, STEPS = 3, 8
SHAPES = {"vector": (2,), "16": (16, 16, 1), "32": (32, 32, 1), "84": (84, 84, 1)}


def recording(kind: str, discrete: bool) -> Recording:
    rng = np.random.default_rng(1)
    obs = rng.uniform(size=(STEPS + 1, NUM_ENVS, *SHAPES[kind])).astype(np.float32)
    reward = rng.normal(size=(STEPS, NUM_ENVS)).astype(np.float32)
    return Recording(obs, reward, rng.uniform(size=(STEPS, NUM_ENVS)) < 0.2, ActionSpec(discrete, 4))


def channels(kind):
    return (4, 3) if kind == "vector" else (2, 3, 4)


OPTIONS = [
    ("dvrl", "vector", True, {"model__batch_norm": True, "model__policy_batch_norm": True}),
    ("dvrl", "vector", False, {"model__num_particles": 1}),
    ("dvrl", "16", True, {"model__resample": False, "model__action_encoding": 0}),
    ("dvrl", "32", False, {"model__detach_encoder": True, "model__batch_norm": True}),
    ("rnn", "vector", True, {"model__obs_loss_coef": 1.0, "loss__encoding_coef": 0.5}),
    ("rnn", "32", True, {"model__obs_loss_coef": 1.0, "loss__encoding_coef": 0.5, "model__batch_norm": True}),
    ("rnn", "84", False, {"model__action_encoding": 0, "bptt_segments": 1, "optimizer__name": "adam"}),
    ("memoryless", "16", True, {"model__batch_norm": True, "model__reward_input": True}),
]


# Weights that no gradient reaches, by agent and observation: a squared error does not ask for a variance.
UNUSED = {"['decoder']['head']['var']['kernel']['x'].value", "['decoder']['head']['var']['bias'].value"}
UNMOVED = {("rnn", "vector"): UNUSED}


@pytest.mark.parametrize(("algorithm", "kind", "discrete", "fields"), OPTIONS)
def test_every_kind_of_agent_trains_and_predicts(algorithm, kind, discrete, fields):
    env = recording(kind, discrete)
    config = tiny_config(algorithm, **fields)
    config.model.channels = channels(kind)
    learner = make_learner(config, env)
    before = learner.init(jax.random.PRNGKey(0))
    after = jax.jit(learner.run)(before, jnp.int32(3))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after.params))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(before.params)]
    pairs = zip(paths, *map(jax.tree.leaves, (before.params, after.params)), strict=True)
    unmoved = {path for path, a, b in pairs if np.array_equal(a, b)}
    assert unmoved == UNMOVED.get((algorithm, kind), set())
    assert int(after.update) == 3 and int(after.env_steps) == 3 * NUM_ENVS * config.num_steps
    assert ("particles.killed" in after.metrics.sums) == (algorithm == "dvrl" and config.model.resample)
    predictions = jax.jit(lambda *weights: predict(nnx.merge(learner.graphdef, *weights), env))(
        after.params, after.batch_stats
    )
    assert set(predictions) == ({0, 2, 3} if algorithm == "dvrl" or config.model.obs_loss_coef else set())
    for image in predictions.values():
        assert image.shape == (NUM_ENVS, *SHAPES[kind]) and np.all(np.isfinite(image))
        assert kind == "vector" or (image.min() >= 0 and image.max() <= 1)


def after_one_observation(agent, env):
    return playing.observe(agent, acting.first_actor(agent, env.reset(None)), jax.random.PRNGKey(1))


def predict(agent, env, times=(0, 2, 3)):
    """Predictions after one observation."""
    return agent.predict(after_one_observation(agent, env), times, jax.random.PRNGKey(2))


def dream(agent, start, steps, key):
    """Observations expected 1 .. `steps` steps ahead, written out step by step."""
    h, inputs, found = start.belief.h, Inputs(None, agent.encode_action(start.timestep)), []
    inputs_after = lambda obs: agent.encode(start.timestep._replace(obs=obs))
    for dt in range(1, steps + 1):
        if isinstance(agent, DVRL):
            mean, var = agent.prior_of(h, inputs)
            phi_z = jax.nn.relu(agent.phi_z(z=mean + jnp.sqrt(var) * jax.random.normal(fold_in(key, dt), mean.shape)))
            found.append(agent.expected_observation(phi_z, h, inputs, start.belief.log_weight))
            h = agent.recur(h, phi_z, inputs_after(found[-1]).drive)
        else:
            found.append(agent.emission_mean(agent.emission_of(h, inputs)))
            h = agent.advance(h, inputs_after(found[-1]), ()).h
    return found


@pytest.mark.parametrize(
    ("algorithm", "fields"), [("dvrl", {}), ("rnn", {"model__obs_loss_coef": 1.0, "loss__encoding_coef": 0.5})]
)
def test_predictions_are_those_of_the_steps_written_out(algorithm, fields):
    env, key = recording("vector", True), jax.random.PRNGKey(2)
    config = tiny_config(algorithm, model__batch_norm=True, **fields)
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    graphdef, weights = nnx.split(agent)

    @jax.jit
    def both(weights):
        agent = bind(graphdef, weights)
        start = after_one_observation(agent, env)
        return agent.predict(start, (0, 1, 4), key), dream(agent, start, 4, key)

    predicted, expected = both(weights)
    for dt in (1, 4):
        np.testing.assert_allclose(predicted[dt], expected[dt - 1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(expected[0], expected[3], atol=1e-3)


def test_prediction_zero_is_the_weighted_reconstruction():
    env = recording("vector", True)
    agent = acting.make_agent(tiny_config("dvrl"), env, jax.random.PRNGKey(0))
    after, h_prev, trace, timestep = after_one_observation(agent, env)
    inputs = Inputs(None, agent.encode_action(timestep))
    mean, _ = agent.emission_of(after.phi_z, pf.resample(h_prev, trace.ancestors), inputs)
    weights = np.asarray(jax.nn.softmax(after.log_weight, axis=-1))
    expected = np.sum(weights[..., None] * np.asarray(mean).reshape(NUM_ENVS, -1, 2), axis=1)
    np.testing.assert_allclose(predict(agent, env)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_normal_emission_has_at_least_the_deviation_that_is_set():
    env, emissions = recording("vector", True), []
    for std in (0.0, 0.1):
        agent = acting.make_agent(tiny_config("dvrl", model__min_emission_std=std), env, jax.random.PRNGKey(0))
        agent.decoder.head.var.bias[...] = jnp.full(2, -50.0)  # As where an observation never changes.
        emissions.append(agent.decode(jnp.ones((3, 8))))
    (mean, var), (same_mean, larger) = emissions
    np.testing.assert_array_equal(mean, same_mean)
    assert np.all(var < 1e-9)
    np.testing.assert_allclose(larger, 0.1**2, rtol=1e-5)


def test_an_rnns_prediction_zero_is_what_it_expected_before_it_saw():
    env = recording("vector", True)
    config = tiny_config("rnn", model__obs_loss_coef=1.0, loss__encoding_coef=0.5)
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    start = after_one_observation(agent, env)
    # From a state that is not yet the one that has seen it: of fresh episodes, zeros.
    inputs = Inputs(None, agent.encode_action(start.timestep))
    expected, _ = agent.emission_of(jnp.zeros_like(start.carry), inputs)
    np.testing.assert_allclose(predict(agent, env)[0], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(agent.emission_of(start.belief.h, inputs)[0], expected)


@pytest.mark.parametrize("kind", ["vector", "32"])
def test_an_rnns_observation_loss_is_that_of_what_it_expected(kind):
    """Mean squared error, or binary cross entropy of pixels, times its coefficient."""
    env = recording(kind, True)
    config = tiny_config("rnn", model__obs_loss_coef=0.7, loss__encoding_coef=0.5)
    config.model.channels = channels(kind)
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    h = jax.random.normal(jax.random.PRNGKey(1), (NUM_ENVS, config.model.h_dim))
    none = jnp.zeros(NUM_ENVS)
    timestep = Timestep(env.obs[1], agent.initial_action(NUM_ENVS), none, none > 0)
    _, info = agent.update(agent.initial(NUM_ENVS)._replace(h=h), timestep, ())
    emission = agent.emission_of(h, agent.encode(timestep))
    target = np.asarray(env.obs[1], float)
    if kind == "vector":
        expected = np.mean((np.asarray(emission[0], float) - target) ** 2, axis=-1)
    else:
        p = 1 / (1 + np.exp(-np.asarray(agent.decoder.to_images(emission), float)))
        expected = np.mean(-target * np.log(p) - (1 - target) * np.log(1 - p), axis=(1, 2, 3))
    np.testing.assert_allclose(info.losses["encoding"], 0.7 * expected, rtol=1e-4)
    # What is expected knows the previous action, and nothing of the observation.
    other = agent.emission_of(h, agent.encode(timestep._replace(obs=env.obs[2])))
    jax.tree.map(np.testing.assert_array_equal, emission, other)


@pytest.mark.parametrize("kind", ["16", "32", "84"])
def test_an_images_likelihood_is_that_of_its_pixels_and_no_others(kind):
    env = recording(kind, True)
    config = tiny_config("dvrl")
    config.model.channels = channels(kind)
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    particles, side = config.model.num_particles, int(kind)
    h = jax.random.normal(jax.random.PRNGKey(1), (NUM_ENVS, particles, config.model.h_dim))
    first = acting.timestep_of(agent, acting.first_actor(agent, env.reset(None)))
    emission = 5 * agent.emission_of(jnp.ones_like(h), h, Inputs(None, agent.encode_action(first)))
    logits = np.asarray(agent.decoder.to_images(emission), float).reshape(NUM_ENVS, particles, side, side, 1)
    x = np.asarray(env.obs[0], float)[:, None]
    expected = np.sum(x * logits - np.logaddexp(0, logits), axis=(2, 3, 4))
    np.testing.assert_allclose(agent.emission_log_prob(env.obs[0], emission), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "fields"), [("dvrl", {}), ("rnn", {"model__obs_loss_coef": 1.0, "loss__encoding_coef": 0.5})]
)
def test_with_running_averages_each_environment_is_alone(algorithm, fields):
    """In evaluation, what is seen in the others changes nothing; while training, batch norm lets it."""
    env = recording("32", True)
    config = tiny_config(algorithm, model__batch_norm=True, model__policy_batch_norm=True, **fields)
    config.model.channels = channels("32")
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))

    def of_the_first(others):
        state = env.reset(None)
        state = state._replace(obs=state.obs.at[1:].set(others))
        start = playing.observe(agent, acting.first_actor(agent, state), jax.random.PRNGKey(1))
        policy, value = agent.heads(start.belief)
        found = (start.belief, policy.probs, value, agent.predict(start, (0, 2), jax.random.PRNGKey(2)))
        return [np.asarray(x[0]) for x in jax.tree.leaves(found)]

    for running in (False, True):
        agent.use_running_average = running
        pairs = zip(of_the_first(0.1), of_the_first(0.9), strict=True)
        same = [np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs]
        assert all(same) == running and any(same) >= running


def test_policies_begin_orthogonal_and_nearly_the_same_for_all_actions_where_they_are_continuous():
    for discrete, gain in ((True, np.sqrt(2)), (False, 0.01 * np.sqrt(2))):
        agent = acting.make_agent(tiny_config("rnn"), recording("vector", discrete), jax.random.PRNGKey(0))
        kernel = np.asarray(agent.policy_head.kernel["x"][...], float)
        np.testing.assert_allclose(kernel.T @ kernel, gain**2 * np.eye(4), atol=1e-5 * gain**2)


def belief_gradient(config):
    """Largest gradients of the reinforcement learning loss: in the recurrence, and in the value head."""
    env = recording("vector", True)
    learner = make_learner(config, env)
    state = learner.init(jax.random.PRNGKey(0))
    draws = learner.draw(jax.random.PRNGKey(1))
    grads, _ = jax.jit(learner.gradient)(state.params, state.batch_stats, state.actor, state.window, 0, draws)
    largest = lambda tree: max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))
    return largest(grads["gru"]), largest(grads["value_head"])


def test_detached_belief_gets_no_gradient_from_the_policy():
    attached = belief_gradient(tiny_config("dvrl", loss__encoding_coef=0.0))
    config = tiny_config("dvrl", model__detach_encoder=True)
    config.loss.encoding_coef = 0.0  # No configuration may have that, since nothing would train the belief.
    detached = belief_gradient(config)
    assert attached[0] > 0 and detached[0] == 0 and detached[1] > 0


def test_foreign_weights_that_do_not_fit_are_named():
    env = recording("vector", True)
    agent = acting.make_agent(tiny_config("rnn"), env, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"there is no 'encoder\.0\.weight'"):
        from_original(agent, {})
    with pytest.raises(ValueError, match=r"'encoder\.0\.weight' has shape \(1, 1\)"):
        from_original(agent, {"encoder.0.weight": np.zeros((1, 1))})
    before = jax.tree.map(np.array, nnx.state(agent))
    fitting = {"encoder.0.weight": np.ones((8, 2)), "encoder.0.bias": np.ones(8)}  # And then nothing more.
    with pytest.raises(ValueError, match=r"there is no 'encoder\.2\.weight'"):
        from_original(agent, fitting)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(agent), before)

    for algorithm, fields, message in [
        ("dvrl", {"model__summary": "mean"}, "are of agents with model.summary = 'gru'"),
        ("rnn", {"loss__lambda_discrepancy_coef": 0.1}, "are of agents with one value head"),
    ]:
        other = acting.make_agent(tiny_config(algorithm, **fields), env, jax.random.PRNGKey(0))
        with pytest.raises(ValueError, match=message):
            from_original(other, fitting)

    class Unlike:
        """Another kind of agent."""

    with pytest.raises(ValueError, match="are DVRL's or the RNN's, not those of Unlike"):
        from_original(Unlike(), {})
