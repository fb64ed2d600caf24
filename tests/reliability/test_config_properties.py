"""Any configuration is trained or refused in one sentence that names a field: random ones, by Hypothesis.

CONFIG_EXAMPLES=1000 CONFIG_TRAININGS=40 pytest -n0 tests/reliability/test_config_properties.py tries more of them.
"""

import json
import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dvrl_jax.agents import particles
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import run_directory, training

EXAMPLES = int(os.environ.get("CONFIG_EXAMPLES", 400))  # Configurations to check only.
TRAININGS = int(os.environ.get("CONFIG_TRAININGS", 2))  # To train two updates each, which has to be compiled.
FIELDS = config_lib.flatten(config_lib.default_config())

ANY_NUMBER = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([2**31, 2**32, 10**400, 1e39, 1e-50, 0.5, 1.0])
)
ANY_TEXT = st.one_of(st.text(max_size=80), st.sampled_from(["rnn", "dvrl", "adam", "Pong", "MountainHike"]))
ANY_VALUE = st.one_of(
    ANY_NUMBER, ANY_TEXT, st.booleans(), st.none(), st.lists(st.one_of(ANY_NUMBER, ANY_TEXT, st.booleans()), max_size=4)
)


def of_the_right_type(value):
    """Values of a field's type, most of them impossible."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(st.integers(-3, 3), st.integers(), st.sampled_from([16, 2**31 - 1, 2**31, 2**32 - 1, 10**400]))
    if isinstance(value, float):
        return ANY_NUMBER
    return ANY_TEXT if isinstance(value, str) else st.lists(st.one_of(ANY_NUMBER, st.booleans()), max_size=4)


def test_every_field_is_drawn_here():
    assert FIELDS.keys() == VALID.keys()


@st.composite
def changes(draw):
    """A few fields changed to anything."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True))
    return {name: draw(st.one_of(of_the_right_type(FIELDS[name]), ANY_VALUE)) for name in names}


def check_sentence(error, fields):
    """One line, not long, that begins with a field's name."""
    message = str(error)
    assert "\n" not in message.replace(repr("\n"), "") or any("\n" in str(value) for value in fields.values())
    assert message.split(" ")[0].rstrip(":") in FIELDS and len(message) < 400, message


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes())
def test_any_values_are_settled_or_refused_by_name(fields):
    try:
        config = config_lib.finalise(config_lib.merge(fields))
    except ConfigError as error:
        check_sentence(error, fields)
        return
    stored = json.loads(config_lib.to_json(config))
    again = config_lib.finalise(config_lib.merge(stored))
    assert config_lib.flatten(again) == config_lib.flatten(config)
    assert config_lib.describe(config).count("\n") == len(FIELDS) - 1


