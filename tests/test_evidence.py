"""The tools of the evidence: the exact filter and the planners against versions written here, the probe, the tables."""

import gzip
import itertools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dvrl_jax import api
from dvrl_jax.errors import RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import checkpoints, run_directory
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import plotting
from evidence import causes, kalman, planner, probe, references, tables
from tests import tiny
from tests.test_mountain_hike import clipped, random_actions, surface

# --- The exact filter ------------------------------------------------------------------------------------------------


def particle_filter(obs, actions, sigma, rng, particles=100_000):
    """Posterior means and variances [T, 2] by a bootstrap filter with the true model, resampled at every step."""
    position = np.array([-0.85, -0.85]) + 0.1 * rng.standard_normal((particles, 2))
    means, variances = [], []
    for reading, action in zip(obs / 10.0, actions, strict=True):
        log_weight = -0.5 * np.sum((reading - position) ** 2, axis=1) / sigma**2
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        means.append(weight @ position)
        variances.append(weight @ (position - means[-1]) ** 2)
        positions = (rng.random() + np.arange(particles)) / particles
        chosen = np.minimum(np.searchsorted(np.cumsum(weight), positions), particles - 1)
        position = position[chosen] + clipped(action) + 0.025 * rng.standard_normal((particles, 2))
    return np.array(means), np.array(variances)


@pytest.mark.parametrize("sigma", [0.15, 0.3])
def test_the_exact_filter_agrees_with_many_particles(sigma):
    rng = np.random.default_rng(0)
    actions = random_actions(1, 15)  # Of up to three times the useful length.
    noise = 0.025 * rng.standard_normal((15, 2))
    moves = np.concatenate([np.zeros((1, 2)), np.cumsum(clipped(actions) + noise, axis=0)])[:-1]
    position = np.array([-0.75, -1.0]) + moves
    obs = 10 * (position + sigma * rng.standard_normal((15, 2)))
    means, variances = particle_filter(obs, actions, sigma, rng)
    exact = kalman.track(jnp.asarray(obs)[:, None], jnp.asarray(actions)[:, None], sigma)[:, 0]
    np.testing.assert_allclose(exact, means, atol=0.003)
    expected = kalman.schedule(sigma, 15).posterior
    np.testing.assert_allclose(variances, np.stack([expected, expected], axis=1), rtol=0.05)


@pytest.mark.parametrize("sigma", [0.3, 0.0])
def test_the_least_encoding_loss_is_the_entropy_of_an_episodes_observations(sigma):
    steps = 6
    # Standing still, readings have the start and all disturbances so far in common.
    times = np.arange(steps)
    shared = 0.1**2 + 0.025**2 * np.minimum(times[:, None], times)
    covariance = 10.0**2 * (shared + sigma**2 * np.eye(steps))
    entropy = stats.multivariate_normal(cov=covariance).entropy()
    assert kalman.least_encoding_loss(sigma, steps) == pytest.approx(2 * entropy / steps, rel=1e-6)


def test_readings_without_noise_are_believed_and_the_blind_know_only_how_far_noise_has_led():
    exact, blind = kalman.schedule(0.0, 4), kalman.schedule(math.inf, 4)
    np.testing.assert_array_equal(exact.gain, 1.0)
    np.testing.assert_array_equal(exact.posterior, 0.0)
    np.testing.assert_array_equal(blind.gain, 0.0)
    np.testing.assert_allclose(blind.posterior, 0.01 + 0.025**2 * np.arange(4))


# --- The planners ----------------------------------------------------------------------------------------------------


