"""Users of a server with many adapters: they stream completions, leave in mid-stream, and upload.

    locust -f load_tests/locustfile.py --host http://127.0.0.1:8000

from the repository's root, against any OpenAI-compatible server. Our arguments beside Locust's:

    python -m load_tests.locust_options

Locust's statistics have rows of the types TTFT (from the request to the first piece of text) and
TPOT (each token after the first, one entry for each answer) too, in milliseconds. A stream's own
row has its time to the end, and its size in tokens, not bytes.
"""

from __future__ import annotations

import logging
import random
import time
from typing import Any, ClassVar

import gevent
from locust import FastHttpUser, events, task
from locust.contrib.fasthttp import (
    FAILURE_EXCEPTIONS,
    FastHttpSession,
    ResponseContextManager,
)
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import WorkerRunner

from load_tests.locust_options import Options, add_arguments
from load_tests.locust_plan import Plan, make_plan
from load_tests.locust_publisher import Publisher
from load_tests.locust_refusals import accepted, back_off
from load_tests.locust_stream import Answer, StreamError, read_stream

HOST = "http://127.0.0.1:8000"
# No token takes so many seconds unless something is wrong.
PATIENCE = 600.0
# Types of rows that are not requests.
TTFT, TPOT = "TTFT", "TPOT"

logger = logging.getLogger(__name__)


class Client(FastHttpUser):
    """Does one thing after the other, each drawn by the shares that the arguments give."""

    host = HOST
    network_timeout = PATIENCE
    # Set when a test starts; None when there is nothing to test.
    plan: ClassVar[Plan | None] = None
    publisher: Publisher | None = None

    def on_start(self) -> None:
        if self.plan is not None and self.plan.files is not None:
            self.publisher = Publisher(self.client, self.plan.models, self.plan.files)

    def on_stop(self) -> None:
        if self.publisher is not None:
            self.publisher.close()

    @task
    def act(self) -> None:
        if self.plan is None:
            raise StopUser
        if self.publisher is not None and random.random() < self.plan.options.upload_share:
            self.publisher.step()
        else:
            self.stream(self.plan)

    def stream(self, plan: Plan) -> None:
        """One completion, read to its end or to where the client leaves."""
        model = plan.models.choose(plan.options.alpha)
        max_tokens = plan.options.output_tokens.draw()
        path, body = plan.completion(model, max_tokens)
        name = f"{path} {plan.models.kind(model)}"
        leaves = random.random() < plan.options.disconnect_share
        leave_after = random.randrange(max_tokens) if leaves else None
        answer = Answer()
        began = time.perf_counter()
        with self.client.post(
            path, json=body, name=name, stream=True, catch_response=True
        ) as response:
            row = response.request_meta
            if response.status_code == 404 and model not in plan.models:
                # Its owner has deleted it between the choice and the request.
                row["name"] += " (deleted)"
                response.success()
            elif accepted(response, model):
                _read(response, answer, leave_after)
                row["response_length"] = answer.tokens
                if answer.left:
                    row["name"] += " (left)"
            row["response_time"] = (time.perf_counter() - began) * 1e3
        if answer.first is not None:
            self._measured(TTFT, name, answer.first - began)
        if answer.seconds_per_token is not None:
            self._measured(TPOT, name, answer.seconds_per_token)
        back_off(response)

    def _measured(self, kind: str, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=seconds * 1e3,
            response_length=0,
            exception=None,
            context=self.context(),
        )


def _read(response: ResponseContextManager, answer: Answer, leave_after: int | None) -> None:
    """A stream that is not as it must be makes the response a failure."""
    # Locust's own iterators wait for blocks of 1024 bytes, which are many tokens.
    source = response._response
    assert source is not None  # there was a status
    try:
        read_stream(lambda: source.readline(b"\n"), answer, leave_after)
    except StreamError as problem:
        response.failure(str(problem))
    except FAILURE_EXCEPTIONS as problem:
        response.failure(f"the connection broke in mid-stream: {problem}")
    finally:
        # Closes the connection, unless all was read.
        response.release()


@events.init_command_line_parser.add_listener
def take_arguments(parser: Any, **_: Any) -> None:
    add_arguments(parser)


@events.test_start.add_listener
def ask_around(environment: Environment, **_: Any) -> None:
    """Finds out what the server has; a test of nothing is stopped at once."""
    runner, parsed = environment.runner, environment.parsed_options
    assert runner is not None  # the command line has made both
    assert parsed is not None
    # Clients are often given the URL with its /v1.
    environment.host = (environment.host or HOST).rstrip("/").removesuffix("/v1")
    Client.plan = None
    try:
        options = Options.of(parsed)
        Client.default_headers = options.headers()
        client = FastHttpSession(
            environment.host, environment.events.request, None, headers=options.headers()
        )
        Client.plan = make_plan(options, client)
    except (ValueError, OSError) as problem:
        logger.error(f"There is nothing to test. {problem}")
        gevent.spawn(runner.quit if parsed.headless else runner.stop)
    else:
        uploads = "with" if Client.plan.files else "without"
        logger.info(f"{len(Client.plan.models)} models to ask for, {uploads} uploads.")


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Sets the exit code, for scripts that must know whether the server stood the test."""
    runner, parsed = environment.runner, environment.parsed_options
    assert runner is not None
    assert parsed is not None
    if isinstance(runner, WorkerRunner):
        return
    # Locust's own ratio counts our measurements too, which never fail.
    rows = [row for row in environment.stats.entries.values() if row.method not in (TTFT, TPOT)]
    asked = sum(row.num_requests for row in rows)
    failed = sum(row.num_failures for row in rows)
    # GET is asked for the plan only.
    worked = any(row.num_requests for row in rows if row.method != "GET")
    allowed = parsed.max_fail_ratio
    environment.process_exit_code = 1
    if not worked:
        logger.error("No request was answered.")
    elif failed > allowed * asked:
        logger.error(f"{failed} of {asked} requests failed; {allowed:.2%} may.")
    elif not runner.exceptions:
        environment.process_exit_code = 0
