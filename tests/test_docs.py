"""Documentation that can be trusted: links lead somewhere, commands are accepted, examples run, answers are real."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import run_directory
from evidence import tables
from tests.tiny import tiny_hike

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for name in ("docs", "docker", "tests") for page in (ROOT / name).rglob("*.md"))]
)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Names under which the headings of a page can be linked to, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for text, target in LINK.findall(prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"
        name = text.strip("`")
        if file.suffix == ".py" and file.is_relative_to(ROOT / "dvrl_jax") and text.startswith("`") and "/" not in name:
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found = importlib.import_module(module)
            if name != file.name:
                for part in name.split("."):
                    assert hasattr(found, part), f"{page.name}: {name} is not in {target}"
                    found = getattr(found, part)


def script_flags(script: Path) -> set[str]:
    """Names of the flags that a script, or the command that it calls, defines with absl or with argparse."""
    command = ROOT / "dvrl_jax" / "commands" / script.name
    script = command if script.parent == ROOT and command.exists() else script
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute)]
    defined = [call for call in methods if call.func.attr.startswith("DEFINE_") or call.func.attr == "add_argument"]
    return {call.args[0].value.lstrip("-") for call in defined}


def commands(page: Path) -> list[list[str]]:
    """Every `python script.py ...` and `python -m package.module ...` in the page's shell blocks and tables, as words.

    The second kind comes as `python package/module.py ...`.
    """
    text = page.read_text()
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^\| .*`(python [^`<]+\.py [^`<]+)` \|", text, re.M)
    found = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("python ")]
    return [[w[0], w[2].replace(".", "/") + ".py", *w[3:]] if w[1] == "-m" else w for w in found]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_are_accepted(page):
    fields = config_lib.flatten(config_lib.default_config())
    is_field = lambda name: name in fields or name.startswith("env.params.")  # Those are Gymnax's.
    for _, script, *arguments in commands(page):
        known = script_flags(ROOT / script)
        names = [word.lstrip("-").partition("=")[0] for word in arguments if word.startswith("--")]
        for name in names:
            if name.startswith("config."):
                assert script in ("train.py", "benchmarks/throughput.py") and is_field(name.removeprefix("config.")), (
                    f"{script} --{name}"
                )
            elif name != "config":
                assert name.removeprefix("no") in known or name in known, f"{script} --{name}"
        for word in arguments:
            if word.startswith("--config="):
                name = word.removeprefix("--config=").partition(":")[0]
                assert name in config_lib.shipped() or (ROOT / name).is_file(), word


def test_pages_are_as_short_as_agreed_and_on_the_site():
    words = lambda pages: sum(len(page.read_text().split()) for page in pages)
    readme, results = ROOT / "README.md", ROOT / "docs" / "results" / "README.md"
    assert words([readme]) <= 700 and len(readme.read_text().splitlines()) <= 110
    assert len(results.read_text().splitlines()) <= 150
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert words(ROOT / "docs" / page for page in pages if page.parts[0] != "notebook") <= 15_000
    site = (ROOT / "mkdocs.yml").read_text()
    assert [str(page) for page in pages if str(page) not in site] == []


def test_the_plots_of_stored_runs_are_drawn(tmp_path):
    found = [c for c in commands(ROOT / "docs" / "notebook" / "results.md") if c[1] == "plot.py"]
    assert len(found) == 9
    for number, command in enumerate(found):
        out = tmp_path / str(number)
        command = [word for word in command if not word.startswith("--out")] + [f"--out={out}"]
        subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, timeout=600)
        assert out.with_suffix(".png").exists() and out.with_suffix(".svg").exists()


def test_tables_hold_what_the_stored_files_say():
    assert tables.stale() == [], "python -m evidence.tables"


def python_blocks_of_extending() -> list[str]:
    """The environment, its configuration, training in Python, the belief and training with it."""
    found = blocks((ROOT / "docs" / "extending.md").read_text(), "python")
    assert len(found) == 4
    belief, training = found.pop().split("\n\n\nconfig = ")
    return [*found, belief + "\n", "config = " + training]


def test_the_examples_of_extending_run_in_python():
    ends = """
