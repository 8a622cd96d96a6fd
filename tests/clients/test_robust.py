"""malformed.py whole and soak.py in short, each with a server of its own."""

import malformed
import soak
from serving import Server


def test_malformed_requests(kvfold, chat_dir):
    with Server(kvfold, chat_dir) as server:
        count, failures = malformed.run(server, patience=90)
    assert count > 500
    assert not failures, "\n".join(failures)


def test_soak_in_short(kvfold, pytestconfig):
    minutes = pytestconfig.getoption("--soak-minutes")
    # Memory for the cache that is soon in use: kept prefixes fill what there is, and that is no leak.
    with Server(kvfold, "stories260k", "--max-queue", "512", "--kv-memory", "8MiB") as server:
        # So short a run is still warming up: a leak shows, a drift of 1 % would be noise.
        wrong = soak.run(server, minutes, drift=1 if minutes >= 5 else 15)
    assert not wrong, "\n".join(wrong)
