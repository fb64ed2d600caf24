"""Gymnax's environments, by name and handed over, are adapted by the rule that the docs state, or refused."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import dvrl_jax
from configs import minatar
from dvrl_jax import envs
from dvrl_jax.envs import Gymnax
from dvrl_jax.envs import gymnax as adapter
from dvrl_jax.errors import ConfigError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import run_directory
from dvrl_jax.viewing import evaluation, pictures, reconstructions, recording
from dvrl_jax.viewing.pictures import frames
from tests.tiny import checkpoint_arrays, tiny_config, train, untimed

ROOT = Path(__file__).parent.parent
KEY = jax.random.PRNGKey(0)
# Those that Gymnax cannot make without files from the network.
NEED_FILES = {"MNISTBandit-bsuite": "Gymnax cannot make it"}


def small(env, algorithm, **fields):
    """A small configuration for an environment."""
    config = tiny_config(algorithm, num_envs=2, model__num_particles=2, **fields)
    config.model.channels = (4, 4, 4) if env.observation.is_image else (8, 8)
    return config


@pytest.mark.parametrize("name", gymnax.registered_envs)
def test_every_environment_can_be_trained_or_is_refused_in_a_sentence(name):
    """Acting and the loss of both agents are traced; tests below run some of them."""
    try:
        env = Gymnax.from_config(ConfigDict({"name": f"gymnax/{name}"}))
    except ConfigError as error:
        assert NEED_FILES[name] in str(error) and "\n" not in str(error)
        return
    for algorithm in ("rnn", "dvrl"):
        learner = make_learner(small(env, algorithm), envs.Batched(env, 2))
        state = jax.eval_shape(learner.init, KEY)
        assert state.window.segments.timesteps.obs.shape[3:] == env.observation.shape


def test_the_docs_list_every_environment():
    text = (ROOT / "docs" / "environments.md").read_text()
    listed = re.findall(r"^\| `(\S+-\S+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(gymnax.registered_envs)


@pytest.fixture(scope="module")
def chain():
    return dvrl_jax.make_config("gymnax", "MemoryChain-bsuite,rnn", env__params__memory_length=30)


def test_parameters_are_fields_of_the_configuration(chain):
    assert chain.env.params.to_dict() == {"memory_length": 30, "max_steps_in_episode": 1000}
    assert chain.num_steps * chain.bptt_segments >= 31
    env = dvrl_jax.make_env(chain, num_envs=2)
    state, _ = env.env.reset(KEY)
    state = jax.lax.fori_loop(0, 30, lambda i, s: env.env.step(KEY, s, jnp.int32(0)).state, state)
    last = env.env.step(KEY, state, state.context[0])
    assert last.terminated and not last.truncated and last.reward == 1
    with pytest.raises(ConfigError, match=r"env.params.length: there is no such field; did you mean .*memory_length"):
        dvrl_jax.make_config("gymnax", "MemoryChain-bsuite", env__params__length=3)
    with pytest.raises(ConfigError, match=r"env.params.memory_length = 0.5: must be a whole number"):
        dvrl_jax.make_config("gymnax", "MemoryChain-bsuite", env__params__memory_length=0.5)


def test_a_time_limit_truncates_and_nothing_resets_inside():
    env, params = gymnax.make("Pendulum-v1")
    env = Gymnax(env, params.replace(max_steps_in_episode=2))
    state, _ = env.reset(KEY)
    first = env.step(KEY, state, jnp.zeros(1))
    second = env.step(KEY, first.state, jnp.zeros(1))
    assert not first.truncated and second.truncated and not second.terminated
    assert second.state.time == 2 and not np.array_equal(first.obs, second.obs)


def test_real_actions_are_clipped_and_scaled_to_their_bounds():
    space = SimpleNamespace(
        low=np.array([-2.0, 0, -np.inf]), high=np.array([2.0, 10, 3.0]), shape=(3,), dtype=np.float32
    )
    spec, act = adapter._action(space)
    assert spec == envs.ActionSpec(discrete=False, size=3)
    np.testing.assert_allclose(act(jnp.array([-5.0, 0.5, 7.0])), [-2, 7.5, 7])
    np.testing.assert_allclose(act(jnp.array([0.5, 2.0, -7.0])), [1, 10, -7])


def box(low, high):
    return SimpleNamespace(low=low, high=high)


@pytest.mark.parametrize(
    ("shape", "dtype", "space", "spec"),
    [
        ((), jnp.int32, SimpleNamespace(n=5), ((5,), jnp.float32, "categorical")),
        ((), jnp.float32, box(0, 1), ((1,), jnp.float32, "normal")),
        ((3,), jnp.int8, box(0, 1), ((3,), jnp.float32, "normal")),
        ((6, 2), jnp.int32, box(0, 5), ((12,), jnp.float32, "normal")),
        ((6, 2), jnp.float32, box(0, 1), ((12,), jnp.float32, "bernoulli")),
        ((4, 9, 3), bool, None, ((108,), bool, "bernoulli")),
        ((5, 9, 7), bool, None, ((5, 9, 7), bool, "bernoulli")),
        ((5, 9, 7), jnp.uint8, box(0, 255), ((5, 9, 7), jnp.uint8, "bernoulli")),
        ((5, 9, 7), jnp.int32, box(0, 1), ((5, 9, 7), jnp.float32, "bernoulli")),
        ((5, 9, 7), jnp.bfloat16, box(0, 2), ((5, 9, 7), jnp.float32, "normal")),
    ],
)
def test_observations_are_adapted_by_shape_type_and_bounds(shape, dtype, space, spec):
    found, show = adapter._observation(jax.ShapeDtypeStruct(shape, dtype), space)
    assert (found.shape, found.dtype, found.likelihood) == spec
    shown = jax.eval_shape(show, jax.ShapeDtypeStruct(shape, dtype))
    assert (shown.shape, shown.dtype) == (found.shape, found.dtype)


# --- Environments handed over ----------------------------------------------------------------------------------------


class Lights:
    """An environment of the interface's older form: a board of real numbers whose brightest row must be named.

    With `step_env` it does not begin the next episode by itself.
    """

    def __init__(self, length=3, late_type=jnp.float32):
        self.length, self.late_type = length, late_type

    def action_space(self, params):
        return SimpleNamespace(n=6, dtype=jnp.int32)

    def reset(self, key, params):
        state = {"row": jax.random.randint(key, (), 0, 6), "time": 0}
        return self.show(state), state

    def show(self, state):
        return jnp.zeros((6, 5, 2)).at[state["row"]].set(2.5)

    def step_env(self, key, state, action, params):
        reward = jnp.where(action == state["row"], params["prize"], 0)
        state = {"row": jax.random.randint(key, (), 0, 6), "time": state["time"] + 1}
        return self.show(state).astype(self.late_type), state, reward, state["time"] == self.length, {}

    reset_env = reset

    def step(self, key, state, action, params):
        raise AssertionError("begins the next episode by itself")


class Restarting:
    """What a wrapper leaves of it: a `step` that begins the next episode by itself, and all else handed on."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, key, params):
        return self.env.reset(key, params)

    def step(self, key, state, action, params):
        obs, state, reward, done, info = self.env.step_env(key, state, action, params)
        begun = self.env.reset(key, params)
        obs, state = jax.tree.map(lambda new, old: jnp.where(done, new, old), begun, (obs, state))
        return obs, state, reward, done, info


