"""Atari through EnvPool, on the real emulator: transitions, late resets, returns of lives and games, flicker.

The environment is stepped inside a compiled scan and compared with a second pool of the same seed, stepped through
EnvPool's Python interface. What should be counted is counted again from the latter's outputs, in plain Python.
"""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import atari_dvrl, atari_rnn, default
from dvrl_jax import a2c, acting, discovery
from dvrl_jax.envs import ActionSpec, Batched, EnvState, Flicker, MountainHike, atari, make_env
from dvrl_jax.envs.atari import Atari, make_pool
from dvrl_jax.errors import DiscoveryError
from dvrl_jax.learner import Learner, make_learner
from dvrl_jax.statistics import RESULT_WINDOW, EpisodeStatistics
from dvrl_jax.train_state import TrainState
from tests.golden import Recording

NUM_ENVS = 8
SEED = 7
SEGMENT = 5
FIELDS = ("reward", "done", "truncated", "valid", "true_reward", "game_over", "observed")


# --- Two ways to run the same games ----------------------------------------------------------------------------------


class Run(NamedTuple):
    """The same actions played twice.

    Attributes:
        first: the environment's state after `reset`. states: its states [T, B], stacked. first_obs, obs, reward,
        terminated, truncated, info: what EnvPool's Python interface gave, [T, B].
    """

    first: EnvState
    states: EnvState
    first_obs: np.ndarray
    obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: dict[str, np.ndarray]

    @property
    def ended(self):
        return self.terminated | self.truncated

    @property
    def late_reset(self):
        """Calls that came after an end: they delivered the new episode's first frame."""
        return np.concatenate([np.zeros_like(self.ended[:1]), self.ended[:-1]])


def play(game, num_steps, num_envs=NUM_ENVS):
    """Plays random actions, fixed by a seed, in the compiled environment and in a pool of its own."""
    env, pool = Atari(game, num_envs, SEED), make_pool(game, num_envs, SEED, 4)
    actions = np.random.default_rng(0).integers(0, env.action.size, (num_steps, num_envs)).astype(np.int32)

    @jax.jit
    def scan(state, actions):
        def step(state, action):
            state = env.step(state, action)
            return state, state._replace(inner=())

        return jax.lax.scan(step, state, actions)[1]

    first = env.reset(jax.random.key(0))
    states = jax.tree.map(np.asarray, scan(first, actions))
    first_obs, _ = pool.reset()
    outputs = []
    for action in actions:
        obs, reward, terminated, truncated, info = pool.step(action)
        info = {name: info[name].copy() for name in ("reward", "terminated", "lives", "ram")}
        outputs.append((obs.copy(), reward.copy(), terminated.copy(), truncated.copy(), info))
    run = jax.tree.map(lambda *x: np.stack(x), *outputs)
    return Run(jax.tree.map(np.asarray, first._replace(inner=())), states, first_obs, *run)


@pytest.fixture(scope="module")
def breakout():
    return play("Breakout", 1000)


@pytest.fixture(scope="module")
def frostbite():
    return play("Frostbite", 1000)


@pytest.fixture(scope="module")
def cut_off():
    """Breakout whose games are cut off after 60 steps of 4 frames, most of them in the middle of a life."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atari, "MAX_FRAMES", 60 * 4)
        return play("Breakout", 400, num_envs=4)


@pytest.fixture(params=["breakout", "frostbite", "cut_off"])
def run(request):
    return request.getfixturevalue(request.param)


class Count:
    """Episodes (lives) and games, counted one call at a time from the Python interface's outputs."""

    def __init__(self, run):
        self.clipped, self.lengths, self.true = [], [], []  # Of finished episodes and games, in order.
        self.transitions = 0
        num_steps, num_envs = run.reward.shape
        self.game_over = np.zeros((num_steps, num_envs), bool)
        open_clipped, open_length, open_true = [0.0] * num_envs, [0] * num_envs, [0.0] * num_envs
        must_reset = [False] * num_envs
        for t in range(num_steps):
            for b in range(num_envs):
                if must_reset[b]:
                    must_reset[b] = False
                    continue
                self.transitions += 1
                open_length[b] += 1
                open_clipped[b] += np.sign(run.info["reward"][t, b])
                open_true[b] += run.info["reward"][t, b]
                if run.terminated[t, b] or run.truncated[t, b]:
                    self.clipped.append(open_clipped[b])
                    self.lengths.append(open_length[b])
                    open_clipped[b], open_length[b], must_reset[b] = 0.0, 0, True
                if run.info["lives"][t, b] == 0 or run.truncated[t, b]:
                    self.true.append(open_true[b])
                    self.game_over[t, b], open_true[b] = True, 0.0
        self.under_way = open_clipped, open_length, open_true


