"""reproduce.py: the experiments are valid, what is done is skipped, what stopped goes on, and it ends with a table."""

import gzip
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from dvrl_jax.errors import RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import experiments, outcomes, run_directory
from dvrl_jax.viewing import plotting

ROOT = Path(__file__).parent.parent


def test_every_experiment_is_a_valid_and_distinct_configuration():
    seen = set()
    for experiment in experiments.EXPERIMENTS.values():
        config = experiments.load_config(experiment)
        seen.add(str(config))
        for field, value in experiment.fields.items():
            assert dict(config_lib.flatten(config))[field] == value
    assert len(seen) == len(experiments.EXPERIMENTS) == 20 + 18 + 3 + 6 + 1 + 1 + 14 + 6 + 40 + 5 + 10 * 3
    assert all(name in experiments.EXPERIMENTS for names in experiments.COMPARISONS.values() for name in names)


def test_published_results_are_of_these_experiments():
    """Their runs have the configurations of experiments, but for the seed and what does not change what is learned."""

    def key(fields):
        return json.dumps(config_lib.settings_of(fields), sort_keys=True)

    known = {key(config_lib.flatten(experiments.load_config(e))) for e in experiments.EXPERIMENTS.values()}
    for folder in ("scaled_noise", "small_step_noise", "detached", "ablations", "elbo", "longer"):
        found = sorted((ROOT / "docs" / "results" / f"mountain_hike_{folder}").glob("*/config.json"))
        assert len(found) >= 4
        for path in found:
            config = config_lib.from_fields(json.loads(path.read_text()))
            assert key(config_lib.flatten(config)) in known, path


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ([], 114),
        (["hike"], 6),
        (["hike-scaled"], 6),
        (["hike-small-step"], 6),
        (["atari/Pong"], 2),
        (["atari/*/rnn"], 10),
        (["ablation/particles"], 4),
        (["hike/0.3/dvrl", "atari/Pong/rnn"], 2),
        (["hike-ablation"], 14),
        (["hike-ablation/*"], 21),  # With the seven that they are compared with.
        (["hike-ablation/joint/0.15"], 2),
        (["hike-search/dvrl/learning-rate"], 3),
        (["hike-search/*/reward-scale"], 6),
        (["beliefs"], 40),
        (["beliefs/hike-0.3"], 8),
        (["choices/*"], 5),
        (["task"], 30),
        (["task/minatar/Breakout"], 3),
    ],
)
def test_experiments_are_selected_by_the_beginning_of_their_names(patterns, count):
    assert len(experiments.select(patterns)) == count


def test_an_unknown_name_is_refused():
    with pytest.raises(RunError, match="nothing is called 'atari/Pnog'"):
        experiments.select(["atari/Pnog"])


@pytest.mark.parametrize("argument", ["--measure", "--only="])
def test_what_would_start_everything_by_mistake_is_refused(argument, tmp_path):
    command = [sys.executable, "reproduce.py", f"--root={tmp_path / 'root'}", argument]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {argument.rstrip('=')}: "), result.stderr
    assert not (tmp_path / "root").exists()


def write_finished_run(root, name, value):
    """Seed 0 of an experiment, at its end after 160 steps with this return."""
    write_run(root, experiments.EXPERIMENTS[name], 0, 160, 160, value)


def write_run(root, experiment, seed, env_steps, total_env_steps, value):
    """A run that has got so far of what it is to be."""
    run = run_directory.RunDirectory(outcomes.workdir(root, experiment, seed))
    config = experiments.load_config(experiment).copy_and_resolve_references()
    config.seed, config.total_env_steps = seed, total_env_steps
    run.write_config(config_lib.to_json(config))
    run.append_metrics({"update": 1, "env_steps": env_steps, "result.true": value})
    run.close()


def test_the_table_keeps_what_was_run_before(tmp_path):
    for experiment, value in (("hike/0.3/rnn", -120.0), ("hike/0.15/rnn", -110.0)):
        write_finished_run(tmp_path, experiment, value)
        command = [
            sys.executable,
            "reproduce.py",
            f"--root={tmp_path}",
            f"--only={experiment}",
            "--seeds=1",
            "--steps=160",
        ]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    table = (tmp_path / "results.md").read_text()
    assert "| hike/0.3/rnn | 160 | 1 | -120.00 |" in table and "| hike/0.15/rnn | 160 | 1 | -110.00 |" in table


def results(root, experiment, steps):
    return outcomes.results_of(experiment, outcomes.finished(root, experiment, steps), steps)