assert [line["update"] for line in history] == [2, 4]
assert history[-1]["episodes.num_ended"] == 20  # 20 steps are 5 episodes, in 4 environments.
assert config.algorithm == "averager" and config.model.first_rate == 1
"""
    # In a process of its own, where the new classes have names and nowhere else.
    program = "\n".join([*python_blocks_of_extending(), ends])
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=600)


def test_the_examples_of_extending_are_all_that_it_takes(tmp_path):
    environment, config, _, belief, _ = python_blocks_of_extending()
    for name in ("dvrl_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("golden", "reliability"))
    for name in ("train.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "dvrl_jax" / "envs" / "remember_the_light.py").write_text(environment)
    (tmp_path / "dvrl_jax" / "agents" / "averager.py").write_text(belief)
    (tmp_path / "configs" / "remember_the_light.py").write_text(config)

    def run(script: str, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, script, "--workdir=run", *arguments]
        settings = os.environ | {"PYTHONPATH": str(tmp_path)}
        result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=600)
        assert result.returncode == code, result.stderr
        return result.stderr if code else result.stdout + result.stderr

    config = "--config=configs/remember_the_light.py"
    said = run("train.py", config, "--config.env.steps=1", code=2)
    assert said == "error: env: 16 of RememberTheLight cannot be made (env.steps must be at least 2)\n"
    small = ["--config.total_env_steps=320", "--config.log.interval=2", "--config.model.h_dim=8"]
    changed = ["--config.env.steps=8", "--config.algorithm=averager", "--config.model.first_rate=1"]
    images = "--config.log.save_reconstruction_interval=2"
    said = run("train.py", config, *small, *changed, images, code=2)
    assert "log.save_reconstruction_interval = 2: must be 0 for averager, which predicts nothing" in said
    assert "320 steps (100.0%)" in run("train.py", config, *small, *changed)
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {"env.name": "RememberTheLight", "env.steps": 8, "algorithm": "averager", "model.first_rate": 1.0}
    assert expected.items() <= fields.items()
    assert "8 steps per game" in run("evaluate.py", "--episodes=3")
    said = run("evaluate.py", "--episodes=3", "--video=game.png", code=2)
    assert said == "error: there is no picture of RememberTheLight; its class needs a `painter` (docs/extending.md)\n"
    mountain = "--config=configs/mountain_hike_rnn.py"

    test_bptt = tmp_path / "tests" / "test_bptt.py"
    cases = "SHORT_CASES = ["
    assert cases in test_bptt.read_text()
    test_bptt.write_text(test_bptt.read_text().replace(cases, cases + '"averager-categorical", '))
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "averager"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_bptt.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout

    def refused(text: str, message: str) -> None:
        """With a module of this text among the environments."""
        file = tmp_path / "dvrl_jax" / "envs" / "another.py"
        file.write_text(text)
        assert run("train.py", mountain, "--workdir=other", code=2).startswith(f"error: {message}")
        assert not (tmp_path / "other").exists()
        file.unlink()

    refused("def", "dvrl_jax.envs.another: cannot be imported (SyntaxError: ")
    clash = "dvrl_jax.envs.another and dvrl_jax.envs.remember_the_light: both call a class 'RememberTheLight'"
    refused(environment, clash)
    refused(
        environment.replace('"RememberTheLight"', '"Pong"'), "dvrl_jax.envs.another: calls a class 'Pong', which is"
    )
    file = tmp_path / "dvrl_jax" / "envs" / "remember_the_light.py"
    file.write_text(environment.replace('{"steps": 4}', '{"steps": 4, "frame_skip": 1}'))
    said = run("train.py", "--config=configs/remember_the_light.py", "--workdir=other", code=2)
    assert said.startswith("error: env.frame_skip: is 4 by default, but 1 in the settings of RememberTheLight")


def console_examples() -> list[tuple[str, str]]:
    found = blocks((ROOT / "docs" / "troubleshooting.md").read_text(), "console")
    return [tuple(block.removeprefix("$ ").split("\n", 1)) for block in found]


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory):
    """Two runs, as far as these commands look at them; the second one is in use."""
    root = tmp_path_factory.mktemp("saved_runs")
    config = config_lib.finalise(tiny_hike("dvrl", model__h_dim=128))
    for number in ("3", "4"):
        run = run_directory.RunDirectory(root / number)
        run.write_config(config_lib.to_json(config))
        run.append_metrics({"update": 1, "env_steps": 20, "result.true": -200.0})
        if number == "3":
            run.close()
    yield root
    run.close()


@pytest.mark.parametrize(("command", "answer"), console_examples(), ids=[c for c, _ in console_examples()])
def test_troubleshooting_quotes_what_the_programs_say(command, answer, saved_runs):
    words = command.replace("saved_runs", str(saved_runs)).split()
    assert words.pop(0) == "python"
    if words[0] == "plot.py":
        words.append(f"--root={saved_runs}")
    before = {path: path.stat().st_mtime_ns for path in saved_runs.rglob("*") if path.name != ".lock"}
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert result.stderr.replace(str(saved_runs), "saved_runs").splitlines()[-1] == answer.strip()
    assert before == {path: path.stat().st_mtime_ns for path in saved_runs.rglob("*") if path.name != ".lock"}