# --- (a) The compiled environment is EnvPool's, and counts right -----------------------------------------------------


def test_the_runs_hold_what_they_are_meant_to_test(breakout, frostbite, cut_off):
    for run in (breakout, frostbite):
        lives_lost = run.ended & (run.info["lives"] > 0)
        games_ended = run.ended & (run.info["lives"] == 0)
        assert lives_lost.sum() > 50 and games_ended.sum() > 15
        assert not run.truncated.any()
        # In every environment, so no environment's ends are taken for another's.
        assert np.all(lives_lost.sum(axis=0) > 0) and np.all(games_ended.sum(axis=0) > 0)
    assert np.sum(frostbite.info["reward"] > 1) > 50, "no rewards that clipping changes"
    assert np.sum(breakout.ended) > 2 * RESULT_WINDOW
    assert cut_off.truncated.sum() > 10 and np.sum(cut_off.terminated & ~cut_off.truncated) > 10
    assert np.all(cut_off.info["lives"][cut_off.truncated] > 0)


def test_observations_equal_those_of_the_python_interface(run):
    assert run.states.obs.dtype == np.uint8 and run.states.obs.shape[2:] == (84, 84, 1)
    np.testing.assert_array_equal(run.first.obs[..., 0], run.first_obs[:, 0])
    np.testing.assert_array_equal(run.states.obs[..., 0], run.obs[:, :, 0])
    # The last frame of an episode is delivered with its end, and the next one's first a call later.
    np.testing.assert_array_equal(run.states.final_obs, run.states.obs)
    assert len(np.unique(run.obs[0].reshape(run.obs.shape[1], -1), axis=0)) > 1, "environments are copies of one"


def test_rewards_and_ends_equal_those_of_the_python_interface(run):
    np.testing.assert_array_equal(run.states.reward, run.reward)
    np.testing.assert_array_equal(run.states.true_reward, run.info["reward"])
    np.testing.assert_array_equal(run.states.reward, np.sign(run.info["reward"]))
    np.testing.assert_array_equal(run.states.done, run.ended)
    np.testing.assert_array_equal(run.states.truncated, run.truncated & ~run.terminated)
    assert np.all(run.states.observed)


def test_the_call_after_an_end_is_no_transition_and_has_no_outcome(run):
    late = run.late_reset
    np.testing.assert_array_equal(run.states.valid, ~late)
    for name in ("reward", "true_reward", "done", "truncated", "game_over"):
        assert not np.any(getattr(run.states, name)[late]), name
    # EnvPool says the same, so nothing is thrown away.
    assert not np.any(run.reward[late]) and not np.any(run.info["reward"][late]) and not np.any(run.ended[late])


def test_number_of_transitions_counts_every_call_but_late_resets(run):
    assert run.states.valid.sum() == Count(run).transitions < run.states.valid.size


def test_late_reset_ignores_its_action():
    """Two pools of one seed, with different actions at late resets alone, stay the same."""
    pools = [make_pool("Breakout", 2, SEED, 4) for _ in range(2)]
    rng = np.random.default_rng(0)
    for pool in pools:
        pool.reset()
    ended, num_late = np.zeros(2, bool), 0
    for _ in range(200):
        action = rng.integers(0, 4, 2).astype(np.int32)
        other = np.where(ended, (action + 2) % 4, action).astype(np.int32)
        (obs, _, terminated, *_), (obs_other, *_) = pools[0].step(action), pools[1].step(other)
        np.testing.assert_array_equal(obs, obs_other)
        num_late, ended = num_late + ended.sum(), terminated.copy()
    assert num_late > 5


