"""Options shared by all tests."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        default=str(Path(__file__).parent / "golden"),
        help="folder of .npz files with reference numbers of the original (schema: tests/golden/README.md)",
    )


def pytest_generate_tests(metafunc):
    if "golden_path" in metafunc.fixturenames:
        paths = sorted(Path(metafunc.config.getoption("--golden-dir")).glob("*.npz"))
        metafunc.parametrize("golden_path", paths, ids=[path.stem for path in paths], scope="module")
