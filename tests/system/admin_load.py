"""Admins that never stop: they make, rename and delete sites through the API of all nodes, and
remember what was acknowledged."""

from __future__ import annotations

import random
import ssl
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from uuid import UUID

import attrs
import httpx
import trio

PAUSE_S: Final = 0.15
CALL_S: Final = 20.0
DELETED: Final = None


@attrs.define
class Site:
    """What the one admin who touches it knows: its name, or DELETED, as was last acknowledged, and
    what else it may be by calls since that nobody answered."""

    account_id: UUID
    acknowledged: str | None
    in_doubt: set[str | None] = attrs.Factory(set)
    calls: int = 0
    """So many were begun and ended: an odd number while one is under way."""


@attrs.define
class Record:
    """Of all admins."""

    site_by_id: dict[UUID, Site] = attrs.Factory(dict)
    acknowledged: int = 0
    refused: int = 0
    """By a 503: the call may be made again."""
    codes: Counter[str] = attrs.Factory(Counter)
    """Of what was refused."""
    unanswered: int = 0


class Admin:
    """One of them. It calls whichever node it likes, each time another; each site is its alone."""

    def __init__(
        self,
        name: str,
        record: Record,
        token: str,
        tls: ssl.SSLContext,
        account_ids: Sequence[UUID],
        doors: Callable[[], Mapping[str, str]],
    ) -> None:
        self._name = name
        self._record = record
        self._token = token
        self._tls = tls
        self._account_ids = account_ids
        self._doors = doors
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._number = 0

    async def run(self) -> None:
        try:
            while True:
                await self._tend_one()
                await trio.sleep(PAUSE_S)
        finally:
            with trio.move_on_after(1, shield=True):
                for client in self._clients.values():
                    await client.aclose()

    async def _tend_one(self) -> None:
        """The life of a site: made, renamed, and every other one deleted."""
        self._number += 1
        account_id, name = random.choice(self._account_ids), f"{self._name}-{self._number}"
        answer = await self._call(account_id, "POST", "/v1/sites", name)
        if answer is None or answer.status_code != 201:
            return
        id = UUID(answer.json()["id"])
        site = self._record.site_by_id[id] = Site(account_id, name)
        await self._change(id, site, "PATCH", f"{name}-renamed")
        if self._number % 2:
            await self._change(id, site, "DELETE", DELETED)

    async def _change(self, id: UUID, site: Site, method: str, name: str | None) -> None:
        site.calls += 1
        answer = await self._call(site.account_id, method, f"/v1/sites/{id}", name)
        if answer is None or answer.status_code == 503:
            site.in_doubt.add(name)
        elif answer.is_success:
            site.acknowledged = name
            site.in_doubt.clear()
        else:
            # Only a change in doubt can have been in the way.
            assert site.in_doubt, f"{method} of {site}: {answer.status_code} {answer.text}"
        site.calls += 1

    async def _call(
        self, account_id: UUID, method: str, path: str, name: str | None
    ) -> httpx.Response | None:
        """The answer of some node; None if there was none. Who is asked to wait (429) does so, and
        asks again: nothing was done."""
        while True:
            answer = await self._call_once(account_id, method, path, name)
            if answer is None or answer.status_code != 429:
                return answer
            await trio.sleep(int(answer.headers["retry-after"]))

    async def _call_once(
        self, account_id: UUID, method: str, path: str, name: str | None
    ) -> httpx.Response | None:
        door = random.choice(list(self._doors().values()))
        client = self._clients.get(door)
        if client is None:
            client = self._clients[door] = httpx.AsyncClient(
                base_url=f"https://{door}",
                verify=self._tls,
                headers={"authorization": f"Bearer {self._token}"},
                timeout=CALL_S,
                trust_env=False,
            )
        try:
            answer = await client.request(
                method,
                path,
                json=None if name is None else {"name": name},
                headers={"holloway-account": str(account_id)},
            )
        except (httpx.TransportError, ssl.SSLError):
            self._record.unanswered += 1
            return None
        if answer.status_code in (429, 503):
            assert int(answer.headers["retry-after"]) > 0, answer.text
        if answer.status_code == 503:
            self._record.refused += 1
            self._record.codes[answer.json()["code"]] += 1
        elif answer.is_success:
            self._record.acknowledged += 1
        return answer
