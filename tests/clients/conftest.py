"""Servers that the tests share: the embedded model, and the same model with a chat template behind a key."""

import os
import secrets

import pytest
from serving import Server, chat_model

# Clients that report home, or look for a proxy, have no business here.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", LITELLM_LOCAL_MODEL_COST_MAP="True",
    LANGSMITH_TRACING="false", DO_NOT_TRACK="1", NO_PROXY="127.0.0.1,localhost",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--kvfold", required=True, help="path of the kvfold binary")
    parser.addoption("--soak-minutes", type=float, default=0.4, help="how long test_robust.py keeps 256 streams going")


@pytest.fixture(scope="session")
def kvfold(pytestconfig):
    return os.path.abspath(pytestconfig.getoption("--kvfold"))


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def key_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("key") / "api-key"
    file.write_text(secrets.token_hex(16) + "\n")
    return file


@pytest.fixture(scope="session")
def stories(kvfold):
    """Completions of the embedded model, without a key."""
    with Server(kvfold, "stories260k") as server:
        yield server


@pytest.fixture(scope="session")
def chat(kvfold, chat_dir, key_file):
    """Chat behind a key."""
    with Server(kvfold, chat_dir, key_file=key_file) as server:
        yield server
