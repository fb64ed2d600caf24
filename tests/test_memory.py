"""What does not fit into memory is refused by arithmetic, before anything of that size is made."""

import jax
import jax.numpy as jnp
import pytest

from dvrl_jax import envs, memory
from dvrl_jax.errors import RunError
from dvrl_jax.learner import make_learner
from tests.tiny import tiny_hike, tiny_pong, train


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 3 GB available, in no control group."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "own")
    memory.MEMINFO.write_text("MemTotal:  9000000 kB\nMemAvailable:  2000000 kB\nSwapFree:  1000000 kB\n")
    return tmp_path


def limit(folder, files, most, used):
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in zip(files, (most, used), strict=True):
        (folder / file).write_text(f"{text}\n")


SECOND, FIRST = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("own", "folder", "files", "most", "free"),
    [
        ("0::/\n", "cgroup", SECOND, 10**9, 10**9 - 1000),
        ("0::/\n", "cgroup", SECOND, "max", 3_072_000_000),
        ("0::/user/job\n", "cgroup/user", SECOND, 10**9, 10**9 - 1000),
        ("5:memory:/docker/1\n0::/\n", "cgroup/memory/docker/1", FIRST, 10**9, 10**9 - 1000),
        ("0::/\n", "cgroup/memory", FIRST, 9223372036854771712, 3_072_000_000),
    ],
)
def test_the_tightest_limit_of_machine_and_control_groups_counts(system, own, folder, files, most, free):
    memory.OWN_GROUP.write_text(own)
    limit(system / folder, files, most, 1000)
    assert memory.free_of_host() == free


def test_a_system_that_does_not_tell_refuses_nothing(system):
    memory.MEMINFO.unlink()
    assert memory.free_of_host() is None
    memory.check_size(memory.size_of(jax.ShapeDtypeStruct((10**12,), jnp.float32)))


@pytest.mark.parametrize(
    "fields", [{"num_envs": 100_000, "model.num_particles": 1_000_000}, {"model.channels": (1_000_000, 1_000_000)}]
)
def test_sizes_that_are_too_large_are_refused_before_they_are_made(tmp_path, fields):
    config = tiny_hike("dvrl")
    config.update_from_flattened_dict(fields)
    with pytest.raises(RunError, match=r"^training needs at least [\d,.]+ GB of memory, and [\d.]+ GB are free; fewer"):
        train(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_games_that_are_too_many_are_refused_before_one_is_made(system):
    config = tiny_pong("rnn")
    with pytest.raises(RunError, match=r"^env: 10000 of Pong cannot be made \(they need 10.0 GB of memory, and 3.1 GB"):
        envs.make_env(config.env, 10_000, 0)


def test_asking_for_the_size_of_games_starts_none():
    config = tiny_pong("rnn")
    env = envs.make_env(config.env, config.num_envs, 0)
    learner = make_learner(config, env)
    shapes = jax.eval_shape(learner.init, jax.random.PRNGKey(0))
    state = learner.init(jax.random.PRNGKey(0))
    assert memory.size_of(shapes) == memory.size_of(state)
    again = make_learner(config, envs.make_env(config.env, config.num_envs, 0)).init(jax.random.PRNGKey(0))
    assert bool((state.actor.env.obs == again.actor.env.obs).all())