def test_what_envpool_means_by_lives_and_terminated(run):
    """`terminated` ends an episode, which is a life; `info["terminated"]` ends the game, with the last life."""
    lives, game_ended = run.info["lives"], run.info["terminated"].astype(bool)
    before = np.concatenate([np.full_like(lives[:1], lives.max()), lives[:-1]])
    late = run.late_reset
    # A life is lost with each end, unless it is a cut-off, and at no other time.
    lost = (lives == before - 1) & ~late
    np.testing.assert_array_equal(lost & ~run.truncated, run.terminated)
    assert np.all(lives[~late & ~lost] == before[~late & ~lost])
    np.testing.assert_array_equal(game_ended, run.terminated & (lives == 0))
    # A late reset gives all lives back after a game and none after a life.
    game_was_over = np.concatenate([np.zeros_like(game_ended[:1]), (game_ended | run.truncated)[:-1]])
    assert np.all(lives[late & game_was_over] == lives.max())
    np.testing.assert_array_equal(lives[late & ~game_was_over], before[late & ~game_was_over])


def test_game_over_is_the_last_lifes_end_or_a_cut_off(run):
    np.testing.assert_array_equal(run.states.game_over, Count(run).game_over)
    np.testing.assert_array_equal(run.states.game_over, run.info["terminated"].astype(bool) | run.truncated)
    assert np.all(run.states.done[run.states.game_over])


def decimal(ram, *cells):
    """The number [...] whose decimal digits stand, two to a byte, in these cells of ram [..., 128]."""
    return functools.reduce(
        lambda total, cell: total * 100 + 10 * (ram[..., cell] >> 4) + (ram[..., cell] & 15), cells, 0
    )


@pytest.mark.parametrize("game, score_cells", [("breakout", (76, 77)), ("frostbite", (72, 73, 74))])
def test_true_return_of_a_game_is_the_score_on_the_screen(request, game, score_cells):
    """The score is read from the console's memory when the game ends: it covers all lives and is not clipped."""
    run = request.getfixturevalue(game)
    scores = decimal(run.info["ram"].astype(int), *score_cells)[run.states.game_over]
    statistics = EpisodeStatistics.empty(NUM_ENVS)
    statistics = jax.jit(EpisodeStatistics.add)(statistics, run.states._replace(obs=(), final_obs=()))
    assert 15 < len(scores) <= RESULT_WINDOW and int(statistics.num_finished_true) == len(scores)
    np.testing.assert_array_equal(statistics.finished_true[: len(scores)], scores)
    assert scores.max() > 0


def test_statistics_fed_by_segments_equal_the_count(run):
    """As training does it: five steps at a time, without observations."""
    num_envs = run.reward.shape[1]
    segments = jax.tree.map(lambda x: x.reshape(-1, SEGMENT, num_envs), run.states._replace(obs=(), final_obs=()))

    @jax.jit
    def feed(segments):
        def add(statistics, segment):
            statistics = statistics.add(segment)
            return statistics, (statistics.num_finished, statistics.num_finished_true)

        return jax.lax.scan(add, EpisodeStatistics.empty(num_envs), segments)

    statistics, (num_finished, num_finished_true) = jax.tree.map(np.asarray, feed(segments))
    count = Count(run)
    ends = run.ended.sum(axis=1).reshape(-1, SEGMENT).sum(axis=1)
    np.testing.assert_array_equal(num_finished, np.cumsum(ends))
    games = count.game_over.sum(axis=1).reshape(-1, SEGMENT).sum(axis=1)
    np.testing.assert_array_equal(num_finished_true, np.cumsum(games))
    assert num_finished[-1] == len(count.clipped) and num_finished_true[-1] == len(count.true)
    for name, values in (
        ("finished", count.clipped),
        ("lengths", count.lengths),
        ("finished_true", count.true),
    ):
        ring = np.zeros(RESULT_WINDOW)
        for i, value in enumerate(values):
            ring[i % RESULT_WINDOW] = value
        np.testing.assert_array_equal(getattr(statistics, name), ring, name)
    for name, values in zip(("clipped", "length", "true"), count.under_way, strict=True):
        np.testing.assert_array_equal(getattr(statistics, name), values, name)
    summary = statistics.summary()
    assert summary["episodes.num_ended"] == len(count.clipped)
    assert summary["result.true"] == pytest.approx(np.mean(count.true[-RESULT_WINDOW:]))
    assert summary["result.median"] == np.median(count.clipped[-RESULT_WINDOW:])
    assert summary["result.max"] == np.max(count.clipped[-RESULT_WINDOW:])
    assert summary["episodes.length"] == pytest.approx(np.mean(count.lengths[-RESULT_WINDOW:]))


