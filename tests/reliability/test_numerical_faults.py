"""NaN and inf never reach the weights; extreme but finite ones are learned from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import networks
from dvrl_jax import particle_filter as pf
from dvrl_jax.envs import ActionSpec, BatchedEnvironment, EnvState, ObservationSpec
from dvrl_jax.errors import RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import loop, run_directory
from tests.tiny import tiny_config, tiny_hike, train

NUM_ENVS, NUM_STEPS, UPDATES, WINDOW = 3, 2, 6, 3
STEPS = NUM_STEPS * UPDATES
BAD_UPDATE = 3  # The update in which a fault occurs, counted from 0.
BAD_STEP = BAD_UPDATE * NUM_STEPS + 1


class Script(BatchedEnvironment):
    """Plays what its state holds: observations [N+1, B, 2], rewards and ends [N, B], so that one program plays all."""

    restorable = True

    def __init__(self):
        self.num_envs = NUM_ENVS
        self.observation = ObservationSpec((2,), jnp.float32)
        self.action = ActionSpec(discrete=False, size=2)

    def reset(self, key):
        del key
        rng = np.random.default_rng(0)
        obs = rng.normal(size=(STEPS + 1, NUM_ENVS, 2))
        reward, done = rng.normal(size=(STEPS, NUM_ENVS)), np.zeros((STEPS, NUM_ENVS), bool)
        return self.first(obs, reward, done)

    @staticmethod
    def first(obs, reward, done):
        inner = (jnp.zeros((), jnp.int32), *map(jnp.asarray, (np.float32(obs), np.float32(reward), done)))
        return EnvState.begin(inner, inner[1][0])

    def step(self, state, action):
        t, obs, rewards, dones = state.inner
        return EnvState.go_on((t + 1, obs, rewards, dones), obs[t + 1], rewards[t], dones[t])


class Case:
    """A learner, its compiled update, and the states before the first update and between all updates."""

    def __init__(self, algorithm, **fields):
        config = tiny_config(algorithm, num_envs=NUM_ENVS, num_steps=NUM_STEPS, bptt_segments=WINDOW, **fields)
        self.learner = make_learner(config, Script())
        self.start = self.learner.init(jax.random.PRNGKey(1))
        self.run = jax.jit(self.learner.run)

    def states(self, change=None, start=None):
        """The states before and after each of the updates; `change` edits a list of the script's arrays in place."""
        _, *arrays = (np.array(x) for x in self.start.actor.env.inner)
        if change is not None:
            change(*arrays)
        start = self.start if start is None else start
        env = Script.first(*arrays)._replace(final_obs=())  # Which an actor does not keep.
        states = [start._replace(actor=start.actor._replace(env=env))]
        for _ in range(UPDATES):
            states.append(self.run(states[-1], jnp.int32(1)))
        return states


@pytest.fixture(scope="module", params=["dvrl", "rnn"])
def case(request):
    """DVRL without batch norm, so that environments do not touch each other, and an RNN with it."""
    norm = request.param == "rnn"
    return Case(request.param, model__batch_norm=norm, model__policy_batch_norm=norm)


def learned(state):
    return jax.tree.leaves((state.params, state.batch_stats, state.opt_state))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def assert_finite(state):
    for tree in (state.params, state.batch_stats, state.opt_state, state.metrics.sums):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.actor.belief, state.actor.prev_action)))


def set_at(name, step, value, env=1):
    """A change of the script: one environment's observation or reward, delivered by the given step."""

    def change(obs, reward, done):
        if name == "obs":
            obs[step + 1, env] = value
        else:
            reward[step, env] = value

    return change


# --- What is extreme but finite is learned from ----------------------------------------------------------------------


def constant_observation(obs, reward, done):
    obs[:] = obs[0, 0]


def no_observation(obs, reward, done):
    obs[:] = 0


def large_rewards(obs, reward, done):
    reward[:] = np.where(np.arange(NUM_ENVS) % 2, 1e6, -1e6)


def episodes_of_length_one(obs, reward, done):
    done[:] = True


def all_end_at_once(obs, reward, done):
    done[BAD_STEP] = True


def nothing_to_win(obs, reward, done):
    reward[:] = 0


EXTREMES = [
    constant_observation,
    no_observation,
    large_rewards,
    episodes_of_length_one,
    all_end_at_once,
    nothing_to_win,
]


@pytest.mark.parametrize("change", EXTREMES)
def test_extremes_are_learned_from(case, change):
    states = case.states(change)
    for before, after in itertools.pairwise(states):
        assert_finite(after)
        assert int(after.skipped) == 0
        assert not same(jax.tree.leaves(before.params), jax.tree.leaves(after.params))
    assert int(states[-1].metrics.count) == UPDATES