def test_results_are_of_what_was_trained_whatever_is_asked_for_now(tmp_path):
    """Rows by length: of runs at their own end, whatever the seed, put away or not, or at what is asked for."""
    experiment = experiments.EXPERIMENTS["hike/0.3/rnn"]
    for seed, (length, wanted, value) in enumerate(
        [(160, 160, -1.0), (160, 160, -3.0), (80, 80, -5.0), (90, 160, -7.0)]
    ):
        write_run(tmp_path, experiment, seed, length, wanted, value)
    file = outcomes.workdir(tmp_path, experiment, 1) / "metrics.jsonl"
    file.with_name("metrics.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert outcomes.is_done(file.parent, 160)
    short, whole = (experiment.name, 80, 1, -5.0, None), (experiment.name, 160, 2, -2.0, 1.0)
    assert results(tmp_path, experiment, experiments.load_config(experiment).total_env_steps) == [short, whole]
    assert results(tmp_path, experiment, 85) == [short, (experiment.name, 85, 1, -7.0, None), whole]
    assert results(tmp_path / "elsewhere", experiment, 85) == [(experiment.name, 85, 0, None, None)]


def test_runs_that_are_older_than_a_field_are_of_the_same_experiment(tmp_path):
    experiment = experiments.EXPERIMENTS["hike/0.3/dvrl"]
    for seed in (0, 1):
        write_run(tmp_path, experiment, seed, 160, 160, -1.0)
    path = outcomes.workdir(tmp_path, experiment, 1)
    fields = json.loads((path / "config.json").read_text())
    for younger in ("model.detach_encoder", "env.first_core", "max_skipped_updates"):
        fields.pop(younger, None)
    (path / "config.json").write_text(json.dumps(fields))
    for seed, speed in ((0, 100.0), (1, 300.0)):
        lines = [{"update": i, "env_steps": 80 * i, "obs.fps": speed, "result.true": -1.0} for i in (1, 2)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (outcomes.workdir(tmp_path, experiment, seed) / "metrics.jsonl").write_text(text)
    assert outcomes.Speeds(tmp_path).get(experiment) == (200.0, "runs")
    defaults = outcomes.fields_of(experiment)
    loaded = [plotting.load_run(path.with_name(f"seed{seed}"), defaults) for seed in (0, 1)]
    assert len(plotting.group_runs(loaded)) == 1


def test_what_was_measured_and_cannot_be_read_is_named(tmp_path):
    (tmp_path / "speeds.json").mkdir()
    with pytest.raises(RunError, match=r"speeds\.json: cannot be read"):
        outcomes.Speeds(tmp_path)


def test_a_figure_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "figures").write_text("not a directory")
    write_finished_run(tmp_path, "hike/0.3/rnn", -120.0)
    command = [sys.executable, "reproduce.py", f"--root={tmp_path}", "--only=hike/0.3/rnn", "--seeds=1", "--steps=160"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr == f"error: {tmp_path}/figures/hike/0.3.png: cannot be written (Not a directory)\n"
    assert "| hike/0.3/rnn | 160 | 1 | -120.00 |" in (tmp_path / "results.md").read_text()


def reproduce(root, *arguments):
    command = [sys.executable, "reproduce.py", f"--root={root}", "--only=hike/0.3/rnn", "--seeds=2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout


def test_runs_are_done_once_go_on_and_are_summed_up(tmp_path):
    reproduce(tmp_path, "--steps=160")
    path = tmp_path / "hike" / "0.3" / "rnn"
    before = {seed: (path / f"seed{seed}" / "metrics.jsonl").read_text() for seed in (0, 1)}
    again = reproduce(tmp_path, "--steps=160")
    assert again.count("done already") == 2 and "training" not in again
    assert {seed: (path / f"seed{seed}" / "metrics.jsonl").read_text() for seed in (0, 1)} == before

    text = reproduce(tmp_path, "--steps=2400")
    assert text.count("resuming from update 2 ") == 1  # Both seeds, in one program.
    lines = [run_directory.read_metrics(path / f"seed{seed}")[-1] for seed in (0, 1)]
    assert [line["env_steps"] for line in lines] == [2400, 2400]
    (result,) = json.loads((tmp_path / "results.json").read_text())
    values = [line["result.true"] for line in lines]
    assert values[0] != values[1]
    assert result["mean"] == pytest.approx(statistics.fmean(values))
    assert result["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)
    assert f"| hike/0.3/rnn | 2,400 | 2 | {result['mean']:.2f} |" in text
    assert (tmp_path / "figures" / "hike" / "0.3.png").exists()

    listed = reproduce(tmp_path, "--list", "--steps=4800")
    assert "0/2" in listed and "2 runs" in listed


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    broken = outcomes.workdir(tmp_path, experiments.EXPERIMENTS["hike/0.3/rnn"], 0)
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "checkpoints" / "10").write_text("checkpoints without a configuration")
    command = [sys.executable, "reproduce.py", f"--root={tmp_path}", "--only=hike/0.3/rnn", "--seeds=2", "--steps=160"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1 and result.stderr.endswith(f"failed: {broken}\n"), result.stderr
    assert f"{broken}: failed with exit code 2" in result.stderr
    assert outcomes.is_done(broken.with_name("seed1"), 160)
    assert "| hike/0.3/rnn | 160 |" in (tmp_path / "results.md").read_text()


def test_a_run_of_other_settings_is_refused_and_does_not_count(tmp_path):
    name = "hike-ablation/resampling/off"
    write_finished_run(tmp_path, name, -5.0)
    file = outcomes.workdir(tmp_path, experiments.EXPERIMENTS[name], 0) / "config.json"
    assert results(tmp_path, experiments.EXPERIMENTS[name], 160)[0].seeds == 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"loss.reward_scale": 1.0}))
    command = [sys.executable, "reproduce.py", f"--root={tmp_path}", f"--only={name}", "--seeds=1", "--steps=160"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    expected = f"error: {file.parent}: has loss.reward_scale = 1.0, where {name} has 0.03; move it away to go on\n"
    assert result.returncode == 2 and result.stderr == expected
    assert results(tmp_path, experiments.EXPERIMENTS[name], 160)[0].seeds == 0


def test_a_closed_terminal_stops_the_training_too(tmp_path, start):
    command = [sys.executable, "reproduce.py", f"--root={tmp_path}", "--only=hike/0.3/rnn", "--seeds=2"]
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "hike/0.3/rnn"
    while (line := process.stdout.readline()) and not line.startswith("80 steps"):
        pass
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 129, output
    assert "stopped by SIGHUP; checkpoint at update" in output and f"{run}: stopped; the same command" in output
    run_directory.RunDirectory(run).close()  # Nobody trains there any more.
    assert {path.name for path in run.glob("seed*")} == {"seed0", "seed1"}