def test_reset_in_the_middle_of_a_game_starts_a_new_one():
    """After it, a game of Breakout lasts five lives again, and nothing is late."""
    env = Atari("Breakout", 4, SEED)

    @jax.jit
    def scan(state):
        def step(state, action):
            state = env.step(state, action)
            return state, (state.done, state.game_over)

        actions = np.random.default_rng(1).integers(0, 4, (400, 4)).astype(np.int32)
        return jax.lax.scan(step, state, actions)

    state, (done, _) = scan(env.reset(jax.random.key(0)))
    assert np.any(done.sum(axis=0) % 5 != 0), "all games happen to be between two games"
    state = env.reset(jax.random.key(0))
    assert np.all(state.valid)
    _, (done, game_over) = scan(state)
    for b in range(4):
        assert game_over[:, b].any()
        assert done[: np.argmax(game_over[:, b]) + 1, b].sum() == 5


# --- (b) Late resets enter no loss -----------------------------------------------------------------------------------


def loss_inputs(seed=0):
    """Random [T, B] inputs of the losses, where one environment's life ends and the next call is a late reset."""
    rng = np.random.default_rng(seed)
    value, log_prob, entropy, encoding, reward = rng.normal(size=(5, 6, 4)).astype(np.float32)
    done, valid = np.zeros((6, 4), bool), np.ones((6, 4), bool)
    done[2, 0], valid[3, 0] = True, False  # In the middle.
    valid[0, 1] = False  # The end was the previous segment's last step.
    done[4, 2], valid[5, 2] = True, False  # The late reset is the last step.
    done[5, 3] = True  # It will be the next segment's first.
    return (value, log_prob, entropy, encoding), reward, done, valid, rng.normal(size=4).astype(np.float32)


def losses_and_gradients(quantities, reward, done, valid, bootstrap):
    coefs = default.get_config().loss
    coefs.encoding_coef = 0.1

    def loss(quantities):
        returns = a2c.n_step_returns(reward, done, bootstrap, coefs.gamma)
        *judged, encoding = quantities
        losses = a2c.a2c_losses(*judged, {"encoding": encoding}, returns, valid, coefs)
        return losses["total"], losses

    gradients, losses = jax.jit(jax.grad(loss, has_aux=True))(quantities)
    return losses, gradients


def test_losses_and_their_gradients_ignore_whatever_a_late_reset_brings():
    quantities, reward, done, valid, bootstrap = loss_inputs()
    losses, gradients = losses_and_gradients(quantities, reward, done, valid, bootstrap)
    garbage = np.random.default_rng(1).normal(size=(5, 6, 4)).astype(np.float32) * 1e4
    *spoilt, spoilt_reward = (np.where(valid, x, g) for x, g in zip((*quantities, reward), garbage, strict=True))
    spoilt_losses, spoilt_gradients = losses_and_gradients(tuple(spoilt), spoilt_reward, done, valid, bootstrap)
    jax.tree.map(np.testing.assert_array_equal, losses, spoilt_losses)
    for gradient, spoilt_gradient in zip(gradients, spoilt_gradients, strict=True):
        np.testing.assert_array_equal(gradient, spoilt_gradient)
        assert np.all(gradient[~valid] == 0) and np.all(gradient[valid] != 0)


