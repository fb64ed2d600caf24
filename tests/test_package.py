"""The package that is installed is complete: commands and functions work where there is no clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dvrl_jax")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` of an environment in which a wheel of this project is installed, made without the network."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "sources").mkdir()
    for name in SOURCES:  # A build leaves files beside its sources.
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "sources" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", folder / "sources"]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=300)
    python = folder / "venv" / "bin" / "python"
    install = [f"--python={python}", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True, timeout=300)
    # The dependencies are those of this environment. Its own .pth files, an editable install among them, do not count.
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    return python.parent


def run(command, folder):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_commands_work_in_an_empty_folder(installed, tmp_path):
    settings = ["--config.total_env_steps=160", "--config.log.interval=1"]
    run([installed / "dvrl-train", "--config=mountain_hike_rnn", *settings], tmp_path)
    found = files_in(tmp_path)
    assert "saved_runs/1/metrics.jsonl" in found and all(name.startswith("saved_runs/1/") for name in found), found
    assert len((tmp_path / "saved_runs" / "1" / "metrics.jsonl").read_text().splitlines()) == 2
    assert "1 games" in run([installed / "dvrl-evaluate", "--workdir=saved_runs/1", "--episodes=1"], tmp_path)
    assert "plots/1-result.true.png" in run([installed / "dvrl-plot", "--id=1"], tmp_path)
    assert (
        "dvrl-plot --id" in subprocess.run([installed / "dvrl-plot", "--help"], capture_output=True, text=True).stdout
    )


def test_the_experiments_are_found_without_a_clone(installed, tmp_path):
    chosen = ["--only=hike/0.3/rnn", "--seeds=1", "--steps=1280"]  # Long enough for whole games.
    assert "| hike/0.3/rnn | 1,280 | 1 |" in run([installed / "dvrl-reproduce", *chosen], tmp_path)
    assert all(name.startswith("saved_runs/reproduce/") for name in files_in(tmp_path))


def test_the_functions_work_in_an_empty_folder(installed, tmp_path):
    program = """
import dvrl_jax

config = dvrl_jax.make_config("mountain_hike_rnn", log__interval=1)
state, history = dvrl_jax.make_train(config, dvrl_jax.make_env(config))(num_updates=2)
assert [line["update"] for line in history] == [1, 2]
print(dvrl_jax.__file__)
"""
    place = Path(run([installed / "python", "-c", program], tmp_path).splitlines()[-1])
    assert place.is_relative_to(installed.parent) and not files_in(tmp_path)