SIZES, COEFS = st.integers(1, 3), st.sampled_from([0.0, 0.1, 1.0])
VALID = {
    "algorithm": st.sampled_from(["rnn", "dvrl", "dpfrl", "lru", "memoryless"]),
    "seed": st.integers(0, 2**31 - 2),
    "num_seeds": st.just(1),
    "num_devices": st.just(1),
    "total_env_steps": st.just(1),  # Replaced by two updates' worth.
    "num_envs": st.integers(1, 4),
    "num_steps": SIZES,
    "bptt_segments": SIZES,
    "max_skipped_updates": st.integers(2, 100),
    "env.name": st.sampled_from(["MountainHike", "MountainHike", "MountainHike", "Pong", "Breakout"]),
    "env.reveal_state": st.booleans(),
    "env.keep_components": st.sampled_from([(), (), (1,), (1, 0), (2,)]),
    "env.obs_noise_std": COEFS,
    "env.noise_components": st.integers(0, 2),
    "env.noise_components_std": COEFS,
    "env.obs_delay": st.integers(0, 2),
    "env.p_repeat": st.sampled_from([0.0, 0.5, 1.0]),
    "env.p_blank": st.sampled_from([0.0, 0.5, 1.0]),
    "env.frame_skip": st.integers(1, 5),
    "env.first_core": st.integers(-1, 5),
    "env.observation_std": COEFS,
    "model.channels": st.lists(SIZES, min_size=2, max_size=3).map(tuple),
    "model.h_dim": SIZES,
    "model.z_dim": SIZES,
    "model.action_encoding": st.integers(0, 2),
    "model.reward_input": st.booleans(),
    "model.num_particles": SIZES,
    "model.batch_norm": st.booleans(),
    "model.policy_batch_norm": st.booleans(),
    "model.detach_encoder": st.booleans(),
    "model.resample": st.booleans(),
    "model.resampling": st.sampled_from(["systematic", *particles.SCHEMES]),
    "model.resample_below": st.sampled_from([1.0, 0.5]),
    "model.update_gate_bias": st.sampled_from([0.0, 3.0]),
    "model.min_emission_std": st.sampled_from([0.0, 0.1]),
    "model.soft_alpha": st.sampled_from([0.0, 0.5, 1.0]),
    "model.summary": st.sampled_from(sorted(particles.SUMMARIES)),
    "model.obs_loss_coef": COEFS,
    "loss.gamma": COEFS,
    "loss.reward_scale": st.sampled_from([0.1, 1.0, 100.0]),
    "loss.bootstrap_truncated": st.booleans(),
    "loss.value_coef": COEFS,
    "loss.action_coef": COEFS,
    "loss.entropy_coef": COEFS,
    "loss.encoding_coef": COEFS,
    "loss.lambda_discrepancy_coef": COEFS,
    "loss.second_value_coef": COEFS,
    "loss.td_lambdas": st.sampled_from([(1.0, 0.0), (0.5, 0.9)]),
    "optimizer.name": st.sampled_from(["rmsprop", "adam"]),
    "optimizer.learning_rate": st.sampled_from([1e-30, 1e-3]),
    "optimizer.alpha": st.sampled_from([0.0, 0.99]),
    "optimizer.betas": st.sampled_from([(0.9, 0.999), (0.0, 0.0)]),
    "optimizer.eps": st.sampled_from([1e-30, 1e-5, 1.0]),
    "optimizer.max_grad_norm": st.sampled_from([1e-30, 0.5, 1e30]),
    "log.interval": SIZES,
    "log.tensorboard": st.booleans(),
    "log.wandb": st.just(False),
    "log.save_reconstruction_interval": st.just(0),
    "log.predicted_times": st.lists(st.integers(0, 10), min_size=1, max_size=3).map(tuple),
    "checkpoint.interval": st.integers(0, 3),
    "checkpoint.minutes": st.sampled_from([0.0, 1e-9, 30.0]),
    "checkpoint.keep": SIZES,
}


@pytest.fixture
def count(record_property):
    """Counts what became of the configurations; as many as wanted were trained."""
    counts = {"trained": 0, "refused": 0}
    yield counts
    print(counts)
    record_property("configurations", counts)
    assert counts["trained"] == TRAININGS


@settings(
    max_examples=20 * TRAININGS,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(fields=st.fixed_dictionaries(VALID))
def test_any_combination_of_valid_values_trains_or_is_refused(count, tmp_path_factory, fields):
    if count["trained"] >= TRAININGS:
        return
    workdir = tmp_path_factory.mktemp("run")
    per_update = fields["num_envs"] * fields["num_steps"]
    config = config_lib.merge(fields | {"total_env_steps": 2 * per_update})
    try:
        run, config = training.prepare(workdir, config, {})
    except ConfigError as error:
        check_sentence(error, fields)
        count["refused"] += 1
        return
    try:
        state = training.train(run, config)
    finally:
        run.close()
    count["trained"] += 1
    assert int(state.env_steps) >= 2 * per_update and int(state.skipped) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    assert run_directory.read_metrics(workdir)[-1]["env_steps"] == int(state.env_steps)