def test_losses_are_means_over_transitions_alone():
    """In plain NumPy, one environment at a time, with late resets cut out of its sequence before anything else."""
    (value, log_prob, entropy, encoding), reward, done, valid, bootstrap = loss_inputs()
    advantages, kept = [], valid.T
    for b in range(4):
        following, returns = bootstrap[b], []
        for r, d in zip(reward[kept[b], b][::-1], done[kept[b], b][::-1], strict=True):
            following = r + 0.99 * (0 if d else following)
            returns.insert(0, following)
        advantages.append(np.array(returns) - value[kept[b], b])
    advantage = np.concatenate(advantages)
    log_prob, entropy, encoding = (x.T[kept] for x in (log_prob, entropy, encoding))
    value_loss, action_loss = np.mean(advantage**2), -np.mean(advantage * log_prob)
    total = 0.5 * value_loss + action_loss - 0.01 * np.mean(entropy) + 0.1 * np.mean(encoding)
    expected = {"total": total, "value": value_loss, "action": action_loss}
    expected |= {"entropy": np.mean(entropy), "encoding": np.mean(encoding)}
    losses, _ = losses_and_gradients(*loss_inputs())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), losses, expected)


class LateResets(Recording):
    """A recording [N, B] some of whose calls are not valid. What it plays is in its state, as data."""

    def __init__(self, obs, reward, done, late, action):
        super().__init__(obs, reward, done, action)
        self.late = jnp.asarray(late)

    def reset(self, key):
        return self.playing(super().reset(key), self.obs, self.reward, self.done, self.late)

    @staticmethod
    def playing(state, obs, reward, done, late):
        """The same state, but with another recording to play."""
        obs, reward, done, late = map(jnp.asarray, (obs, reward, done, late))
        inner = (jnp.zeros((), jnp.int32), obs, reward, done, late)
        return state._replace(inner=inner, obs=obs[0])

    def step(self, state, action):
        t, obs, reward, done, late = state.inner
        following = EnvState.go_on((t + 1, *state.inner[1:]), obs[t + 1], reward[t], done[t])
        return following._replace(valid=~late[t])


NUM_SEGMENTS, T, B = 2, 6, 3
# Environment 0: an end in the middle of each segment. 1: an end as the first segment's last step, so that the late
# reset is the second's first. 2: none.
DONE, LATE = np.zeros((2, NUM_SEGMENTS * T, B), bool)
DONE[[2, T + 3], 0] = LATE[[3, T + 4], 0] = True
DONE[T - 1, 1] = LATE[T, 1] = True
ACTION = ActionSpec(discrete=True, size=4)


def learner_config(algorithm, num_steps):
    c = default.get_config()
    c.algorithm, c.num_steps, c.bptt_segments = algorithm, num_steps, NUM_SEGMENTS
    c.model.channels, c.model.h_dim, c.model.z_dim = (8, 8), 8, 6
    c.model.action_encoding, c.model.num_particles = 4, 5
    c.loss.encoding_coef, c.model.obs_loss_coef = 0.1, 0.1
    return c


def recorded():
    """Observations [N+1, B, D] and rewards [N, B] of two segments."""
    rng = np.random.default_rng(2)
    obs = rng.normal(size=(NUM_SEGMENTS * T + 1, B, 3)).astype(np.float32)
    return obs, rng.normal(size=(NUM_SEGMENTS * T, B)).astype(np.float32)


def spoil(obs, reward, where):
    """Garbage at some calls [N, B]: in the observation acted on before each, and in its reward."""
    obs, reward = obs.copy(), reward.copy()
    rng = np.random.default_rng(3)
    obs[:-1][where] = 5 * rng.normal(size=(where.sum(), 3))
    reward[where] = 1000 * rng.normal(size=where.sum())
    return obs, reward


