"""What holds for every test: the user's own farms and settings stay out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before any test imports it: ONNX Runtime would report what is tested.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True, scope="session")
def own_state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads a GPUFARM_ variable of its caller, nor writes below the caller's home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GPUFARM_")]:
            if not name.startswith("GPUFARM_TEST_"):
                patch.delenv(name)
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state-home")))
        yield
