"""The stepped shape: 1, 2, 4, 8, 16 users, a while each."""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape

from loadtest.arguments import steps
from loadtest.calls import now
from loadtest.recorder import Step, Steps

# A step's users come at once: a slow ramp would make the step a mixture.
_USERS_PER_SECOND = 100
# Locust asks once a second; what is due within half of one is begun rather than a second late.
_EARLY = 0.5


class SteppedShape(LoadTestShape):  # type: ignore[misc]
    """Follows --steps and --step-seconds, as they stand on the command line or on the page."""

    # Installed by the locustfile when there are steps; Locust takes any other shape without asking.
    abstract = True
    # The page keeps its field for users, so that the steps can be taken away there.
    use_common_options = True

    def __init__(self, options: Any, log: Steps) -> None:
        super().__init__()
        self._options = options
        self._log = log

    def tick(self) -> tuple[int, float] | None:
        """Users and how many of them come each second; None at the end."""
        numbers, seconds = steps(self._options.steps), self._options.step_seconds
        index = int((self.get_run_time() + _EARLY) // seconds)
        if index >= len(numbers):
            return None
        if self._log.users != numbers[index]:
            self._log.begin(Step(now(), numbers[index], seconds))
        return numbers[index], _USERS_PER_SECOND
