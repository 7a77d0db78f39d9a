"""Two farms of one machine that start at the same moment."""

from __future__ import annotations

import json
import subprocess

import psutil

from tests.farm.harness import COMMAND_SECONDS, external_server, new_farm


def test_two_farms_that_start_at_once_share_the_memory() -> None:
    """Each would fit twice; together they get what there is, and the second says why."""
    footprint = psutil.virtual_memory().available * 45 // 100
    with new_farm() as one, new_farm() as two:
        for farm in (one, two):
            text = external_server(
                farm.port, workers='count = "auto"', options=("--load-seconds", "3")
            )
            text = text.replace('"64MiB"', str(footprint)).replace('ram = "8GiB"', "cores = 8")
            farm.configure(text)
        commands = [
            subprocess.Popen(
                farm.command("up", "--json"),
                cwd=farm.folder,
                env=farm.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for farm in (one, two)
        ]
        ended = [(*command.communicate(timeout=COMMAND_SECONDS), command) for command in commands]
        message = "\n".join(f"{out}\n{err}" for out, err, _ in ended)
        assert sorted(command.returncode for *_, command in ended) == [0, 3], message
        for out, err, command in ended:
            if command.returncode == 0:
                assert json.loads(out)["count"] == 2, message
            else:
                assert "are about to be used by another farm" in err
                assert "not fit" in json.loads(out)["error"]["message"]