class Training(NamedTuple):
    """A learner on recordings with late resets, with its compiled gradient and its first state."""

    algorithm: str
    learner: Learner
    state: TrainState
    gradient: Callable

    def segments(self, obs, reward):
        """Losses, gradients and returns of both segments; the second's gradient goes back through the first."""
        state, results = self.state, []
        actor = state.actor._replace(env=LateResets.playing(state.actor.env, obs, reward, DONE, LATE))
        window = state.window
        for segment in range(NUM_SEGMENTS):
            draws = self.learner.draw(jax.random.key(segment))
            grads, outcome = self.gradient(state.params, state.batch_stats, actor, window, segment, draws)
            valid = ~LATE[segment * T : (segment + 1) * T]
            np.testing.assert_array_equal(outcome.rollout.env.valid, valid)
            results.append((outcome.losses, grads, np.asarray(outcome.returns)[valid]))
            actor, window = outcome.rollout.actor, window.put(outcome.rollout.segment, segment)
        return jax.tree.map(np.asarray, results)


@pytest.fixture(scope="module", params=["rnn", "dvrl"])
def training(request):
    learner = make_learner(learner_config(request.param, T), LateResets(*recorded(), DONE, LATE, ACTION))
    return Training(request.param, learner, jax.jit(learner.init)(jax.random.key(0)), jax.jit(learner.gradient))


def test_training_gradient_ignores_whatever_a_late_reset_brings(training):
    obs, reward = recorded()
    results, spoilt = training.segments(obs, reward), training.segments(*spoil(obs, reward, LATE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), results, spoilt)
    # The same garbage one call earlier, at the transition that ended the life, is noticed.
    noticed = training.segments(*spoil(obs, reward, DONE))
    for (losses, *_), (noticed_losses, *_) in zip(results, noticed, strict=True):
        for name in ("total", "value", "action", "entropy", "encoding"):
            assert abs(losses[name] - noticed_losses[name]) > 1e-4, name


def test_training_gradient_equals_that_of_a_recording_without_the_late_reset(training):
    """One segment as EnvPool delivers it and as an environment without late resets would, in environment 0."""
    obs, reward = recorded()
    state, draws = training.state, training.learner.draw(jax.random.key(1))
    draws = draws._replace(action=jnp.asarray(np.random.default_rng(4).integers(0, 4, (T, B))))
    # All environments have the same life, so the same call is late in all of them; one segment is played.
    done, late = (np.repeat(x[:, :1], B, axis=1) for x in (DONE, LATE))
    keep = ~late[:T, 0]
    keep_obs = np.append(keep, True)
    playing = state.actor._replace(env=LateResets.playing(state.actor.env, obs, reward, done, late))
    with_late = training.gradient(state.params, state.batch_stats, playing, state.window, 0, draws)

    c = learner_config(training.algorithm, T - 1)
    c.bptt_segments = 1
    env = Recording(obs[: T + 1][keep_obs], reward[:T][keep], done[:T][keep], ACTION)
    playing = state.actor._replace(env=env.reset(None)._replace(final_obs=()))
    fewer = acting.Draws(jax.tree.map(lambda x: x[keep_obs], draws.noise), draws.action_keys[keep], draws.action[keep])
    learner = make_learner(c, env)
    window = learner.restart(state, env.reset(None)).window
    without = jax.jit(learner.gradient)(state.params, state.batch_stats, playing, window, 0, fewer)

    for _, outcome in (with_late, without):
        assert int(outcome.rollout.env.valid.sum()) == B * (T - 1)
    compared = [(grads, x.losses, x.rollout.bootstrap, x.rollout.actor.belief) for grads, x in (with_late, without)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *compared)


# --- (c) Flicker -----------------------------------------------------------------------------------------------------


