"""Pictures show what happened: true frames behind blank observations, the belief step by step, the right way up."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import pong_rnn
from dvrl_jax import acting, envs
from dvrl_jax.envs import mountain_hike
from dvrl_jax.errors import RunError
from dvrl_jax.viewing import pictures, recording
from dvrl_jax.viewing.pictures import hike
from tests.tiny import tiny_hike


@pytest.fixture(scope="module")
def hike_recording():
    config = tiny_hike("dvrl")
    env = envs.make_env(config.env, 1, seed=0, keep_view=True)
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    return recording.record(agent, env, jax.random.PRNGKey(1), times=(0, 1))


def frames_recording(steps=4):
    rng = np.random.default_rng(0)
    view = rng.integers(1, 255, (steps, 84, 84, 1)).astype(np.uint8)
    observed = np.arange(steps) % 2 == 0
    weights = rng.dirichlet(np.ones(15), steps)
    return recording.Recording(
        view=view,
        obs=view * observed[:, None, None, None].astype(np.uint8),
        observed=observed,
        predictions={dt: rng.uniform(size=view.shape).astype(np.float32) for dt in recording.TIMES},
        particles=None,
        weights=weights,
        value=rng.normal(size=steps),
        policy=rng.dirichlet(np.ones(6), steps),
        action=np.arange(steps),
        reward=np.ones(steps),
    )


def test_flicker_hands_the_true_frame_over_and_changes_nothing_else():
    plain, keeping = (
        envs.Flicker(envs.Batched(envs.MountainHike(0.3), 4), p_blank=0.5, keep_view=keep_view)
        for keep_view in (False, True)
    )
    key, action = jax.random.PRNGKey(0), jnp.full((4, 2), 0.1)
    a, b = plain.reset(key), keeping.reset(key)
    for _ in range(2):
        for field in ("obs", "reward", "done", "observed", "true_reward"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        np.testing.assert_array_equal(keeping.view(b), a.inner[0].state.position)
        a, b = plain.step(a, action), keeping.step(b, action)
    with pytest.raises(ValueError, match="keep_view"):
        plain.view(a)


def test_a_recording_is_one_game(hike_recording):
    r = hike_recording
    assert len(r.view) == mountain_hike.EPISODE_LENGTH
    assert np.all(np.linalg.norm(np.diff(r.view, axis=0), axis=-1) < 0.3)  # No jump to another episode's start.
    assert set(r.predictions) == {0, 1}
    np.testing.assert_allclose(r.weights.sum(-1), 1.0, rtol=1e-5)
    assert np.all((r.effective_sample_size >= 1 - 1e-5) & (r.effective_sample_size <= 3 + 1e-5))


def test_particles_alone_average_to_the_reconstruction(hike_recording):
    r = hike_recording
    mean = np.einsum("tk,tkd->td", r.weights, r.particles)
    np.testing.assert_allclose(mean, r.predictions[0], atol=1e-4)


def test_particles_that_predict_nothing_are_recorded_by_their_weights(monkeypatch):
    monkeypatch.setattr("dvrl_jax.agents.DVRL.predict", lambda agent, start, times, key: {})
    config = tiny_hike("dvrl")
    env = envs.make_env(config.env, 1, seed=0, keep_view=True)
    r = recording.record(acting.make_agent(config, env, jax.random.PRNGKey(0)), env, jax.random.PRNGKey(1), max_steps=3)
    assert r.predictions == {} and r.particles is None and r.weights.shape == (3, 3)
    assert pictures.HikePainter().still(r).shape[0] > 300


@pytest.mark.parametrize(("frame_skip", "fps"), [(4, 15), (1, 60)])
def test_videos_of_games_run_as_the_games_do(frame_skip, fps):
    config = pong_rnn.get_config().env
    config.frame_skip = frame_skip
    assert pictures.painter_for(envs.make_env(config, 1, seed=0, keep_view=True)).fps == fps


def test_the_map_is_the_right_way_up():
    _, (axis, *_) = hike.layout(3)
    hike.draw_landscape(axis)
    image = axis.images[0]
    # What is drawn at a place, found by way of the axis's own transformations, is the reward of that place.
    for place in ((0.5, 0.5), (0.0, -0.9), (-0.9, -0.5), (-0.8, 0.8)):
        rows, columns = image.get_array().shape
        left, right, bottom, top = image.get_extent()
        row = round((place[1] - bottom) / (top - bottom) * (rows - 1))
        column = round((place[0] - left) / (right - left) * (columns - 1))
        expected = float(mountain_hike.height_reward(jnp.asarray(place)))
        assert abs(image.get_array()[row, column] - expected) < 0.1
    low, high = axis.transData.transform([(0, -1), (0, 1)])
    assert high[1] > low[1] and image.origin == "lower"


def test_a_hike_becomes_an_animation_and_a_still(hike_recording, tmp_path):
    short = jax.tree.map(lambda x: x[:4], hike_recording)
    painter = pictures.HikePainter()
    pictures.write(tmp_path / "hike.gif", painter, short)
    with Image.open(tmp_path / "hike.gif") as image:
        assert image.n_frames == 4
    pictures.write(tmp_path / "hike.png", painter, short)
    assert Image.open(tmp_path / "hike.png").size[0] > 600
    blind = short._replace(predictions={}, particles=None, weights=None)
    assert painter.still(blind).shape[0] > 300 and len(list(painter.frames(blind))) == 4


def test_particles_are_seen_and_the_legend_is_read_at_800_pixels(hike_recording):
    short = jax.tree.map(lambda x: x[:4], hike_recording)
    apart = np.stack(np.meshgrid(np.linspace(-1, 1, 4), (-0.2, 0.3, 0.8), indexing="ij"), axis=-1)  # Off the path.
    short = short._replace(particles=mountain_hike.OBSERVATION_SCALE * apart, obs=0 * short.obs - 20.0)
    figure = hike.HikePainter().figure(short)
    pixels, axis = hike.figure_to_array(figure).astype(int), figure.axes[0]
    columns, rows = axis.transData.transform(apart.reshape(-1, 2)).round().astype(int).T
    red, green, blue = pixels[len(pixels) - 1 - rows, columns].T
    assert np.all(red > 130) and np.all(red - green > 60) and np.all(red - blue > 60)
    legend, to_800 = axis.get_legend(), 800 / pixels.shape[1]
    assert min(text.get_fontsize() for text in legend.get_texts()) * figure.dpi / 72 * to_800 > 12
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.y0 >= 0 and extent.y1 < axis.xaxis.label.get_window_extent().y0


def test_predictions_of_hikes_are_drawn_where_they_are():
    readings, centre = np.full((4, 2), -5.0), np.zeros((4, 2))
    up = centre.copy()
    up[1] = (0.0, 9.0)  # Of the environment at the top right, in units of readings.
    painter, seen = pictures.HikePainter(), np.ones(4, bool)
    before, after = (painter.predictions(readings, seen, {0: centre, 3: where}) for where in (centre, up))
    rows, columns = np.nonzero(np.any(before != after, axis=-1))
    height, width, _ = before.shape
    assert rows.max() < 0.4 * height and columns.min() > 0.4 * width
    assert rows.max() - rows.min() > 0.05 * height > columns.max() - columns.min()  # From the centre upwards.
    blank = np.arange(4) != 1  # Of that environment nothing was read: no mark at (0, 0), where a blank would be.
    marked = lambda observed: painter.predictions(0 * readings, observed, {0: centre - 5.0})
    rows, columns = np.nonzero(np.any(marked(seen) != marked(blank), axis=-1))
    assert rows.size and rows.max() < 0.5 * height and columns.min() > 0.4 * width
    assert painter.predictions(readings[:1], seen[:1], {0: centre[:1]}).shape[-1] == 3
    assert pictures.find_painter(envs.Environment, is_image=False) is None


def test_frames_show_the_game_beside_what_the_agent_got():
    r, painter = frames_recording(), pictures.FramePainter()
    frames = list(painter.frames(r))
    assert len(frames) == 4 and all(frame.shape == frames[0].shape for frame in frames)
    assert frames[0].shape[0] % 2 == 0 and frames[0].shape[1] % 2 == 0
    for t, frame in enumerate(frames):
        np.testing.assert_array_equal(painter.panel(frame, 0), r.view[t, :, :, 0])
        np.testing.assert_array_equal(painter.panel(frame, 1), r.obs[t, :, :, 0])
        np.testing.assert_allclose(painter.panel(frame, 3) / 255.0, r.predictions[1][t, :, :, 0], atol=0.5 / 255 + 1e-6)
    without = r._replace(predictions={}, weights=None)
    assert len(list(painter.frames(without))) == 4


def test_frames_of_any_number_of_channels_and_any_actions_are_drawn():
    r, painter = frames_recording(), pictures.FramePainter()
    stack = lambda images: np.concatenate([images] * 3 + [images // 2], axis=-1)
    stacked = r._replace(view=stack(r.view), obs=stack(r.obs), predictions={}, action=np.full((4, 2), 0.25))
    frame = next(iter(painter.frames(stacked)))
    np.testing.assert_array_equal(painter.panel(frame, 0), r.view[0, :, :, 0])  # The first channel is red.
    batch = stack(r.obs)
    assert painter.predictions(batch, np.ones(len(batch), bool), {0: batch}).shape[-1] == 3


def test_each_channel_has_a_colour_of_its_own():
    planes = np.eye(7, dtype=bool).reshape(7, 1, 1, 7) & np.ones((7, 5, 6, 1), bool)
    row = pictures.FramePainter().predictions(planes, np.ones(7, bool), {0: planes.astype(np.float32)})
    colours = row[2 :: 5 * 14 + 2, 3]  # Of one environment below the other, pixels of 14 x 14 in a frame of one.
    assert len(np.unique(colours, axis=0)) == 7 and np.all(colours.max(-1) == 255)
    assert row.shape == (7 * (5 * 14 + 2), 2 * (6 * 14 + 2), 3)
    np.testing.assert_array_equal(row[:, :86], row[:, 86:])


def test_a_wide_image_stays_wide():
    r, painter = frames_recording(), pictures.FramePainter()
    wide = r._replace(view=r.view[:, ::2], obs=r.obs[:, ::2], predictions={})
    frame = next(iter(painter.frames(wide)))
    np.testing.assert_array_equal(painter.panel(frame, 0)[:42], wide.view[0, :, :, 0])
    assert np.all(painter.panel(frame, 0)[43:] == 255)


def test_a_picture_that_cannot_be_written_is_refused_before_the_game(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"must end in one of \.mp4, \.gif, \.png"):
        pictures.check_path(tmp_path / "x.avi")
    with pytest.raises(RunError, match="no directory"):
        pictures.check_path(tmp_path / "nowhere" / "x.gif")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # As if it were not installed.
    with pytest.raises(RunError, match=r"extra 'video'"):
        pictures.check_path(tmp_path / "x.mp4")


def test_mp4_where_it_is_installed(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    pictures.write(tmp_path / "x.mp4", pictures.FramePainter(), frames_recording())
    count, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "x.mp4"))
    assert count == 4 and 0.1 < seconds < 1.0