def two_steps(mean, sigma, directions, nodes=10):
    """The best mean return of two steps from a belief after its reading, by quadrature over the noise, in NumPy."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    weight = np.outer(w, w).reshape(-1) / (2 * np.pi)
    angle = 2 * np.pi * np.arange(directions) / directions
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    actions = np.concatenate([np.zeros((1, 2)), 0.05 * circle, 0.025 * circle])
    price = 0.1 * np.linalg.norm(actions, axis=1)
    now = 0.01 * sigma**2 / (0.01 + sigma**2)
    ahead = now + 0.025**2
    known = ahead * sigma**2 / (ahead + sigma**2)
    # First move; where the mean goes; second move, seen from each such mean.
    second = mean + actions[:, None] + math.sqrt(ahead - known) * grid
    reached = second[:, :, None] + actions
    last = np.einsum("g,nmag->nma", weight, surface(reached[..., None, :] + math.sqrt(known + 0.025**2) * grid))
    value = (last - price).max(axis=-1) @ weight
    reward = surface(mean + actions[:, None] + math.sqrt(ahead) * grid) @ weight
    return np.max(reward + value - price)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_plan_of_two_steps_is_the_best_that_quadrature_finds(sigma):
    plan = planner.make_plan(sigma, 0.01, 4, steps=2)
    for x, y in [(-0.385, -0.445), (-0.205, -0.695)]:
        i, j = round((x + planner.EXTENT) / 0.01 - 0.5), round((y + planner.EXTENT) / 0.01 - 0.5)
        assert plan.axis[i] == pytest.approx(x) and plan.axis[j] == pytest.approx(y)
        value = planner.best_action_value(plan.outlook[0], plan.actions, 0.01)[i, j]
        assert value == pytest.approx(two_steps(np.array([x, y]), sigma, 4), abs=0.01)


def test_what_a_plan_without_choice_promises_is_what_standing_still_brings():
    plan = planner.make_plan(0.3, 0.02, 0)
    returns = references.play(references.stand_still, (), 0.3, kalman.schedule(0.3).gain, 1000, seed=0)
    assert abs(returns.mean() - plan.value) < 4 * returns.std() / math.sqrt(1000)


@pytest.fixture(scope="module")
def measured():
    return references.measure_all(0.05, 8, 1000, seed=0, finer=False)


def test_references_keep_what_their_plans_promise_and_more_is_seen_more_is_reached(measured):
    found = {(r["name"], r["observation_std"]): references.Reference(**r) for r in measured["references"]}
    for one in found.values():
        if one.planned is not None:  # These cells are coarse: 2 % of the way from the random policy's return.
            assert one.mean == pytest.approx(one.planned, abs=4 * one.standard_error + 4)
    order = [found["best without readings", None], *(found[references.BEST, noise] for noise in (0.3, 0.15))]
    order.append(found[references.SIGHTED, None])
    assert all(a.mean < b.mean and a.planned < b.planned for a, b in itertools.pairwise(order))
    for noise in (0.15, 0.3):
        guess = found["takes the exact filter's mean for the position", noise]
        assert found["takes the last reading for the position", noise].mean < guess.mean
        assert guess.mean < found[references.BEST, noise].mean + 3 * guess.standard_error


def test_the_random_policy_earns_what_it_earns_in_numpy(measured):
    rng = np.random.default_rng(0)
    position = np.array([-0.85, -0.85]) + 0.1 * rng.standard_normal((4000, 2))
    total = np.zeros(4000)
    for _ in range(75):
        action = rng.standard_normal((4000, 2))
        position += clipped(action) + 0.025 * rng.standard_normal((4000, 2))
        total += surface(position) - 0.1 * np.linalg.norm(action, axis=1)
    (found,) = [r for r in measured["references"] if r["name"] == references.RANDOM]
    error = math.hypot(found["standard_error"], total.std() / math.sqrt(4000))
    assert abs(found["mean"] - total.mean()) < 4 * error < 15


def test_shares_are_between_the_random_policy_and_the_best(measured, tmp_path):
    (tmp_path / "references.json").write_text(json.dumps(measured))
    known = references.load(tmp_path / "references.json")
    named = {(r.name, r.observation_std): r.mean for r in known}
    best, low = named[references.BEST, 0.3], named[references.RANDOM, None]
    assert references.share(low, known, 0.3) == 0 and references.share(best, known, 0.3) == 1
    assert references.share((low + best) / 2, known, 0.3) == pytest.approx(0.5)
    assert references.share(named[references.SIGHTED, None], known, 0.0) == 1
    assert math.isnan(references.share(best, known, 0.2))
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(RunError, match=r"other\.json: not the references"):
        references.load(tmp_path / "other.json")


def test_references_are_shown_position_reading_and_mean_of_the_same_moment():
    def choose(parameters, seen, key):
        agree = (jnp.abs(seen.position - seen.reading) < 1e-5) & (jnp.abs(seen.position - seen.mean) < 1e-5)
        return jnp.where(agree, 0.05, jnp.nan)

    returns = references.play(choose, (), 0.0, kalman.schedule(0.0).gain, 20, seed=0)
    assert returns.shape == (20,) and np.all(np.isfinite(returns))


# --- The probe -------------------------------------------------------------------------------------------------------


def test_ridge_regression_finds_a_linear_map_and_ignores_what_says_nothing():
    rng = np.random.default_rng(0)
    x = np.concatenate([3 + 2 * rng.standard_normal((20, 60, 3)), np.full((20, 60, 1), 7.0)], axis=-1)
    y = x[..., :3] @ rng.standard_normal((3, 2)) + 0.5
    linear, penalty = probe.fit(x, y)
    np.testing.assert_allclose(linear(x), y, atol=1e-4)
    assert penalty == min(probe.PENALTIES)
    # A unit that is saturated but for the last digits: nothing that the agent's heads could use.
    saturated = 1 - 1e-6 * y
    assert np.all(probe.fit(saturated, y)[0](saturated).std(axis=(0, 1)) < 0.01)
    # Many features of noise: a small penalty would fit them.
    noise = rng.standard_normal((4, 30, 100))
    assert probe.fit(noise, rng.standard_normal((4, 30, 2)))[1] == max(probe.PENALTIES)


def test_errors_are_per_coordinate_and_their_spread_is_that_of_episodes():
    position = np.zeros((5, 2, 2))
    estimate = np.zeros((5, 2, 2))
    estimate[:, 0, 0], estimate[:, 1, 1] = 2.0, 4.0
    found = probe.errors(estimate, position)
    assert found["rmse_x"] == pytest.approx(math.sqrt(2)) and found["rmse_y"] == pytest.approx(math.sqrt(8))
    assert found["rmse"] == pytest.approx(math.sqrt(5))
    # Squared errors of the episodes 2 and 8: standard error 3, divided by 2 sqrt(5).
    assert found["standard_error"] == pytest.approx(3 / (2 * math.sqrt(5)))


def check_estimates(estimates, features):
    """Bounds that hold for every agent; `features` are the numbers that are read out, by name."""
    found = {one["name"]: one for one in estimates}
    exact = found.pop(probe.EXACT)
    # Only with positions, observations and actions of the same steps is the filter's error the one it expects.
    expected = math.sqrt(kalman.schedule(0.3).posterior.mean())
    assert abs(exact["rmse"] - expected) < 5 * exact["standard_error"]
    assert abs(found["last reading"]["rmse"] - 0.3) < 5 * found["last reading"]["standard_error"]
    assert all(exact["rmse"] < one["rmse"] for one in found.values())
    assert found["last reading, regressed"]["rmse"] < found["constant mean"]["rmse"]
    baselines = {"constant mean", "mean of the step", "last reading", "last reading, regressed"}
    assert features == {name: one.get("features") for name, one in found.items() if name not in baselines}


def test_the_probe_compares_an_rnns_state_with_the_exact_filter():
    config = config_lib.finalise(tiny.tiny_hike("rnn"))
    env = api.make_env(config, num_envs=200)
    played = probe.play(api.make_agent(config, env), env, jax.random.PRNGKey(0))
    check_estimates(probe.estimates(played, 0.3), {"state h": 8})


def save_run(path):
    """An untrained DVRL agent as a run whose only checkpoint is of update 20."""
    config = config_lib.finalise(tiny.tiny_hike("dvrl"))
    (path / "config.json").write_text(config_lib.to_json(config))
    state = make_learner(config, api.make_env(config)).init(jax.random.PRNGKey(0))
    saver = checkpoints.Checkpoints(path / "checkpoints", keep=1)
    saver.save(state._replace(update=jnp.int32(20)), True, -250.0, {})
    saver.wait()


def test_the_probe_restores_plays_prints_and_stores(tmp_path, monkeypatch, capsys):
    save_run(tmp_path)
    flags = {"workdir": str(tmp_path), "episodes": 200, "checkpoint": "best", "seed": 1}
    monkeypatch.setattr(probe, "FLAGS", SimpleNamespace(**flags))
    assert probe.main() == 0
    text = capsys.readouterr().out
    assert "checkpoint of update 20, noise 0.3" in text and "on 100 held-out episodes" in text
    result = json.loads((tmp_path / "probe-20.json").read_text())
    assert (result["update"], result["env_steps"], result["held_out"]) == (20, 400, 100)
    assert -420 < result["mean_return"] < -340  # Of the untrained policy.
    features = {probe.HEADS: 8, "particles' mean [h, phi_z]": 16, "particles' mean z": 5, "reconstruction": None}
    check_estimates(result["estimates"], features)
    for one in result["estimates"]:
        assert f"| {one['name']} | {one.get('features', '-')} | " in text
        assert f" | {one['rmse_x']:.4f} | {one['rmse_y']:.4f} | " in text


def test_a_state_that_holds_the_position_is_read_out_exactly():
    position = np.random.default_rng(0).uniform(-1, 1, (10, 20, 2)).astype(np.float32)
    zeros = np.zeros((10, 20, 2), np.float32)
    reward = np.zeros((10, 20))
    played = probe.Episodes(position, zeros, zeros, reward, {"state h": np.tanh(position) @ np.ones((2, 2))}, None)
    knows = played._replace(features={"state h": position[..., ::-1] * 3 - 1})
    error = lambda played: {one["name"]: one["rmse"] for one in probe.estimates(played, 0.3)}["state h"]
    assert error(knows) < 1e-4
    assert error(played) > 0.2  # This state holds but the sum of both coordinates.


def test_the_probe_refuses_what_it_cannot_probe(tmp_path):
    def refused(message, **fields):
        config = config_lib.finalise(tiny.tiny_hike("rnn", **fields))
        (tmp_path / "config.json").write_text(config_lib.to_json(config))
        with pytest.raises(RunError, match=message):
            probe.probe(tmp_path, 8, "best", seed=0)

    with pytest.raises(RunError, match="holds no run"):
        probe.probe(tmp_path, 8, "best", seed=0)
    refused("is a run of Pong; only Mountain Hike", env__name="Pong", model__channels=(8, 8, 8))
    refused(r"changes observations \(env.p_blank = 0.5\)", env__p_blank=0.5)
    refused("no checkpoint 'best'")
    assert [path.name for path in tmp_path.glob("probe*")] == []


# --- Causes ----------------------------------------------------------------------------------------------------------


def test_the_losses_parts_add_up_to_the_gradient_that_training_takes():
    config = config_lib.finalise(tiny.tiny_hike("dvrl"))
    env = api.make_env(config)
    learner = make_learner(config, env)
    state, draws = learner.init(jax.random.PRNGKey(0)), learner.draw(jax.random.PRNGKey(1))
    given = (state.params, state.batch_stats, state.actor, state.window, state.update, draws)
    parts, _ = jax.jit(lambda *given: causes.gradients_by_loss(config, env, *given))(*given)
    whole, _ = jax.jit(learner.gradient)(*given)
    assert all(optax.tree.norm(part) > 0 for part in parts.values())
    difference = jax.tree.map(lambda total, *parts: total - sum(parts), whole, *parts.values())
    assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(whole)
    numbers = causes.gradient_numbers(parts, max_norm=float(optax.tree.norm(whole)) / 4)
    assert abs(sum(x for name, x in numbers.items() if name.startswith("share of")) - 1) < 1e-4
    assert abs(numbers["gradient kept by clipping"] - 0.25) < 1e-4


def test_causes_of_a_run_are_printed_and_stored(tmp_path, monkeypatch, capsys):
    save_run(tmp_path)
    flags = {"workdir": str(tmp_path), "updates": 3, "checkpoint": "best", "seed": 1}
    monkeypatch.setattr(causes, "FLAGS", SimpleNamespace(**flags))
    assert causes.main() == 0
    assert "checkpoint of update 20" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "causes-20.json").read_text())["numbers"]
    assert numbers["particles"] == 3 and 1 <= numbers["effective sample size"] <= 3
    assert numbers["policy, standard deviation"] == 1 and numbers["features, saturated"] < 0.05
    for name in ("features", "policy mean", "value"):
        # All that differs between draws or orders differs between environments too, and much else does.
        noise = [numbers[f"{name}, spread by {why}"] for why in ("draws", "order")]
        assert all(0 < x < numbers[f"{name}, spread"] for x in noise)


# --- The tables ------------------------------------------------------------------------------------------------------


def write_run(path, algorithm, seed, returns, encoding=None, **fields):
    """A run with a line every 400,000 steps, metrics compressed."""
    path.mkdir(parents=True)
    fields |= {"algorithm": algorithm, "env.name": "MountainHike", "env.observation_std": 0.3, "seed": seed}
    (path / "config.json").write_text(json.dumps(fields))
    lines = []
    for i, value in enumerate(returns):
        line = {"update": i + 1, "env_steps": 400_000 * (i + 1), "wall_time": 200.0 * (i + 1), "result.true": value}
        lines.append(line | {"loss.encoding": encoding[i] if encoding else 0.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def test_tables_hold_what_the_files_say(tmp_path):
    write_run(tmp_path / "hike" / "a", "rnn", 1, [-250.0, -240.0, -200.0, -190.0, -180.0, -170.0])
    write_run(tmp_path / "hike" / "b", "rnn", 0, [-250.0, -240.0, -210.0, None, -160.0, -150.0])
    write_run(tmp_path / "hike" / "c", "dvrl", 0, [-250.0, -240.0, -230.0], [12.0, 9.0, 5.5])
    known = [("random", None, -250.0), ("best with readings", 0.3, -50.0)]
    known = [references.Reference(name, noise, mean, 1.0, None)._asdict() for name, noise, mean in known]
    (tmp_path / "references.json").write_text(json.dumps({"references": known}))
    page = "before\n<!-- table: hike -->\nold\n<!-- end -->\nafter\n"
    made = tables.generate(page, tmp_path)
    assert made.splitlines()[4:-2] == [
        "| RNN | 0 | 2.40M | -250.0 | -210.0 | -160.0 | -160.0 | -155.0 | 0.47 | - | - | 0.33 | 2000 |",
        "| RNN | 1 | 2.40M | -250.0 | -200.0 | -180.0 | -180.0 | -175.0 | 0.38 | - | - | 0.33 | 2000 |",
        "| RNN | mean | 2.40M | -250.0 ± 0.0 | -205.0 ± 5.0 | -170.0 ± 10.0 | -170.0 ± 10.0 | -165.0 ± 10.0 "
        "| 0.42 ± 0.05 | - | - | 0.33 ± 0.00 | 2000 ± 0 |",
        "| DVRL | 0 | 1.20M | -250.0 | -230.0 | - | -240.0 | -235.0 | 0.07 | 5.50 | 12.00 | 0.17 | 2000 |",
    ]
    assert made.startswith("before\n") and made.endswith("<!-- end -->\nafter\n") and "old" not in made
    assert tables.generate(made, tmp_path) == made
    (tmp_path / "page.md").write_text(made)
    assert tables.stale((tmp_path / "page.md",), tmp_path) == []
    (tmp_path / "page.md").write_text(made.replace("-205.0", "-204.0"))
    assert tables.stale((tmp_path / "page.md",), tmp_path) == [tmp_path / "page.md"]


def test_a_final_table_has_a_row_per_setting_of_several_folders(tmp_path):
    write_run(tmp_path / "hike" / "rnn0", "rnn", 0, [-250.0, -240.0, -200.0])
    write_run(tmp_path / "hike" / "rnn1", "rnn", 1, [-250.0, -230.0, -190.0])
    write_run(tmp_path / "hike" / "dvrl0", "dvrl", 0, [-250.0], [5.0])
    write_run(tmp_path / "more" / "dvrl", "dvrl", 0, [-250.0, -240.0, -180.0], [5.0] * 3)
    made = tables.generate("<!-- table: hike/rnn*,more final -->\n<!-- end -->", tmp_path).splitlines()[1:-1]
    assert made == [
        "| agent | seeds | steps | mean return of the last 0.5M | share |",
        "| --- | --- | --- | --- | --- |",
        "| RNN | 2 | 1.20M | -215.0 ± 5.0 | - |",
        "| DVRL | 1 | 1.20M | -210.0 | - |",
    ]
    with pytest.raises(RunError, match="less: holds no runs"):
        tables.generate("<!-- table: hike,less final -->\n<!-- end -->", tmp_path)


def test_what_most_settings_have_is_said_once(tmp_path):
    for number, fields in enumerate(({}, {"num_particles": 1}, {"h_dim": 8})):
        write_run(
            tmp_path / "hike" / str(number), "dvrl", 0, [-250.0], [5.0], **{f"model.{k}": v for k, v in fields.items()}
        )
    lines = tables.generate("<!-- table: hike -->\n<!-- end -->", tmp_path).splitlines()[1:-1]
    cells = [line.split(" | ")[0] for line in (lines[0], *lines[2:])]
    assert cells[0] == "| agent (if not said, h_dim 256, num_particles 10)"
    assert sorted(cells[1:]) == ["| DVRL", "| DVRL, h_dim 8", "| DVRL, num_particles 1"]


def test_settings_have_rows_and_what_was_measured_of_them_has_tables(tmp_path):
    for count in (1, 10):
        fields = {"model.num_particles": count}
        write_run(tmp_path / "hike" / str(count), "dvrl", 0, [-250.0], [5.0], **fields)
    result = {"env_steps": 400_000, "mean_return": -240.04}
    result["estimates"] = [{"name": probe.EXACT, "rmse": 0.1}, {"name": "last reading", "rmse": 0.3}]
    (tmp_path / "hike" / "10" / "probe-5.json").write_text(json.dumps(result))
    returns, probes = (tables.generate(f"<!-- table: hike{x} -->\n<!-- end -->", tmp_path) for x in ("", " probes"))
    assert "| DVRL, num_particles 1 | 0 |" in returns and "| DVRL, num_particles 10 | 0 |" in returns
    assert probes.splitlines()[1:-1] == [
        "| agent | seed | steps | return | last reading | exact filter |",
        "| --- | --- | --- | --- | --- | --- |",
        "| DVRL, num_particles 10 | 0 | 0.40M | -240.0 | 0.3000 | 0.1000 |",
    ]
    for count, numbers in ((1, {"gradient": 12.34}), (10, {"gradient": 0.5, "particles": 10.0})):
        result = {"env_steps": 400_000, "numbers": numbers}
        (tmp_path / "hike" / str(count) / "causes-5.json").write_text(json.dumps(result))
    assert tables.generate("<!-- table: hike causes -->\n<!-- end -->", tmp_path).splitlines()[1:-1] == [
        "|  | DVRL, num_particles 1, seed 0, 0.40M | DVRL, num_particles 10, seed 0, 0.40M |",
        "| --- | --- | --- |",
        "| gradient | 12 | 0.5 |",
        "| particles | - | 10 |",
    ]


def test_evaluations_have_a_row_per_run_and_way_to_act(tmp_path):
    # The mean return by (agent, seed, update), of actions sampled and greedy.
    sampled = {("rnn", 0, 9): -90.0, ("rnn", 0, 10): -94.0, ("rnn", 1, 9): -100.0, ("rnn", 1, 10): -104.0}
    greedy = {("rnn", 0, 10): -80.0, ("dvrl", 0, 10): -70.0}
    for agent, seed in (("rnn", 0), ("rnn", 1), ("dvrl", 0)):
        write_run(tmp_path / "hike" / f"{agent}{seed}", agent, seed, [-250.0], [5.0])
    for returns, is_greedy, name in ((sampled, False, ""), (greedy, True, "greedy-")):
        for (agent, seed, update), mean in returns.items():
            for episodes, value in ((5, 0.0), (50, mean), (6, 0.0)):  # The longest counts.
                file = tmp_path / "hike" / f"{agent}{seed}" / f"evaluation-{update}-{name}{episodes}games-seed1.json"
                fields = {"update": update, "greedy": is_greedy, "episodes": episodes, "mean": value}
                file.write_text(json.dumps(fields))
    made = tables.generate("<!-- table: hike evaluations -->\n<!-- end -->", tmp_path).splitlines()[1:-1]
    assert made == [
        "| agent | actions | seed | update 9 | update 10 | mean |",
        "| --- | --- | --- | --- | --- | --- |",
        "| RNN | sampled | 0 | -90.0 | -94.0 | -92.0 ± 2.0 |",
        "| RNN | sampled | 1 | -100.0 | -104.0 | -102.0 ± 2.0 |",
        "| RNN | sampled | mean | -95.0 ± 5.0 | -99.0 ± 5.0 | -97.0 ± 5.0 |",
        "| RNN | most probable | 0 | - | -80.0 | - |",
        "| DVRL | most probable | 0 | - | -70.0 | - |",
    ]


def test_the_course_of_a_run_is_its_first_line_and_the_last_of_each_part(tmp_path):
    write_run(tmp_path / "hike" / "a", "dvrl", 3, [None, *(-25.0 * i for i in range(12))], [12.4] * 13)
    head, _, *rows = tables.generate("<!-- table: hike course -->\n<!-- end -->", tmp_path).splitlines()[1:-1]
    assert head.startswith("| agent | seed | steps | result.true | loss.encoding | loss.emission.mean |")
    # Of 13 lines, a part of 13/8 begins with the first: it is not shown twice.
    assert [row.split(" | ")[1:5] for row in rows] == [
        ["3", f"{400_000 * line:,}", "-" if line == 1 else f"{-25.0 * (line - 2):.2f}", "12"]
        for line in (1, 3, 4, 6, 8, 9, 11, 13)
    ]


def test_a_table_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(RunError, match="nothing: holds no runs"):
        tables.generate("<!-- table: nothing -->\n<!-- end -->\n", tmp_path)
    with pytest.raises(RunError, match="has no '<!-- end -->'"):
        tables.generate("<!-- table: nothing -->\n", tmp_path)
    write_run(tmp_path / "hike" / "a", "rnn", 0, [-250.0])
    with pytest.raises(RunError, match=r"none of its runs has a causes-<update>\*\.json"):
        tables.generate("<!-- table: hike causes -->\n<!-- end -->\n", tmp_path)
    with pytest.raises(RunError, match=r"evaluation-<update>\*\.json \(python evaluate\.py\)"):
        tables.generate("<!-- table: hike evaluations -->\n<!-- end -->\n", tmp_path)


def test_compressed_metrics_are_read_and_a_damaged_file_is_named(tmp_path):
    write_run(tmp_path / "1", "rnn", 0, [-250.0, None])
    assert [line["result.true"] for line in plotting.load_run(tmp_path / "1").lines] == [-250.0, None]
    file = tmp_path / "1" / "metrics.jsonl.gz"
    whole = file.read_bytes()
    for damaged in (whole[:-20], b"no gzip", whole[:20] + b"\xff\xff\xff" + whole[23:]):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=r"metrics\.jsonl\.gz: cannot be read"):
            run_directory.read_metrics(tmp_path / "1")
