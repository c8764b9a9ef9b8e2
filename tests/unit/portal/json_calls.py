"""Calls with random bodies: drawn from the names and values that the OpenAPI document itself speaks
of, and from anything else; and an API to send them to, over any store."""

from __future__ import annotations

import json
from typing import Any

import attrs
import httpx
from hypothesis import strategies as st

from actors.model import Account, Entity, Group, Principal, Resource, Site
from actors.store.interface import Put, Store
from portal.api.application import create_api
from portal.api.authentication import Authenticator
from portal.api.frontdoor import FrontDoor
from portal.api.office import Office
from runtime.clock import SystemClock
from runtime.randomness import SystemRandomness
from tests.system.portal_support import Agents, key_ring, make_token

Call = tuple[str, str, Any]


@attrs.frozen
class Target:
    """An API over a store with one account; an admin's token, the OpenAPI document, known ids."""

    door: FrontDoor
    token: str
    document: dict[str, Any]
    ids: list[str]
    entities: tuple[Entity, ...]

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.door)  # type: ignore[arg-type]  # Litestar's ASGI types are narrower
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.token}"}
        return httpx.AsyncClient(transport=transport, base_url="https://portal", headers=headers)

    async def fill(self, store: Store) -> None:
        account = self.entities[0]
        puts = [Put(entity) for entity in self.entities]
        await store.apply(account.id, puts, who="test", at=SystemClock().utc_now())

    async def send(self, call: Call) -> httpx.Response:
        """Send the call, and hold its answer to what every answer has to be."""
        method, path, body = call
        content = json.dumps(body).encode()  # NaN and Infinity are no JSON, and are answered too
        async with self.client() as http:
            answer = await http.request(method, path, content=content)
        assert answer.status_code in (200, 201, 204, 400, 403, 404, 409, 422), answer.text
        if answer.status_code >= 400:
            problem = answer.json()
            assert answer.headers["content-type"] == "application/problem+json"
            assert problem["status"] == answer.status_code
            assert problem["code"]
            assert problem["detail"]
        elif answer.status_code != 204:
            assert isinstance(answer.json(), dict)
        return answer


def target(store: Store) -> Target:
    """An API over this store, which is still to be filled."""
    office = Office(
        store=store,
        clock=SystemClock(),
        randomness=SystemRandomness(),
        live=Agents(),
        portal="portal.example:443",
        pin=bytes(32),
        key_ring=key_ring(),
    )
    now = office.clock.utc_now()
    account = Account(id=office.new_id(), name="Acme", slug="acme", created_at=now)
    common: dict[str, Any] = {"account_id": account.id, "name": "one", "created_at": now}
    admin = Principal(id=office.new_id(), role="admin", **common)
    user = Principal(id=office.new_id(), **common)
    group = Group(id=office.new_id(), **common)
    site = Site(id=office.new_id(), **common)
    resource = Resource(
        id=office.new_id(), site_ids=(site.id,), kind="cidr", address="10.0.0.0/8", **common
    )
    token, text = make_token(office, "api", account_id=account.id, principal_id=admin.id)
    patient = Authenticator(office.store, office.clock, calls_per_s=10**6)
    door = create_api(office, authenticator=patient)
    known = (account, user, group, site, resource)
    return Target(
        door=door,
        token=text,
        document=door.description,
        ids=[str(entity.id) for entity in known],
        entities=(*known, admin, token),
    )


def endpoints(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(method, path, name of the body's schema) of every endpoint that takes a body."""
    return [
        (method, path, operation["requestBody"]["content"]["application/json"]["schema"]["$ref"])
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "requestBody" in operation and path != "/v1/accounts"
    ]


TEXTS = st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=5)
LIKELY = st.sampled_from(
    [
        "cidr",
        "ip",
        "tcp",
        "icmp",
        "is_in",
        "client",
        "gateway",
        "api",
        "relay",
        "10.0.0.0/8",
        "::/0",
        "10.0.0.1",
        "UTC",
        "Europe/Berlin",
        "../../etc/passwd",
        "09:00:00",
        "24:00:00",
        "00:00:00Z",
        "2099-01-01T00:00:00Z",
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+23:59",
        "one",
        "a@b",
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 60, 2**31, 2**63, 10**40, -1])


def values(document: dict[str, Any], ids: list[str]) -> st.SearchStrategy[Any]:
    """JSON of any shape whose keys and texts are often ones that mean something."""
    names = {
        name for each in document["components"]["schemas"].values() for name in each["properties"]
    }
    keys = st.sampled_from(sorted(names)) | TEXTS
    scalars = st.none() | st.booleans() | NUMBERS | TEXTS | LIKELY | st.sampled_from(ids)
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )


@st.composite
def calls(draw: st.DrawFn, document: dict[str, Any], ids: list[str]) -> Call:
    """A method, a path and a body: near to what the endpoint wants, or anything."""
    method, path, reference = draw(st.sampled_from(endpoints(document)))
    for name in ("{id}", "{account_id}"):
        path = path.replace(name, draw(st.sampled_from(ids)))
    anything = values(document, ids)
    body = draw(st.just(None) | anything)
    if body is None:
        body = draw(near(document, {"$ref": reference}, anything, ids))
    return method, path, body


def near(
    document: dict[str, Any],
    schema: dict[str, Any],
    anything: st.SearchStrategy[Any],
    ids: list[str],
) -> st.SearchStrategy[Any]:
    """JSON that nearly fits a schema."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return st.one_of([near(document, each, anything, ids) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"]) | anything
    match schema.get("type"):
        case "object" if "properties" not in schema:
            return st.dictionaries(TEXTS, anything, max_size=3) | anything
        case "object":
            fields = {
                name: near(document, each, anything, ids)
                for name, each in schema["properties"].items()
            }
            needed = set(schema.get("required", ()))
            return st.fixed_dictionaries(
                {name: each for name, each in fields.items() if name in needed},
                optional={name: each for name, each in fields.items() if name not in needed},
            )
        case "array":
            return st.lists(near(document, schema["items"], anything, ids), max_size=3)
        case "string":
            return st.sampled_from(ids) if schema.get("format") == "uuid" else LIKELY | TEXTS
        case "integer":
            return st.integers(0, 70_000) | NUMBERS
        case "boolean":
            return st.booleans()
    return anything
