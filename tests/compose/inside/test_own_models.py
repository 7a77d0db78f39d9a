"""What operators bring: a folder with a gpufarm.toml, mounted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from tests.compose.project import FARMS, project
from tests.repository import REPOSITORY
from tests.steady import steady

HELLO = b'{"text": "hello"}'


def limited(folder: Path, limits: str) -> Path:
    """A compose file that limits the farm's container."""
    path = folder / "limits.yml"
    path.write_text(f"services:\n  farm:\n    {limits}\n")
    return path


def test_a_model_of_eight_lines() -> None:
    with project("eight-lines", FARMS / "eight_lines") as farm:
        farm.up()
        answer = httpx.post(f"{farm.url}/predict", content=HELLO)
        assert answer.json() == {"said": "HELLO", "device": "cpu"}
        with steady(farm.url, "/predict", HELLO, clients=2) as load:
            farm.gpufarm("scale", "1")
            farm.gpufarm("scale", "2")
        load.check()
        assert set(load.workers) == {"w1", "w2"}


def readme_example() -> tuple[str, str]:
    """The class of the README and the gpufarm.toml beside it, as they are written there."""
    text = (REPOSITORY / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = [body for kind, body in blocks if kind == "python" and "def predict(" in body]
    toml = [body for kind, body in blocks if kind == "toml" and "target" in body]
    if not (code and toml):
        pytest.skip("the README shows no model of its own")
    return code[0], toml[0]


def test_the_model_of_the_readme_as_written(tmp_path: Path) -> None:
    code, toml = readme_example()
    found = re.search(r'target = "(\w+):', toml)
    assert found
    folder = tmp_path / "farm"
    folder.mkdir()
    (folder / f"{found[1]}.py").write_text(code)
    (folder / "gpufarm.toml").write_text(toml)
    with project("readme", folder) as farm:
        farm.up()
        assert httpx.post(f"{farm.url}/predict", content=HELLO, timeout=60).status_code == 200


def test_an_external_server() -> None:
    with project("external", FARMS / "external") as farm:
        farm.up()
        with steady(farm.url, "/anything", HELLO, clients=2) as load:
            farm.gpufarm("scale", "3")
            pid = farm.workers()["w1"]["pid"]
            farm.inside("python", "-c", f"import os; os.kill({pid}, 9)")
            farm.gpufarm("scale", "2")
        load.check()


def test_the_plan_keeps_to_the_containers_limits(tmp_path: Path) -> None:
    limits = limited(tmp_path, "cpus: 1.5\n    mem_limit: 3g")
    with project("limits", FARMS / "eight_lines", limits) as farm:
        farm.up()
        host = json.loads(farm.gpufarm("plan", "--json"))["host"]
        assert host["cores"] == 1.5
        assert host["ram_total"] == 3 * 2**30
        assert "cgroup" in host["cores_from"] + host["ram_from"]