def test_advantages_that_are_all_zero(case):
    """No reward and a value of 0 everywhere: the advantages are 0, and still all is finite."""
    params = jax.tree.map(jnp.asarray, case.start.params)
    params["value_head"] = jax.tree.map(jnp.zeros_like, params["value_head"])
    state = case.states(nothing_to_win, case.start._replace(params=params))[1]
    assert float(state.metrics.sums["loss.value"]) == 0 and float(state.metrics.sums["loss.action"]) == 0
    assert_finite(state)
    assert int(state.skipped) == 0


# --- What has NaN or inf is skipped ----------------------------------------------------------------------------------

FAULTS = {
    "an observation that is no number": set_at("obs", BAD_STEP, np.nan),
    "an infinite observation": set_at("obs", BAD_STEP, np.inf),
    "a reward that is no number": set_at("reward", BAD_STEP, np.nan),
    "an infinite reward": set_at("reward", BAD_STEP, -np.inf),
    "a reward too large to square": set_at("reward", BAD_STEP, 1e30),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_skipped_counted_and_outlived(case, fault):
    states = case.states(FAULTS[fault])
    skipped = np.diff([int(state.skipped) for state in states])
    # The observation that the last step of an update delivers is seen twice: by its bootstrap value, and by the next.
    seen = {BAD_UPDATE, BAD_UPDATE + 1} if "observation" in fault else {BAD_UPDATE}
    assert set(np.flatnonzero(skipped)) == seen
    for update in range(UPDATES):
        before, after = states[update], states[update + 1]
        assert_finite(after)
        assert same(learned(before), learned(after)) == (update in seen)
        assert int(after.skipped_in_row) == (update - BAD_UPDATE + 1 if update in seen else 0)
        assert int(after.update) == update + 1 and int(after.env_steps) == (update + 1) * NUM_STEPS * NUM_ENVS
    assert int(states[-1].metrics.count) == UPDATES - len(seen)
    assert "loss.total" in states[-1].metrics.culprits()
    assert all(np.isfinite(value) for value in states[-1].metrics.means().values())


def test_an_observation_that_no_particle_explains():
    """Its density is 0 in float32 for every particle, so the ELBO is -inf: skipped where it counts in a loss."""
    states = Case("dvrl").states(set_at("obs", BAD_STEP, 1e30))
    assert list(np.diff([int(state.skipped) for state in states])) == [0, 0, 0, 0, 1, 0]
    assert {"loss.encoding", "loss.emission.mean"} <= set(states[-1].metrics.culprits())
    for state in states:
        assert_finite(state)


def test_after_a_skipped_update_the_window_is_empty_and_fills_again(case):
    """Empty of segments that a gradient may reach: the skipped one is in it, and whatever it holds does not matter."""
    states = case.states(FAULTS["a reward that is no number"])
    places = [int(state.update) % WINDOW for state in states]
    firsts = [int(state.window.first) if place else 0 for place, state in zip(places, states, strict=True)]
    assert np.subtract(places, firsts).tolist() == [0, 1, 2, 0, 0, 1, 0]
    spoil = lambda x: x.at[0].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    state = states[BAD_UPDATE + 1]
    for expected in states[BAD_UPDATE + 2 :]:
        window = state.window._replace(segments=jax.tree.map(spoil, state.window.segments))
        state = case.run(state._replace(window=window), jnp.int32(1))
        assert_finite(state)
        assert same(learned(state), learned(expected))


def test_only_broken_beliefs_start_anew():
    """Environment 1 sees no number; the others remember what they saw, and no gradient crosses the gap."""
    case = Case("dvrl")
    states = case.states(FAULTS["an observation that is no number"])
    after = states[BAD_UPDATE + 2]
    np.testing.assert_array_equal(after.actor.is_first, [False, True, False])
    h = np.asarray(after.actor.belief.h)
    assert np.all(h[1] == 0) and np.all(np.any(h[[0, 2]] != 0, axis=(1, 2)))
    # A broken reward breaks no belief.
    after = case.states(FAULTS["a reward that is no number"])[BAD_UPDATE + 1]
    assert not np.any(after.actor.is_first) and np.all(np.any(np.asarray(after.actor.belief.h) != 0, axis=(1, 2)))


def test_no_particle_with_any_weight():
    """Where all particles are impossible they count alike, and training goes on."""
    case = Case("dvrl")
    belief = case.start.actor.belief
    for dead in (jnp.ones_like(belief.log_weight, bool), jnp.arange(3) == 1):
        log_weight = jnp.where(dead, -jnp.inf, belief.log_weight)
        is_first = jnp.zeros(NUM_ENVS, bool)
        actor = case.start.actor._replace(belief=belief._replace(log_weight=log_weight), is_first=is_first)
        states = case.states(start=case.start._replace(actor=actor))
        assert int(states[-1].skipped) == 0
        assert_finite(states[-1])


@pytest.mark.parametrize("field", ["h", "log_weight"])
def test_a_broken_belief_is_dropped(case, field):
    belief = case.start.actor.belief
    if not hasattr(belief, field):
        pytest.skip("only DVRL has weights")
    broken = getattr(belief, field).at[1].set(jnp.nan)
    actor = case.start.actor._replace(belief=belief._replace(**{field: broken}), is_first=jnp.zeros(NUM_ENVS, bool))
    states = case.states(start=case.start._replace(actor=actor))
    # A weight that is no number makes no number of the ancestors' recurrent states: taken from somewhere, they are
    # finite, so nothing need be skipped.
    assert int(states[-1].skipped) == (1 if field == "h" else 0)
    assert_finite(states[-1])


def test_training_goes_no_further_than_too_many_skipped_updates():
    case = Case("rnn", max_skipped_updates=3)
    reward = lambda obs, reward, done: reward.__setitem__((slice(NUM_STEPS, None), 0), np.nan)
    start = case.states(reward)[0]
    state = start
    for _ in range(2):  # Nor does it go on from there.
        with pytest.raises(loop.Stopped, match=r"^stopped at update 4 \(24 steps\), because in 3 updates in a row"):
            for call in loop.train(case.run, state, case.learner.config, lambda state: UPDATES - int(state.update)):
                state = call.state
        assert (int(state.update), int(state.skipped), int(state.skipped_in_row)) == (4, 3, 3)
        assert call.failures and not call.is_end


# --- Runs that diverge -----------------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_and_says_where(tmp_path):
    good = train(tmp_path, tiny_hike("rnn", total_env_steps=20 * 20))
    assert int(good.update) == 20
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"loss.value_coef": 0.5', '"loss.value_coef": 1e+38'))
    overrides = {"total_env_steps": 4000, "max_skipped_updates": 7}
    with pytest.raises(RunError) as error:
        train(tmp_path, None, **overrides)
    message = str(error.value)
    assert "stopped at update 27 (540 steps), because in 7 updates in a row" in message and "\n" not in message
    assert "loss.total" in message and "loss.encoding" not in message
    assert message.endswith(f"the last good checkpoint is {tmp_path / 'checkpoints' / '20'}")
    lines = run_directory.read_metrics(tmp_path)
    assert [(line["update"], line["updates.skipped"]) for line in lines] == [(10, 0), (20, 0), (27, 7)]
    assert lines[-1]["loss.total"] is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20"]


def test_weights_that_would_overflow_are_not_taken(tmp_path):
    with pytest.raises(
        RunError, match=r"in 5 updates in a row .* the new weights were NaN or inf; .* there is no check"
    ):
        train(tmp_path, tiny_hike("rnn", optimizer__learning_rate=1e38, max_skipped_updates=5))


# --- Densities -------------------------------------------------------------------------------------------------------

EXTREME = np.array([-1e4, -200, -104, -100, -88, -50, -17, -1e-3, 0, 1e-3, 17, 50, 88, 100, 200, 1e4])


def test_softplus_and_its_gradient_at_extremes():
    for function in (pf.softplus, jax.nn.softplus):
        value = jax.vmap(jax.value_and_grad(function))(jnp.asarray(EXTREME, jnp.float32))
        np.testing.assert_allclose(value[0], np.logaddexp(0, np.float64(np.float32(EXTREME))), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(value[1], 0.5 * (1 + np.tanh(EXTREME / 2)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("raw", EXTREME[EXTREME < 100])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0, 100.0])
def test_normal_log_prob_with_variances_from_a_softplus(raw, distance):
    """The variance is softplus(raw) and never 0; density and gradients against float64."""

    def density(mean, raw, array):
        return pf.normal_log_prob(array([distance]), array([mean]), array([jax.nn.softplus(raw) + floor]))

    floor = networks.VARIANCE_FLOOR
    single = jax.value_and_grad(lambda m, r: density(m, r, jnp.array), argnums=(0, 1))
    value, (to_mean, to_raw) = single(jnp.float32(0), jnp.float32(raw))
    with jax.enable_x64(True):
        double = jax.value_and_grad(lambda m, r: density(m, r, jnp.array), argnums=(0, 1))
        expected, (expected_mean, expected_raw) = double(jnp.float64(0), jnp.float64(np.float32(raw)))
    variance = np.logaddexp(0, raw) + floor
    by_hand = -0.5 * (distance**2 / variance + np.log(variance) + np.log(2 * np.pi))
    np.testing.assert_allclose(expected, by_hand, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(to_raw, expected_raw, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite([value, to_mean, to_raw]))


def test_bernoulli_log_prob_at_extreme_logits():
    """Every grey value under every logit up to 10,000, with its gradient, against float64."""
    grey, logits = np.meshgrid(np.linspace(0, 1, 5), EXTREME)
    grey, logits = (np.float32(x).reshape(-1, 1, 1, 1) for x in (grey, logits))
    value, gradient = jax.vmap(jax.value_and_grad(pf.bernoulli_log_prob, argnums=1))(grey, logits)
    x, wide = np.float64(grey).ravel(), np.float64(logits).ravel()
    np.testing.assert_allclose(value, x * wide - np.logaddexp(0, wide), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(gradient.ravel(), x - 0.5 * (1 + np.tanh(wide / 2)), rtol=1e-5, atol=1e-6)
