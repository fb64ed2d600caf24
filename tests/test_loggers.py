"""What is logged besides metrics.jsonl says the same as it, once, and changes nothing in what is learned."""

import resource
import shutil
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from configs import atari_dvrl, default
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import loggers, run_directory
from dvrl_jax.viewing import reconstructions
from tests.tiny import HIKE_STEPS_PER_UPDATE as STEPS_PER_UPDATE
from tests.tiny import checkpoint_arrays, tiny_hike, tiny_pong, train


def events(path):
    """All (name, step, value) in the event files of a run; value is None for pictures."""
    found = []
    for file in sorted((path / "tensorboard").glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                is_image = value.HasField("image")
                found.append((value.tag, event.step, None if is_image else value.simple_value))
    return found


def test_event_files_say_what_the_metrics_say_after_a_resume(tmp_path):
    config = tiny_hike("dvrl")
    settings = {"log__save_reconstruction_interval": 12, "log__predicted_times": (0, 2)}
    train(tmp_path / "run", config, total_env_steps=33 * STEPS_PER_UPDATE, **settings)
    train(tmp_path / "run", config, total_env_steps=50 * STEPS_PER_UPDATE)
    expected = {}
    for line in run_directory.read_metrics(tmp_path / "run"):
        expected |= {(name, line["env_steps"]): value for name, value in loggers.numbers(line).items()}
    everything = events(tmp_path / "run")
    drawn = [(name, step) for name, step, value in everything if value is None]
    assert drawn == [("reconstructions", update * STEPS_PER_UPDATE) for update in (12, 24, 36, 48)]
    found = [event for event in everything if event[2] is not None]
    assert len(found) == len(expected) == len({(name, step) for name, step, _ in found})
    for name, step, value in found:
        np.testing.assert_allclose(value, expected[name, step], rtol=1e-6)
    assert {"loss.total", "particles.killed", "obs.fps"} <= {name for name, _, _ in found}

    assert reconstructions.saved_updates(tmp_path / "run") == [12, 24, 36, 48]
    arrays = reconstructions.load(tmp_path / "run", 36)
    assert arrays.keys() == {"observation", "observed", "prediction_0", "prediction_2", "env_steps"}
    assert arrays["prediction_2"].shape == arrays["observation"].shape == (config.num_envs, 2)
    assert arrays["env_steps"] == 36 * STEPS_PER_UPDATE and np.all(np.isfinite(arrays["prediction_2"]))

    quiet = {"log__tensorboard": False, "total_env_steps": 50 * STEPS_PER_UPDATE}
    train(tmp_path / "quiet", config, **quiet)
    assert not (tmp_path / "quiet" / "tensorboard").exists()
    loud, silent = checkpoint_arrays(tmp_path / "run"), checkpoint_arrays(tmp_path / "quiet")
    for name in silent:
        np.testing.assert_array_equal(loud[name], silent[name], err_msg=name)


def test_pictures_of_reconstructions_survive_in_new_event_files(tmp_path):
    run = run_directory.RunDirectory(tmp_path)
    rng = np.random.default_rng(0)
    images = {
        "observation": rng.integers(0, 255, (6, 8, 8, 1)).astype(np.uint8),
        "prediction_0": rng.uniform(size=(6, 8, 8, 1)).astype(np.float32),
        "prediction_10": rng.uniform(size=(6, 8, 8, 1)).astype(np.float32),
    }
    for update in (5, 10, 15):
        stored = reconstructions.to_storage(images | {"env_steps": np.uint32(80 * update)})
        reconstructions.save(tmp_path, update, stored)
    reconstructions.rewind(tmp_path, 10)
    assert reconstructions.saved_updates(tmp_path) == [5, 10]
    picture = reconstructions.picture(tiny_pong("rnn").env, stored)
    assert picture.shape == (4 * 82, 3 * 82, 1)  # Each pixel as 10 x 10, each image in a frame of a pixel.
    np.testing.assert_array_equal(picture[1:81:10, 1:81:10], images["observation"][0])
    np.testing.assert_array_equal(picture[1:81:10, 1:81:10], picture[10:81:10, 10:81:10])
    shown = picture[83:163:10, 165:245:10] / 255.0
    np.testing.assert_allclose(shown, images["prediction_10"][1], atol=0.5 / 255 + 1e-6)
    for _ in range(2):
        loggers.TensorBoard(run, atari_dvrl.get_config("Pong")).close()
        assert [(name, step) for name, step, _ in events(tmp_path)] == [
            ("reconstructions", 400),
            ("reconstructions", 800),
        ]
    run.close()


def test_a_damaged_reconstruction_is_left_out_and_named(tmp_path, capsys):
    run = run_directory.RunDirectory(tmp_path)
    image = np.zeros((1, 8, 8, 1), np.uint8)
    for update in (5, 10, 15):
        arrays = {"observation": image, "prediction_0": image, "env_steps": np.uint32(update)}
        reconstructions.save(tmp_path, update, arrays)
    (tmp_path / "reconstructions" / "5" / "prediction_0.npy").write_bytes(b"")  # What a power cut may leave.
    (tmp_path / "reconstructions" / "15" / "env_steps.npy").unlink()
    loggers.TensorBoard(run, atari_dvrl.get_config("Pong")).close()
    assert [step for _, step, _ in events(tmp_path)] == [10]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "5/prediction_0.npy: cannot be read" in said[0] and "15: has no env_steps" in said[1]
    run.close()


def test_what_cannot_be_written_is_named(tmp_path):
    run = run_directory.RunDirectory(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8)
    board = loggers.TensorBoard(run, tiny_hike("rnn"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # As on a disk that is nearly full.
    try:
        with pytest.raises(RunError, match=r"tensorboard: cannot be written \(File too large\)"):
            board.image("picture", image, 1)
        with pytest.raises(RunError, match=r"tensorboard: cannot be written"):
            board.line({"env_steps": 2, "loss.total": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    board.close()
    for name in ("tensorboard", "reconstructions"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).write_text("not a directory")
    with pytest.raises(
        RunError, match=r"tensorboard: cannot be written \(it is a file, or a link that leads nowhere\)"
    ):
        loggers.TensorBoard(run, tiny_hike("rnn"))
    with pytest.raises(RunError, match=r"reconstructions/5: cannot be written \(Not a directory\)"):
        reconstructions.save(tmp_path, 5, {"observation": image})
    run.close()


def test_wandb_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # As if it were not installed.
    with pytest.raises(ConfigError, match=r"extra 'wandb'"):
        train(tmp_path / "run", tiny_hike("rnn"), log__wandb=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("log.save_reconstruction_interval", -1, "at least 0"),
        ("log.save_reconstruction_interval", 5, "obs_loss_coef"),
        ("log.predicted_times", (), "at least one"),
        ("log.predicted_times", (-1,), "between 0 and 1000"),
    ],
)
def test_impossible_log_settings_are_named(field, value, message):
    config = default.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message) as error:
        config_lib.finalise(config)
    assert field in str(error.value)
