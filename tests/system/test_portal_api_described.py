"""The API against its own description: schemathesis makes calls from the OpenAPI document, good and
bad ones, and holds every answer to it. No 500, and no status, header or body that is not described.

HOLLOWAY_SCHEMATHESIS_EXAMPLES says how many calls of each operation and kind are made (3).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest
import requests
import schemathesis
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from channel.credentials import decode_token
from tests.system.portal_support import installation, world

pytestmark = pytest.mark.system

EXAMPLES = int(os.environ.get("HOLLOWAY_SCHEMATHESIS_EXAMPLES", "3"))
ENDLESS = {"/v1/events"}
"""Streams, which no client that waits for the whole answer can read; they have tests of their
own."""

load_all_checks()
WANTED = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)


@attrs.frozen
class Served:
    """An API that runs in a thread of its own, since schemathesis is no coroutine."""

    url: str
    ca: str
    document: dict[str, Any]
    headers: dict[str, dict[str, str]]
    ids: list[str]


@contextmanager
def served(directory: Path) -> Iterator[Served]:
    ready: Queue[Served | BaseException] = Queue()
    over = threading.Event()

    async def serve() -> None:
        async with installation(directory, calls_per_s=10**6) as here:
            account_id, admin = await here.admin_of("acme")
            async with here.client(admin) as client:
                ids = await world(here, client)
                document = (await client.get("/v1/openapi.json")).json()
            of_operator = {
                "authorization": f"Bearer {here.operator_token}",
                "holloway-account": account_id,
            }
            ready.put(
                Served(
                    url=f"https://{here.door.address}",
                    ca=str(directory / "ca.pem"),
                    document=document,
                    headers={
                        "admin": {"authorization": f"Bearer {admin}"},
                        "operator": of_operator,
                        "nobody": {},
                    },
                    ids=sorted({*ids.values(), account_id, str(decode_token(admin).id)}),
                )
            )
            while not over.is_set():
                await trio.sleep(0.1)

    def run() -> None:
        try:
            trio.run(serve)
        except BaseException as error:
            ready.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        found = ready.get(timeout=60)
        if isinstance(found, BaseException):
            raise found
        yield found
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("described")) as found:
        yield found


def known(value: Any, draw: st.DataObject, ids: list[str]) -> Any:
    """The same, with ids that exist in place of some of those that were made up."""
    if isinstance(value, dict):
        return {name: known(each, draw, ids) for name, each in value.items()}
    if isinstance(value, list):
        return [known(each, draw, ids) for each in value]
    try:
        UUID(value)
    except (ValueError, AttributeError, TypeError):
        return value
    return draw.draw(st.sampled_from(ids) | st.just(value))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("caller", ["admin", "operator", "nobody"])
def test_every_answer_is_as_described(api: Served, caller: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(api.document)
    examples = EXAMPLES if caller == "admin" else max(1, EXAMPLES // 5)
    tried = 0
    with requests.Session() as session:
        session.trust_env = False
        session.headers.update(api.headers[caller])
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path in ENDLESS:
                continue

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode), draw=st.data())
            def call(case: Case, draw: st.DataObject) -> None:
                if spares(case, api):
                    case.path_parameters = {
                        name: draw.draw(st.sampled_from(api.ids)) if name.endswith("id") else value
                        for name, value in (case.path_parameters or {}).items()
                    }
                case.body = known(case.body, draw, api.ids)
                headers = {} if caller == "nobody" else {"Idempotency-Key": str(uuid4())}
                answer = case.call(
                    base_url=api.url, session=session, headers=headers, verify=api.ca
                )
                case.validate_response(answer, checks=WANTED)
                if caller == "nobody" and case.operation.definition.raw.get("security") != []:
                    refused = {401, 429} if mode == GenerationMode.POSITIVE else {401, 404, 429}
                    assert answer.status_code in refused, (case.operation.label, answer.status_code)

            try:
                call()
            except Unsatisfiable:  # nothing can be made wrong about this operation
                continue
            tried += 1
    assert tried >= 60


def spares(case: Case, api: Served) -> bool:
    """Whether a call may be about what exists: not if it would end the test with it."""
    return case.method != "DELETE" and "accounts" not in case.path