@functools.cache
def flickering_hike(p_blank, key=0):
    """Observations with flicker, without flicker and the `observed` flags, each [T, B, ...], `reset`'s first."""
    num_envs, num_steps = 64, 1000
    hike = Batched(MountainHike(0.3), num_envs)
    flicker = Flicker(hike, p_blank)
    actions = jnp.zeros((num_steps, num_envs, 2))

    def scan(env, state):
        def step(state, action):
            state = env.step(state, action)
            return state, (state.obs, state.observed)

        obs, observed = jax.jit(lambda state: jax.lax.scan(step, state, actions)[1])(state)
        return np.concatenate([state.obs[None], obs]), np.concatenate([state.observed[None], observed])

    first = flicker.reset(jax.random.key(key))
    obs, observed = scan(flicker, first)
    # The wrapped environment's own states begin where the wrapper put them.
    plain_first = first._replace(inner=first.inner[0], obs=jnp.zeros_like(first.obs))
    plain_obs, _ = scan(hike, plain_first)
    return obs, plain_obs, observed


@pytest.mark.parametrize("p_blank", [0.25, 0.5])
def test_fraction_of_blanked_observations(p_blank):
    _, _, observed = flickering_hike(p_blank)
    standard_error = np.sqrt(p_blank * (1 - p_blank) / observed.size)
    assert abs(np.mean(~observed) - p_blank) < 5 * standard_error
    # For every environment and over the environments at every step.
    per_env = np.sqrt(p_blank * (1 - p_blank) / observed.shape[0])
    assert np.max(np.abs(np.mean(~observed, axis=0) - p_blank)) < 5 * per_env
    per_step = np.sqrt(p_blank * (1 - p_blank) / observed.shape[1])
    assert np.max(np.abs(np.mean(~observed, axis=1) - p_blank)) < 6 * per_step  # A thousand binomials: a wider tail.


@pytest.mark.parametrize("p_blank", [0.25, 0.5])
def test_blanking_is_independent_over_environments_and_steps(p_blank):
    _, _, observed = flickering_hike(p_blank)
    x = (observed - (1 - p_blank)) / np.sqrt(p_blank * (1 - p_blank))  # Mean 0, variance 1.
    num_steps, num_envs = x.shape
    between = (x.T @ x / num_steps)[np.triu_indices(num_envs, k=1)]
    assert np.max(np.abs(between)) < 5.5 / np.sqrt(num_steps)  # The largest of 2016 correlations.
    assert abs(np.mean(between)) < 5 / np.sqrt(num_steps * len(between))
    for lag in range(1, 20):
        products = x[lag:] * x[:-lag]
        assert abs(np.mean(products)) < 5 / np.sqrt(products.size), f"steps {lag} apart"


def test_blanked_observations_are_zero_and_others_untouched():
    obs, plain_obs, observed = flickering_hike(0.5)
    assert not np.any(obs[~observed])
    np.testing.assert_array_equal(obs[1:][observed[1:]], plain_obs[1:][observed[1:]])
    assert np.all(np.any(plain_obs[1:] != 0, axis=-1))  # So that a zero observation is a blanked one.
    np.testing.assert_array_equal(np.any(obs != 0, axis=-1), observed)


def test_blanking_differs_between_keys():
    assert not np.array_equal(flickering_hike(0.5)[2], flickering_hike(0.5, key=1)[2])


@functools.cache
def breakout_seen(**fields):
    """What 150 steps of four games show, with these fields of the `env` group; [T, B, ...]."""
    c = atari_rnn.get_config("Breakout")
    c.env.update({"p_blank": 0.0} | fields)
    env = make_env(c.env, 4, SEED)
    actions = np.random.default_rng(0).integers(0, 4, (150, 4)).astype(np.int32)

    def step(state, action):
        state = env.step(state, action)
        return state, state._replace(inner=())

    first = env.reset(jax.random.key(0))
    return jax.tree.map(np.asarray, jax.jit(lambda state: jax.lax.scan(step, state, actions)[1])(first))


def test_delayed_atari_shows_the_same_frames_later():
    late, plain = breakout_seen(obs_delay=2), breakout_seen()
    begins = plain.done | ~plain.valid
    assert late.obs.dtype == np.uint8 and begins.sum() > 4
    ago = np.stack([np.roll(begins, shift, axis=0) for shift in range(3)]).any(axis=0)
    np.testing.assert_array_equal(late.obs[2:][~ago[2:]], plain.obs[:-2][~ago[2:]])
    np.testing.assert_array_equal(late.obs[begins], plain.obs[begins])
    for name in set(FIELDS) - {"obs", "final_obs"}:
        np.testing.assert_array_equal(getattr(late, name), getattr(plain, name), name)