@pytest.mark.parametrize("wrap", [lambda env: env, Restarting], ids=["plain", "restarting"])
def test_the_older_form_is_stepped_and_each_done_terminates(wrap):
    env = envs.Batched(Gymnax(wrap(Lights()), {"prize": 7}), 2)
    state, step = env.reset(KEY), jax.jit(env.step)
    envs.check(env, state)
    for time in range(1, 8):
        rows = np.argmax(state.obs[:, :, 0, 0], axis=1)
        state = step(state, jnp.asarray(rows))
        assert np.all(state.reward == 7) and not np.any(state.truncated)
        assert np.all(state.done == (time % 3 == 0))


def test_an_agent_learns_from_discrete_observations():
    env = Gymnax(*gymnax.make("FrozenLake-misc"))
    config = small(env, "dvrl", log__interval=2)
    _, history = dvrl_jax.make_train(config, env)(num_updates=2)
    first = history[0]["loss.encoding"]
    assert history[-1]["updates.skipped"] == 0 and 0 < first < 2 * np.log(16)  # Nats of one of 16 fields.


# --- MinAtar, from training to pictures -------------------------------------------------------------------------------

MINATAR = {"num_envs": 2, "num_steps": 2, "bptt_segments": 2, "total_env_steps": 32, "checkpoint.interval": 4}
MINATAR |= {"model.channels": (4, 4, 4), "model.h_dim": 8, "model.action_encoding": 4, "model.obs_loss_coef": 1.0}
MINATAR |= {"loss.encoding_coef": 0.1, "log.interval": 2, "log.tensorboard": False, "log.predicted_times": (0,)}


