"""Shared by all tests: a small toy world with a thumbnail per picture, and one with 16 patches."""
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import prepare_data

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data") / "toy")
    return prepare_data.main(["toy", "--n_image", "300", "--n_text", "200", "--out", out])

@pytest.fixture(scope="session")
def toy16(tmp_path_factory):
    flags = ["--n_image", "100", "--n_text", "100", "--n_image_token", "16"]
    return prepare_data.main(["toy", *flags, "--out", str(tmp_path_factory.mktemp("data") / "toy16")])

def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often a training run is killed")