def test_flickering_atari_blanks_whole_frames_and_changes_nothing_else():
    flickering, plain = breakout_seen(p_blank=0.4), breakout_seen()
    assert plain.done.sum() > 4
    for name in set(FIELDS) - {"observed"}:
        np.testing.assert_array_equal(getattr(flickering, name), getattr(plain, name), name)
    seen = flickering.observed
    assert flickering.obs.dtype == np.uint8
    assert not np.any(flickering.obs[~seen])
    np.testing.assert_array_equal(flickering.obs[seen], plain.obs[seen])
    assert np.all(np.any(plain.obs != 0, axis=(2, 3, 4)))
    assert abs(np.mean(~seen) - 0.4) < 5 * np.sqrt(0.4 * 0.6 / seen.size)


# --- (d) Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [atari_rnn, atari_dvrl])
@pytest.mark.parametrize("game, frame_skip", [("Asteroids", 1), ("Pong", 4), ("MsPacman", 4)])
def test_frame_skip_is_one_for_asteroids_and_four_otherwise(config, game, frame_skip):
    c = config.get_config(game)
    assert c.env.name == game and c.env.frame_skip == frame_skip


def test_games_run_with_the_originals_wrappers():
    c = atari_rnn.get_config("Asteroids")
    c.env.p_blank = 0.0
    env = make_env(c.env, 2, SEED)
    settings = {
        "stack_num": 1,
        "frame_skip": 1,
        "noop_max": 30,
        "use_fire_reset": True,
        "episodic_life": True,
        "reward_clip": True,
        "full_action_space": False,
        "img_height": 84,
        "img_width": 84,
        "gray_scale": True,
    }
    config = env._pools[0].config
    assert {name: config[name] for name in settings} == settings
    assert config["repeat_action_probability"] == pytest.approx(0.25)


@pytest.mark.skipif(
    not 1 < len(os.sched_getaffinity(0)) == os.cpu_count(), reason="needs several cores, none forbidden"
)
@pytest.mark.parametrize("first_core", [-1, 0, 1])
def test_emulator_threads_are_tied_to_cores_if_so_configured(first_core):
    def cores_of_threads():
        found = {}
        for task in pathlib.Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # A thread that has just ended.
                found[task] = re.search(r"Cpus_allowed_list:\s+(\S+)", (task / "status").read_text())[1]
        return found

    before = cores_of_threads()
    c = atari_rnn.get_config("Pong")
    c.env.first_core = first_core
    env = make_env(c.env, 2, SEED)
    new = [cores for task, cores in cores_of_threads().items() if task not in before]
    tied = [cores for cores in new if cores.isdecimal()]
    count = min(2, os.cpu_count())  # A thread per environment, and no more than cores.
    expected = [] if first_core < 0 else [str((first_core + i) % os.cpu_count()) for i in range(count)]
    assert env.num_envs == 2 and sorted(tied) == sorted(expected)


@pytest.mark.parametrize("game, num_actions", [("Pong", 6), ("Breakout", 4)])
def test_actions_are_the_games_minimal_set(game, num_actions):
    env = Atari(game, 1, SEED)
    assert env.action == ActionSpec(True, num_actions)
    assert env.observation.shape == (84, 84, 1) and env.observation.is_image


def test_the_games_are_those_that_envpool_registers(tmp_path, monkeypatch):
    from envpool import list_all_envs
    from envpool.atari.registration import atari_game_list

    games = discovery.atari_games()
    assert len(games) == len(atari_game_list) and {f"{game}-v5" for game in games} <= {*list_all_envs()}
    monkeypatch.setenv("ENVPOOL_ASSETS_PATH", str(tmp_path))
    with pytest.raises(DiscoveryError, match=r"^ENVPOOL_ASSETS_PATH=.*: has no games in atari/roms"):
        discovery.atari_games.__wrapped__()