@pytest.fixture(scope="module")
def breakout(tmp_path_factory):
    """The directory of a run of flickering Breakout: 8 updates, with a checkpoint in their middle."""
    config = minatar.get_config("Breakout,rnn")
    config.update_from_flattened_dict(MINATAR)
    workdir = tmp_path_factory.mktemp("runs") / "breakout"
    train(workdir, config, log__save_reconstruction_interval=8)
    return workdir


def test_minatar_resumes_bit_for_bit(breakout, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(breakout, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    train(resumed, None)
    straight, parts = checkpoint_arrays(breakout), checkpoint_arrays(resumed)
    assert straight.keys() == parts.keys() and any(".brick_map" in name for name in straight)
    for name, array in straight.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    lines = untimed(run_directory.read_metrics(resumed))
    assert lines == untimed(run_directory.read_metrics(breakout)) and [x["update"] for x in lines] == [2, 4, 6, 8]


def hues(picture):
    """How many of Breakout's channels have pixels of their colour: paddle, ball, trail and bricks."""
    colours = [frames._colour(channel, 4) for channel in range(4)]
    return sum(np.any(np.all(picture == np.round(255 * colour), axis=-1)) for colour in colours)


def test_pictures_of_minatar_have_a_colour_for_each_channel(breakout):
    config = evaluation.read_run_config(breakout)
    env = envs.make_env(config.env, 1, 0, keep_view=True)
    agent, _ = evaluation.load_agent(breakout, config, env, "latest")
    recorded = recording.record(agent, env, KEY, max_steps=3, times=(0,))
    painter = pictures.painter_for(env)
    with_legend = painter.still(recorded)
    top = painter.margin + painter.caption
    game = with_legend[top : top + painter.side, painter.margin : painter.margin + painter.side]
    assert hues(game) == 4 and hues(with_legend[top + painter.side :]) == 4
    saved = reconstructions.load(breakout, 8)
    saved["observation"][:] = 255 * recorded.view[-1]
    drawn = reconstructions.picture(config.env, saved)
    assert drawn.shape == (2 * 82, 2 * 82, 3) and hues(drawn[1:81, 1:81]) == 4


def test_what_changes_type_or_cannot_be_adapted_is_refused():
    with pytest.raises(
        ValueError, match=r"step returns observations as int32\[6, 5, 2\], and reset as float32\[6, 5, 2\]"
    ):
        Gymnax(Lights(late_type=jnp.int32), {"prize": 7})
    with pytest.raises(ValueError, match="int has no reset, and is none of Gymnax's interface"):
        Gymnax(3)
    with pytest.raises(
        ValueError, match="its actions are of a SimpleNamespace, and must be of a Discrete or Box space"
    ):
        adapter._action(SimpleNamespace(spaces=()))
    with pytest.raises(ValueError, match="its observations are a dict, and must be one array"):
        adapter._observation({"a": jax.ShapeDtypeStruct((), bool)}, None)


def test_an_unknown_id_lists_the_nearest():
    with pytest.raises(ConfigError, match=r"'gymnax/MemoryChan': .* nearest are gymnax/MemoryChain-bsuite, "):
        dvrl_jax.make_config("gymnax", "MemoryChan")


def test_a_missing_extra_and_another_package_of_that_name_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(adapter, "_make", adapter._make.__wrapped__)
    gone = [name for name in sys.modules if name.split(".")[0] == "gymnax"]
    with monkeypatch.context() as patch:
        for name in gone:
            patch.delitem(sys.modules, name)
        (tmp_path / "gymnax.py").write_text("registered_envs = []")
        patch.syspath_prepend(tmp_path)
        with pytest.raises(
            ConfigError, match=r"needs Gymnax 1.0.1 or later .*, and .* is another package .*popgym-arcade"
        ):
            dvrl_jax.make_config("default", env__name="gymnax/CartPole-v1")
        patch.delitem(sys.modules, "gymnax")
        (tmp_path / "gymnax.py").write_text("import jax\njax.no_such_function")
        with pytest.raises(
            ConfigError, match=r"needs Gymnax 1.0.1 .* cannot be imported \(AttributeError: .*no_such_fun"
        ):
            dvrl_jax.make_config("default", env__name="gymnax/CartPole-v1")
    monkeypatch.setitem(sys.modules, "gymnax", None)  # As if it were not installed.
    with pytest.raises(ConfigError, match=re.escape("pip install 'dvrl-jax[gymnax]'")):
        dvrl_jax.make_config("default", env__name="gymnax/CartPole-v1")
