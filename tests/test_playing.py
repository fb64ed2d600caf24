"""What is reported of games with given weights: returns of whole games, beliefs that start anew, greedy or not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import acting
from dvrl_jax.agents import Timestep
from dvrl_jax.envs import ActionSpec, Batched, BatchedEnvironment, EnvState, MountainHike, ObservationSpec
from dvrl_jax.viewing import evaluation, playing, recording
from tests.tiny import recall, tiny_config, tiny_hike


class Scripted(BatchedEnvironment):
    """Games of two lives, with a late reset after each life as EnvPool has it; rewards are clipped, but not true ones.

    Environment b's lives last `LIVES[b]` steps; then the script begins again.
    """

    LIVES = ((2, 3), (4, 1), (1, 2))
    restorable = True

    def __init__(self):
        self.num_envs = len(self.LIVES)
        self.observation, self.action = ObservationSpec((2,), jnp.float32), ActionSpec(discrete=True, size=2)
        self.script = [self._of_one(np.random.default_rng(number), lives) for number, lives in enumerate(self.LIVES)]

    @staticmethod
    def _of_one(rng, lives):
        """(true reward, done, valid, game over) of each call."""
        calls = []
        for life, length in enumerate(lives):
            for step in range(length):
                done = step == length - 1
                calls.append((float(rng.integers(2, 9)), done, True, done and life == len(lives) - 1))
            calls.append((0.0, False, False, False))
        return calls

    def reset(self, key):
        del key
        return EnvState.begin(jnp.zeros((), jnp.int32), jnp.ones((self.num_envs, 2)))

    def step(self, state, action):
        del action
        rows = [jnp.asarray(calls)[state.inner % len(calls)] for calls in self.script]
        true, done, valid, over = jnp.stack(rows).T
        flags = {"done": done > 0, "valid": valid > 0, "game_over": over > 0}
        obs = jnp.full((self.num_envs, 2), 1.0) * (1 + state.inner)
        rewards = {"reward": jnp.clip(true, -1, 1), "true_reward": true}
        return state._replace(inner=state.inner + 1, obs=obs, final_obs=obs, **rewards, **flags)

    def first_game(self, number):
        """True rewards of the valid steps of an environment's first game."""
        calls = self.script[number]
        over = next(place for place, call in enumerate(calls) if call[3])
        return [true for true, _, valid, _ in calls[: over + 1] if valid]


def agent_for(env, algorithm="rnn"):
    return acting.make_agent(tiny_config(algorithm), env, jax.random.PRNGKey(0))


def test_returns_are_of_whole_games_and_not_clipped():
    env = Scripted()
    games = evaluation.play_games(agent_for(env), env, jax.random.PRNGKey(1))
    expected = [env.first_game(number) for number in range(3)]
    np.testing.assert_allclose(games.returns, [sum(game) for game in expected])
    np.testing.assert_array_equal(games.lengths, [5, 5, 3])
    returns, summary = games.returns, games.summary()
    low, middle, high = sorted(returns)
    assert summary["episodes"] == 3 and summary["mean"] == pytest.approx(sum(returns) / 3)
    deviation = np.sqrt(sum((x - sum(returns) / 3) ** 2 for x in returns) / 2)
    assert summary["standard_error"] == pytest.approx(deviation / np.sqrt(3))
    assert (summary["min"], summary["median"], summary["max"]) == pytest.approx((low, middle, high))
    assert summary["mean_length"] == pytest.approx(13 / 3)
    assert summary["returns"] == returns.tolist() and summary["lengths"] == [5, 5, 3]


def test_a_recording_is_of_the_true_rewards_of_one_game():
    env = Scripted()
    recorded = recording.record(agent_for(env), env, jax.random.PRNGKey(1))
    np.testing.assert_allclose(recorded.reward, env.first_game(0))


@pytest.mark.parametrize("algorithm", ["rnn", "dvrl"])
def test_beliefs_start_anew_with_each_life_and_after_a_late_reset(algorithm):
    env = Scripted()
    seen = playing.watch(agent_for(env, algorithm), env, jax.random.PRNGKey(1), steps=12)
    for number, calls in enumerate(env.script):
        ends = [done or not valid for _, done, valid, _ in itertools.islice(itertools.cycle(calls), 11)]
        np.testing.assert_array_equal(seen.is_first[:, number], [True, *ends])
    # A belief that begins depends on nothing before it: the RNN's, after the same observation, is the same.
    if algorithm == "rnn":
        agent, none = agent_for(env), jnp.zeros(3)
        seeing = lambda obs: Timestep(jnp.asarray(obs), agent.initial_action(3), none, none == 0)
        begun = [agent.update(agent.initial(3), seeing(obs), ())[0].h for obs in seen.obs]
        same = np.all(np.isclose(seen.belief.h, np.stack(begun), atol=1e-6), axis=-1)
        np.testing.assert_array_equal(same, seen.is_first)


def test_an_agent_gets_to_see_what_led_to_an_observation():
    """The action and the reward before it; where an episode begins, action 0 and no reward."""
    env = Scripted()
    keep = lambda agent, turn, key: (turn.start.timestep, turn.action, turn.after.reward)
    seen, action, reward = playing.watch(agent_for(env), env, jax.random.PRNGKey(1), 12, keep)
    np.testing.assert_array_equal(seen.obs[1:, :, 0], np.broadcast_to(np.arange(1, 12)[:, None], (11, 3)))
    prev_action = np.where(seen.is_first[1:], 0, action[:-1])
    np.testing.assert_array_equal(seen.prev_action[1:], np.eye(2)[prev_action])
    np.testing.assert_array_equal(seen.prev_reward[1:], np.where(seen.is_first[1:], 0, reward[:-1]))
    assert seen.is_first[0].all() and not seen.prev_reward[0].any()
    assert np.any(reward[:-1][seen.is_first[1:]] != 0) and np.any(seen.prev_reward != 0)


def test_greedy_actions_are_the_most_probable_ones_and_others_are_drawn():
    env, key = Batched(MountainHike(0.3), 50), jax.random.PRNGKey(1)
    agent = acting.make_agent(tiny_hike("rnn"), env, jax.random.PRNGKey(0))
    greedy, drawn = (playing.watch(agent, env, key, steps=8, greedy=greedy) for greedy in (True, False))
    np.testing.assert_allclose(greedy.action, greedy.policy)
    # Fresh policies have a standard deviation of 1; of 800 numbers it is known to 2.5%.
    assert np.std(drawn.action - drawn.policy) == pytest.approx(1.0, abs=0.13)
    env = recall(50)
    agent = acting.make_agent(tiny_config("rnn"), env, jax.random.PRNGKey(0))
    greedy, drawn = (playing.watch(agent, env, key, steps=8, greedy=greedy) for greedy in (True, False))
    np.testing.assert_array_equal(greedy.action, np.argmax(greedy.policy, -1))
    taken = np.take_along_axis(drawn.policy, drawn.action[..., None], axis=-1)
    assert 0.2 < np.mean(drawn.action != np.argmax(drawn.policy, -1)) < 0.6 and np.all(taken > 0)
