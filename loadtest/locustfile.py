"""Locust against a farm: ``locust -f loadtest/locustfile.py --host http://127.0.0.1:8000``.

What is asked, how the load comes and what is too slow are custom arguments: ``--help`` lists them,
and Locust's page shows them. README.md, beside this file, says how to read the numbers.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import locust.stats
import locust.web
from locust import events
from locust.exception import CatchResponseError
from locust.runners import MasterRunner, WorkerRunner

# Locust imports a file, not a package; the modules beside it are meant, wherever it is started.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from loadtest import arguments
from loadtest.calls import now
from loadtest.measures import Measures, bucket
from loadtest.recorder import Recorder, Step, Steps
from loadtest.samples import FAILED, OK, Sample
from loadtest.shapes import SteppedShape
from loadtest.thresholds import judge
from loadtest.users import FarmUser, PredictUser, SpeechUser, StreamingSpeechUser

__all__ = ["FarmUser", "PredictUser", "SpeechUser", "StreamingSpeechUser"]

log = logging.getLogger("gpufarm")
locust.stats.bucket_response_time = bucket

_FINISH, _FINISHED = "gpufarm_finish", "gpufarm_finished"


class Wiring:
    """Joins this file's parts to one Locust process."""

    def __init__(self, environment: Any, runner: Any) -> None:
        self._environment = environment
        self._runner = runner
        self._options = environment.parsed_options
        self._steps = Steps()
        self._measures = Measures(environment.stats)
        self._worker = isinstance(runner, WorkerRunner)
        samples = self._options.samples
        try:
            self._recorder = Recorder(self._steps, Path(samples) if samples else None, self._worker)
        except OSError as error:
            sys.exit(f"--samples {samples} cannot be written: {error.strerror}")
        self._shape = SteppedShape(self._options, self._steps)
        self._shape.runner = runner
        self._finished: set[str] = set()
        environment.gpufarm_observe = self.observe

    def connect(self) -> None:
        hooks = self._environment.events
        hooks.quit.add_listener(lambda **_: self._recorder.close())
        if self._worker:
            hooks.report_to_master.add_listener(lambda data, **_: self._recorder.send(data))
            self._runner.register_message(_FINISH, self._finish, concurrent=True)
            return
        hooks.worker_report.add_listener(lambda data, **_: self._recorder.receive(data))
        hooks.test_start.add_listener(self._started)
        hooks.spawning_complete.add_listener(self._spawned)
        hooks.test_stop.add_listener(self._stopped)
        hooks.quitting.add_listener(self._judge)
        if isinstance(self._runner, MasterRunner):
            self._runner.register_message(_FINISHED, self._note_finished)
        self._choose_users()
        self._choose_shape(self._options.steps)
        if self._environment.web_ui is not None:
            self._follow_page(self._environment.web_ui.app)

    def observe(self, sample: Sample, name: str) -> None:
        """A user's request is over."""
        self._measures.log(sample)
        self._recorder.add(sample)
        if sample.outcome in (OK, FAILED):
            self._environment.events.request.fire(
                request_type="POST",
                name=name,
                response_time=sample.latency_ms,
                response_length=sample.answer_bytes,
                exception=CatchResponseError(sample.error) if sample.error else None,
                context={},
                start_time=sample.scheduled,
                response=None,
                sample=sample,
            )

    def _choose_users(self) -> None:
        """Locust would run every user class; unless some are named, --request chooses."""
        if not (self._options.user_classes or self._options.class_picker):
            self._environment.user_classes = [FarmUser]

    def _choose_shape(self, steps: str) -> None:
        self._environment.shape_class = self._shape if steps.strip() else None

    def _follow_page(self, app: Any) -> None:
        """Steps can also be given, changed and taken away on the page."""

        def before() -> None:
            idle = self._runner.state in ("ready", "stopped")
            request = locust.web.request
            starting = request.method == "POST" and request.path.endswith("/swarm")
            if idle and starting and not self._environment.web_ui.userclass_picker_is_active:
                self._choose_shape(request.form.get("steps", self._options.steps))

        app.before_request(before)

    def _started(self, **_: Any) -> None:
        if self._environment.shape_class is None:
            self._steps.end()
            self._spawned(self._runner.target_user_count)

    def _spawned(self, user_count: int, **_: Any) -> None:
        """Without steps, a step lasts until another number of users is asked for."""
        if self._environment.shape_class is None and user_count != self._steps.users:
            seconds = float(self._options.run_time or 0)
            self._steps.begin(Step(now(), user_count, seconds))

    def _stopped(self, **_: Any) -> None:
        self._steps.end()
        if isinstance(self._runner, MasterRunner):
            self._await_workers()

    def _await_workers(self) -> None:
        """Locust's master quits half a second after it says so; requests may take longer."""
        workers = {id_ for id_, node in self._runner.clients.items() if node.state != "missing"}
        self._finished.clear()
        self._runner.send_message(_FINISH)
        deadline = time.monotonic() + self._environment.stop_timeout + 10
        while workers - self._finished and time.monotonic() < deadline:
            gevent.sleep(0.05)
        for id_ in sorted(workers - self._finished):
            log.error("the statistics of worker %s are incomplete: it did not finish in time", id_)

    def _note_finished(self, msg: Any, **_: Any) -> None:
        self._finished.add(msg.node_id)

    def _finish(self, **_: Any) -> None:
        """On a worker: end all users, then send what the last requests brought."""
        self._runner.stop()
        data: dict[str, Any] = {}
        self._environment.events.report_to_master.fire(client_id=self._runner.client_id, data=data)
        self._runner.send_message("stats", data)
        self._runner.send_message(_FINISHED)

    def _judge(self, **_: Any) -> None:
        verdicts = judge(self._options, self._environment.stats)
        for verdict in verdicts:
            log.log(logging.INFO if verdict.held else logging.ERROR, "threshold %s", verdict)
        if self._environment.process_exit_code is not None:
            return
        if not all(verdict.held for verdict in verdicts):
            self._environment.process_exit_code = 1
        elif self._options.headless and not self._environment.stats.entries:
            log.error("no request was made")
            self._environment.process_exit_code = 1
        elif self._options.max_failure_share != "" and not self._runner.exceptions:
            # Locust ends with 1 after any failure; --max-failure-share says how many are allowed.
            self._environment.process_exit_code = 0


def _wire(environment: Any, runner: Any, **_: Any) -> None:
    Wiring(environment, runner).connect()


events.init_command_line_parser.add_listener(arguments.add_to)
events.init.add_listener(_wire)
