"""What cannot work says so in one line, with its exit code, and is not tried for ever."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.compose.project import FARMS, Project, project, the_farm

BAD_CONFIGURATION, DOES_NOT_FIT, KILLED = 2, 3, 128 + 9
TRIES = 4
"""The first, and the three that the compose file allows."""


def ends_clearly(farm: Project, code: int, *messages: str) -> None:
    """The container is given up with ``code``, having said the same line at every start."""
    farm.compose("up", "-d", "--no-build", "--pull", "never")
    state = farm.wait_until_given_up()
    lines = [line for line in farm.logs() if line.startswith("gpufarm: ")]
    assert state["State"]["ExitCode"] == code, farm.logs()
    assert not any("Traceback" in line for line in farm.logs())
    assert len(lines) == TRIES, farm.logs()
    # But for how many bytes are free just then.
    assert len({re.sub(r"[\d.]+", "", line) for line in lines}) == 1
    for words in messages:
        assert words in lines[0]


def override(folder: Path, text: str) -> Path:
    path = folder / "override.yml"
    path.write_text(f"services:\n  farm:\n{text}")
    return path


def test_a_key_that_is_misspelt() -> None:
    with project("misspelt", FARMS / "misspelt") as farm:
        ends_clearly(farm, BAD_CONFIGURATION, "workers.cuont", "workers.count")


def test_a_variable_with_a_wrong_value() -> None:
    with project("wrong", GPUFARM_WORKERS__COUNT="-1") as farm:
        ends_clearly(farm, BAD_CONFIGURATION, "GPUFARM_WORKERS__COUNT", "-1")


def test_a_volume_that_cannot_be_written(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    file = override(tmp_path, f"    volumes:\n      - {state}:/var/lib/gpufarm\n")
    with project("unwritable", override=file) as farm:
        ends_clearly(farm, BAD_CONFIGURATION, "/var/lib/gpufarm", "Permission denied")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """By the first farm, in the network that both are given."""
    port = the_farm().port
    file = override(tmp_path, "    network_mode: host\n    ports: !reset []\n")
    with project("taken", override=file) as farm:
        ends_clearly(farm, BAD_CONFIGURATION, f"port = {port}", "--port")


@pytest.mark.parametrize(
    ("limit", "footprint"),
    [
        pytest.param("600m", "7GiB", id="given"),
        pytest.param("600m", "", id="measured"),
        pytest.param("250m", "", id="too-small-to-measure"),
    ],
)
def test_a_memory_limit_in_which_no_worker_fits(tmp_path: Path, limit: str, footprint: str) -> None:
    file = override(tmp_path, f"    mem_limit: {limit}\n")
    with project("small", override=file, GPUFARM_FOOTPRINT__BYTES=footprint) as farm:
        ends_clearly(farm, DOES_NOT_FIT, "MiB")


def test_a_memory_limit_that_a_worker_runs_into_while_it_is_measured(tmp_path: Path) -> None:
    """There is room to try, so only the kernel's ending it shows that it does not fit.

    While the ended worker's memory has not returned yet, the kernel may end the command as well,
    which then says nothing in that try.
    """
    file = override(tmp_path, "    mem_limit: 1300m\n    memswap_limit: 1300m\n")
    with project("greedy", FARMS / "greedy", file) as farm:
        farm.compose("up", "-d", "--no-build", "--pull", "never")
        state = farm.wait_until_given_up()
        assert state["State"]["ExitCode"] in (DOES_NOT_FIT, KILLED), farm.logs()
        lines = [line for line in farm.logs() if line.startswith("gpufarm: ")]
        assert 1 <= len(lines) <= TRIES, farm.logs()
        assert all("OOM killer" in line for line in lines)
        assert not any("Traceback" in line for line in farm.logs())
