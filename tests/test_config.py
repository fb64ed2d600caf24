"""Configurations: every file is valid, and each mistake is one sentence that names the field."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dvrl_jax import agents, discovery
from dvrl_jax.errors import ConfigError, DiscoveryError
from dvrl_jax.runs import command_line
from dvrl_jax.runs import config as config_lib

ROOT = Path(__file__).parent.parent
NAMES = ["pong_dvrl", "pong_rnn", "atari_dvrl", "atari_rnn", "mountain_hike_dvrl", "mountain_hike_rnn"]


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_valid(name):
    config = config_lib.finalise(importlib.import_module(f"configs.{name}").get_config())
    assert config_lib.flatten(config).keys() == config_lib.flatten(config_lib.default_config()).keys()
    assert config.model.resample == (config.loss.encoding_coef > 0)


# The settings of the original's Atari experiments, and of its default where those say nothing.
ATARI = {"num_envs": 16, "num_steps": 5, "bptt_segments": 10, "total_env_steps": 50_000_000, "env.p_blank": 0.5}
ATARI |= {"model.h_dim": 256, "model.action_encoding": 128, "model.batch_norm": True, "model.policy_batch_norm": True}
ATARI |= {"model.channels": (32, 64, 32), "model.obs_loss_coef": 0.0, "model.detach_encoder": False}
ATARI |= {"loss.gamma": 0.99, "loss.value_coef": 0.5, "loss.action_coef": 1.0, "loss.entropy_coef": 0.01}
ATARI |= {"loss.reward_scale": 1.0, "optimizer.name": "rmsprop", "optimizer.alpha": 0.99, "optimizer.eps": 1e-5}
ATARI |= {"optimizer.max_grad_norm": 0.5}
DVRL = {"algorithm": "dvrl", "model.num_particles": 15, "model.z_dim": 256, "loss.encoding_coef": 0.1}
DVRL |= {"optimizer.learning_rate": 2e-4, "model.resample": True}
RNN = {"algorithm": "rnn", "loss.encoding_coef": 0.0, "optimizer.learning_rate": 1e-4}


@pytest.mark.parametrize(("name", "settings"), [("dvrl", DVRL), ("rnn", RNN)])
def test_atari_configurations_have_the_settings_of_the_paper(name, settings):
    module = importlib.import_module(f"configs.atari_{name}")
    for game, frame_skip in (("Pong", 4), ("Asteroids", 1)):
        fields = config_lib.flatten(config_lib.finalise(module.get_config(game)))
        wanted = ATARI | settings | {"env.name": game, "env.frame_skip": frame_skip}
        assert {field: fields[field] for field in wanted} == wanted
    assert importlib.import_module(f"configs.pong_{name}").get_config() == module.get_config("Pong")


IMPOSSIBLE = [
    ("model.num_particles", 0, "at least 1"),
    ("bptt_segments", 0, "at least 1"),
    ("num_envs", 0, "at least 1"),
    ("num_envs", 1, "at least 2 with batch normalisation"),
    ("total_env_steps", -5, "at least 1"),
    ("log.interval", 0, "at least 1"),
    ("seed", -1, "between"),
    ("env.name", "Pnog", "did you mean Pong"),
    ("env.name", "MountainHike", "model.channels"),
    ("env.p_blank", 1.5, "probability"),
    ("env.frame_skip", 108_001, "at most 108,000, the frames after which"),
    ("model.channels", (32, 64), "3 channel counts"),
    ("model.channels", (32, 0, 32), "at least 1"),
    ("loss.gamma", 1.1, "between 0 and 1"),
    ("loss.td_lambdas", (1.0, 0.0, 0.5), "two numbers"),
    ("loss.td_lambdas", (1.0, -0.1), "two numbers"),
    ("model.summary", "sum", "one of gru, mean, mgf, attention"),
    ("model.resampling", "sytematic", "one of systematic, stratified"),
    ("model.resample_below", 1.1, "between 0 and 1"),
    ("model.soft_alpha", -0.1, "between 0 and 1"),
    ("model.min_emission_std", -0.1, "at least 0"),
    ("loss.reward_scale", 0.0, "greater than 0"),
    ("optimizer.name", "sgd", "rmsprop or adam"),
    ("optimizer.learning_rate", float("nan"), "finite"),
    ("optimizer.betas", (0.9,), "two numbers"),
    ("algorithm", "lstm", "one of dpfrl, dvrl, lru, memoryless, rnn"),
]


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE)
def test_an_impossible_value_is_named(field, value, message):
    config = importlib.import_module("configs.pong_dvrl").get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as error:
        config_lib.finalise(config)
    assert message in str(error.value)
    assert field in str(error.value) or "env.name" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mountain_hike_rnn", "mountain_hike_dvrl"])
def test_a_detached_belief_needs_a_loss_of_its_own(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict({"model.detach_encoder": True, "loss.encoding_coef": 0.0})
    with pytest.raises(ConfigError, match=r"^model.detach_encoder = True: must be False without loss.enc"):
        config_lib.finalise(config)


def test_resampling_that_is_switched_off_has_no_scheme_of_its_own():
    config = importlib.import_module("configs.mountain_hike_dvrl").get_config()
    config.model.resampling = "soft"
    config_lib.finalise(config)
    for field, value in (("model.resample", False), ("loss.encoding_coef", 0.0)):
        changed = config_lib.merge(config_lib.flatten(config) | {field: value})
        with pytest.raises(ConfigError, match=r"^model.resampling = 'soft': must be 'systematic' where"):
            config_lib.finalise(changed)


@pytest.mark.parametrize("algorithm", ["dpfrl", "lru"])
def test_a_belief_without_losses_has_no_encoding_loss(algorithm):
    with pytest.raises(ConfigError, match=rf"^loss.encoding_coef = 0.1: must be 0 for {algorithm}, which has no loss"):
        config_lib.from_fields({"algorithm": algorithm, "loss.encoding_coef": 0.1})
    # What switches DVRL's resampling off does not switch off theirs.
    assert config_lib.from_fields({"algorithm": algorithm}).model.resample


def test_an_rnn_has_both_weights_of_its_observation_loss_or_none():
    for values, message in [
        ({"model.obs_loss_coef": 1.0}, "loss.encoding_coef = 0.0: must be greater than 0 .* model.obs_loss_coef"),
        ({"loss.encoding_coef": 0.1}, "loss.encoding_coef = 0.1: must be 0 for an RNN without model.obs_loss_coef"),
        ({"model.obs_loss_coef": 1.0, "loss.encoding_coef": 0.1}, None),
    ]:
        config = importlib.import_module("configs.mountain_hike_rnn").get_config()
        config.update_from_flattened_dict(values)
        if message is None:
            config_lib.finalise(config)
            continue
        with pytest.raises(ConfigError, match=message):
            config_lib.finalise(config)


def test_stored_configurations_are_checked():
    for values, message in [({"modle.h_dim": 3}, "did you mean model.h_dim"), ({"seed": "x"}, "seed = 'x'")]:
        with pytest.raises(ConfigError, match=message):
            config_lib.merge(values)
    merged = config_lib.merge({"model.channels": [1, 2, 3], "loss.gamma": 1})
    assert merged.model.channels == (1, 2, 3) and merged.loss.gamma == 1.0


def test_a_belief_has_a_coefficient_for_each_of_its_losses(monkeypatch):
    class Lossy(agents.RNN):
        name, losses = None, {"encoding": 0.0, "size": 1}

    monkeypatch.setattr(agents, "named", lambda: {"rnn": agents.RNN, "lossy": Lossy})
    config = config_lib.from_fields({"algorithm": "lossy"})
    assert type(config.loss.size_coef) is float and config.loss.size_coef == 1.0
    assert config_lib.from_fields({"algorithm": "lossy", "loss.size_coef": 0.5}).loss.size_coef == 0.5
    assert "size_coef" not in config_lib.from_fields({"algorithm": "rnn"}).loss
    with pytest.raises(ConfigError, match=r"^loss.size_coef = -1.0: must be at least 0"):
        config_lib.from_fields({"algorithm": "lossy", "loss.size_coef": -1})
    with pytest.raises(ConfigError, match=r"^loss.size_coef: there is no such field"):
        config_lib.from_fields({"algorithm": "rnn", "loss.size_coef": 1.0})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"value": 0.5}, "has the loss 'value', which every agent has; give it another name"),
        ({"size": -1.0}, "has the loss 'size' with the coefficient -1.0, which must be a number, at least 0"),
        ({"size": "1"}, "has the loss 'size' with the coefficient '1', which must be a number"),
    ],
)
def test_losses_have_names_of_their_own_and_possible_coefficients(losses, message, monkeypatch):
    class Lossy(agents.RNN):
        name = None

    Lossy.losses = losses
    monkeypatch.setattr(discovery, "named", lambda base, package: {"lossy": Lossy})
    with pytest.raises(DiscoveryError, match=message):
        agents.named()


def test_numbers_of_numpy_are_numbers():
    merged = config_lib.merge({"seed": np.int64(3), "loss.gamma": np.float32(0.5)})
    assert type(merged.seed) is int and type(merged.loss.gamma) is float


def test_description_marks_what_differs():
    config = importlib.import_module("configs.pong_rnn").get_config()
    lines = config_lib.describe(config).splitlines()
    marked = {line.split()[1] for line in lines if line.startswith("*")}
    assert {"env.name", "env.p_blank", "bptt_segments"} <= marked and "num_envs" not in marked
    shorter = config_lib.describe(config, whole=False).splitlines()
    assert {line.split()[1] for line in shorter} == marked and len(shorter) == len(marked) < len(lines)


def test_a_configuration_file_is_checked(tmp_path):
    file = tmp_path / "mine.py"
    for line, named in [
        ("c.model.h_dimm = 8", "error: model.h_dimm: there is no such field; did you mean model.h_dim?\n"),
        ("del c.checkpoint; c.checkpoint = 3", "error: checkpoint: is a group of fields"),
        ("del c.seed; c.seed = '1'", "error: seed = '1': must be a whole number\n"),
        ("c.model.h_dim = '8'", f"error: {file}, line 6: TypeError: "),
        ("c.seed = = 1", f"error: {file}, line 6: SyntaxError: invalid syntax\n"),
        ("from configs import defualt", f"error: {file}, line 6: ImportError: cannot import name 'defualt'"),
        ("c.seed = 1 / 0", f"error: {file}, line 6: ZeroDivisionError: division by zero\n"),
        ("return", "error: --config: get_config of that file returns NoneType, and must return a ConfigDict\n"),
    ]:
        body = f"def get_config():\n    c = default.get_config()\n    {line}\n    return c\n"
        file.write_text(f"from configs import default\n\n\n{body}")
        command = [sys.executable, ROOT / "train.py", f"--workdir={tmp_path / 'run'}", f"--config={file}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and named in result.stderr and "Traceback" not in result.stderr, result.stderr
        assert not (tmp_path / "run").exists()


def test_a_configuration_file_without_get_config_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("c = 1\n")
    command = [sys.executable, ROOT / "train.py", f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'mine.py'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr == f"error: {tmp_path / 'mine.py'}: has no function get_config\n"


def test_a_mistake_is_named_where_it_is(tmp_path):
    """In what the file imports, with all that the error says, and a path with a space in it."""
    folder = tmp_path / "my configs"
    folder.mkdir()
    file, helper = folder / "mine.py", folder / "helper_of_mine.py"
    file.write_text(f"import sys\nsys.path.append({str(folder)!r})\nimport helper_of_mine\n")
    for text, said in [
        ("a = (\n", "line 1: SyntaxError: '(' was never closed"),
        ("\nraise ValueError('this needs\\n  b and c')\n", "line 2: ValueError: this needs b and c"),
    ]:
        helper.write_text(text)
        command = [sys.executable, ROOT / "train.py", f"--workdir={tmp_path / 'run'}", f"--config={file}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and result.stderr == f"error: {helper}, {said}\n"


COMMANDS = [
    (["--config=configs/mountain_hike_rnn.py", "--config.model.hdim=3"], "model.hdim"),
    (["--config=configs/mountain_hike_rnn.py", "--config.model.h_dim=1.5"], "config.model.h_dim"),
    (["--config=configs/nothing.py"], "configs/nothing.py"),
    (["--config=nothing"], "'nothing' (configurations are aliased_hike, atari_dvrl, atari_rnn, default, "),
    (["--config=pond_rnn"], "did you mean pong_rnn?"),
    (["--config=configs/pond_rnn.py"], "did you mean configs/pong_rnn.py?"),
    (["--config", "atari_dvrl:Pnog"], "env.name"),
    (["--config=pong_dvrl:Asteroids"], "'Asteroids'"),
    (["--config.seed=3"], "--config.seed: needs a configuration too"),
    (["--config=configs/atari_dvrl.py:Pnog"], "env.name"),
    (["--cofnig=configs/pong_dvrl.py"], "cofnig"),
    (["--config", "configs/nothing.py"], "configs/nothing.py"),
    (["--config=configs/pong_dvrl.py:Asteroids"], "'Asteroids'"),
    (
        ["--config=mountain_hike_rnn", "--config.total_env_steps=15e-1"],
        "--config.total_env_steps=15e-1: must be a whole",
    ),
    (["--config=mountain_hike_rnn", "--config.seed=None"], "--config.seed=None: must be a whole number"),
    (["--config=mountain_hike_rnn", "--config.seed"], "--config.seed: needs a value, as in --config.seed=0"),
    (["--config=mountain_hike_rnn", "--config.model.batch_norm=yes"], "batch_norm=yes: must be True or False"),
    (["--config=mountain_hike_rnn", "--config.model.channels=a"], "channels=a: must be a tuple, such as (64, 64)"),
    (["--config.num_envs=0", "--config=mountain_hike_rnn"], "num_envs = 0: must be at least 1"),
    (
        ["--config=mountain_hike_rnn", "--config.algorithm=drvl"],
        "algorithm = 'drvl': must be one of dpfrl, dvrl, lru, memoryless, rnn",
    ),
    (["--workdir=" + "x" * 300, "--config=mountain_hike_rnn"], "cannot be read (File name too long)"),
    (["--seed=3"], "--seed: there is no such flag; did you mean --config.seed?"),
    (["--config=configs/mountain_hike_rnn.py", "--config.model=3"], "model: is a group of fields"),
    (["--config=configs/mountain_hike_rnn.py", "seed=3"], "seed=3: unexpected argument; all are --name=value"),
    ([], "--config"),
]


@pytest.mark.parametrize(("arguments", "named"), COMMANDS)
def test_the_command_line_refuses_in_one_sentence(arguments, named, tmp_path):
    command = [sys.executable, ROOT / "train.py", f"--workdir={tmp_path / 'run'}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert named in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["train", "evaluate", "plot", "reproduce"])
def test_flags_are_checked_before_anything_large_is_imported(program):
    """So a mistake costs a fraction of a second."""
    command = [sys.executable, "-X", "importtime", "-m", f"dvrl_jax.commands.{program}", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "  --" in result.stdout
    assert "absl" in imported and not imported & {"jax", "flax", "envpool", "orbax", "matplotlib"}


def test_a_misspelt_game_is_named_before_anything_large_is_imported():
    command = [sys.executable, "-X", "importtime", "train.py", "--config=pong_rnn", "--config.env.name=Pomg"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert result.returncode == 2 and result.stderr.endswith("Atari game that EnvPool has; did you mean Pong?\n")
    assert "absl" in imported and not imported & {"jax", "flax", "envpool", "orbax", "matplotlib"}


@pytest.mark.parametrize(
    ("name", "value", "package"),
    [("TQDM_MININTERVAL", "x", "tqdm"), ("JAX_TRANSFER_GUARD", "abc", "jax"), ("MPLBACKEND", "abc", "matplotlib")],
)
def test_an_environment_variable_that_a_dependency_cannot_read_is_named(name, value, package):
    program = f"from dvrl_jax.runs import command_line\n\ndef main():\n    import {package}\n\ncommand_line.run(main)"
    command, variables = [sys.executable, "-c", program], os.environ | {name: value}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {name}={value}: cannot be used, and must be")
    assert result.stderr.count("\n") == 1


def test_fields_are_known_without_importing_environments_and_belief_models():
    declared, is_all = config_lib.declared_fields()
    known = config_lib.flatten(config_lib.with_settings())
    # Tests that have run before in this process may have belief models of their own.
    of_tests = {
        f"loss.{loss}_coef" for kind in agents.named().values() if "tests" in kind.__module__ for loss in kind.losses
    }
    assert is_all and config_lib.flatten(declared) == {k: v for k, v in known.items() if k not in of_tests}


def test_what_only_importing_tells_is_left_to_it(tmp_path):
    file = tmp_path / "env.py"
    file.write_text("class Env:\n    settings = {'steps': 3}\n    name: str\n")
    assert discovery.declared(tmp_path, "settings") == [{"steps": 3}] and discovery.declared(tmp_path, "name") == []
    file.write_text("class Env:\n    settings = Other.settings | {'steps': 3}\n")
    assert discovery.declared(tmp_path, "settings") is None


@pytest.mark.parametrize(
    ("text", "like", "value"),
    [
        *[("1e6", 3, 1_000_000), ("2.50e1", 3, 25), ("0x10", 3, 16), ("-1", 3, -1), ("1e-2", 0.5, 0.01)],
        *[("F", True, False), ("8", (1, 2), (8,)), ("(8, 8)", (1, 2), (8, 8)), ("1e6", "a", "1e6")],
    ],
)
def test_a_value_is_read_as_what_its_field_holds(text, like, value):
    assert config_lib.parse("field", text, like) == value
    assert type(config_lib.parse("field", text, like)) is type(like)


def test_a_run_resumes_with_changed_fields_and_without_a_configuration(tmp_path):
    run, other = (f"--workdir={tmp_path / name}" for name in ("run", "other"))
    with pytest.raises(ConfigError, match=r"^--config.seed: needs a configuration too"):
        command_line._resumed({"seed": 3}, [other, "--config.seed=3"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert command_line._resumed({"total_env_steps": 1000}, [run, "--config.total_env_steps=1000"]) == [run]
    assert command_line._without_file == {"total_env_steps": 1000}
    command_line._without_file.clear()


def test_a_name_is_the_file_that_the_package_ships(tmp_path, monkeypatch):
    files = config_lib.shipped()
    for given, found in [
        (["--config=pong_rnn"], [f"--config={files['pong_rnn']}"]),
        (["-config", "atari_rnn:Asteroids", "--x"], [f"-config={files['atari_rnn']}:Asteroids", "--x"]),
        (["--x=pong_rnn", "--config=configs/pong_rnn.py"], ["--x=pong_rnn", "--config=configs/pong_rnn.py"]),
        (["--config"], ["--config"]),
    ]:
        assert command_line._with_files(given) == found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pong_rnn").write_text("a file of that name comes first")
    assert command_line._with_files(["--config=pong_rnn"]) == ["--config=pong_rnn"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--episodes=3"], "--workdir: is needed"),
        (["--workdir=x", "--seed=99999999999999999999"], "--seed=99999999999999999999"),
        (["--workdir=x", "--episodes=10000000000"], "--episodes=10000000000"),
    ],
)
def test_evaluate_refuses_in_one_sentence(arguments, named):
    command = [sys.executable, ROOT / "evaluate.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert named in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
