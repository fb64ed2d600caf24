"""The house: no import circle, short files and functions where it matters, fast paths that can be deleted."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dvrl_jax"
MODULES = {
    ".".join(("dvrl_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(name):
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {x if x in MODULES else node.module for x in inner}
    return found & set(MODULES) - {name}


def test_no_module_imports_itself_in_a_circle():
    edges, done = {name: sorted(imports(name)) for name in MODULES}, set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def lines_of(module):
    return len((PACKAGE / module).read_text().splitlines())


def test_the_hot_path_is_short():
    assert lines_of("a2c.py") <= 250
    assert sum(map(lines_of, ("acting.py", "a2c.py", "bptt.py", "notes.py"))) <= 800


def test_no_function_is_longer_than_a_screen():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{name}.{node.name} has {length} lines"


@pytest.mark.parametrize("path", ["lineages", "distinct", "tiles"])
def test_a_fast_path_is_imported_in_one_place_and_named_by_one_setting(path):
    others = {name: file.read_text() for name, file in MODULES.items() if name != f"dvrl_jax.fast.{path}"}
    places = [name for name, text in others.items() if re.search(rf"import .*\b{path}\b|fast\.{path}\b", text)]
    assert len(places) == 1, places
    used = [name for name, text in others.items() if re.search(rf"(use|current\(\))\.{path}\b", text)]
    assert used == places


def test_no_verb_of_an_agent_takes_anything_but_what_its_equations_take():
    """Notes and choices reach layers without being handed through an agent's methods."""
    for name in (name for name in MODULES if name.startswith("dvrl_jax.agents.")):
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef):
                arguments = {x.arg for x in (*node.args.args, *node.args.kwonlyargs)}
                assert not arguments & {"tape", "tapes", "notes", "choices", "use", "pad"}, f"{name}.{node.name}"


def test_every_module_says_what_it_is_for():
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree) and "configs" not in name]


def test_no_function_takes_the_default_configuration():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert "default" not in {x.arg for x in (*node.args.args, *node.args.kwonlyargs)}, f"{name}.{node.name}"
