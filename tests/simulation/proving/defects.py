"""Deliberate defects: what somebody might once get wrong, as a change of the source text.

Each is applied to a copy of the source (`mutated`), where a run of the proving ground has to find
it within `seeds` seeds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import attrs

ROOT: Final = Path(__file__).resolve().parents[3]
PACKAGES: Final = (
    "runtime", "channel", "relays", "tunnel", "actors", "gateways", "clients", "portal", "admin",
    "simulations",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Edit:
    """In a file of the source, `old` (which is there exactly once) becomes `new`."""

    file: str
    old: str
    new: str


@attrs.frozen(kw_only=True)
class Defect:
    name: str
    edits: tuple[Edit, ...]
    signs: frozenset[str]
    """How the failures begin that count (`simulations.shrink.Failure`)."""
    seeds: int = 2
    ground: str = "ground"


def defect(
    name: str, file: str, old: str, new: str, *signs: str, seeds: int = 2, ground: str = "ground"
) -> Defect:
    """One that is a single edit."""
    edits = (Edit(file=file, old=old, new=new),)
    return Defect(name=name, edits=edits, signs=frozenset(signs), seeds=seeds, ground=ground)


DEFECTS: Final = (
    defect(
        "consent is skipped",
        "tunnel/ice/pair.py",
        "            return min(self.verdict_at, self.consent_until)\n"
        "        return self.consent_until if self.state is PairState.CONSENTED else None\n",
        "            return None\n        return None\n",
        "check recovered", "rule liveness",
        ground="dead-gateway",
    ),
    defect(
        "the source of a packet is not checked",
        "gateways/filters.py",
        "        if header.source not in self._sources:\n"
        "            self.spoofed += 1\n"
        "            return Verdict.DROP\n",
        "",
        "rule spoofing", "rule access",
    ),
    defect(
        "a permission for one resource is one for all",
        "gateways/filters.py",
        "        for resource_id in self._ids_by_network.lookup(header.destination) or ():\n",
        "        for resource_id in tuple(self._resources):\n",
        "rule access",
    ),
    defect(
        "the replay window forgets the word that it is in",
        "tunnel/wireguard/replay.py",
        "self._words[(current + 1 + index) % _WORDS] = 0",
        "self._words[(current + index) % _WORDS] = 0",
        "rule integrity",
    ),
    defect(
        "a revocation is forgotten",
        "actors/authorizations.py",
        "        self._tell(self._gateways, row.gateway_id, "
        "Revoke(authorization_id=row.id, reason=reason))\n",
        "",
        "rule revocation",
    ),
    defect(
        "what is absent from the truth at a rejoin lives on",
        "gateways/agent.py",
        "            if lease is None:\n"
        "                self._end(grant_id, now)\n"
        "            else:\n",
        "            if lease is not None:\n",
        "rule access",
    ),
    defect(
        "the timer of leases is lost at the gateway",
        "gateways/agent.py",
        "            self._end(grant_id, now)\n        if now >= self._stats_at:",
        "            pass\n        if now >= self._stats_at:",
        "rule access",
    ),
    Defect(
        name="nobody is fenced",
        edits=(
            Edit(
                file="actors/store/memory.py",
                old="if book is None or book.epoch != epoch or not book.owner:",
                new="if book is None:",
            ),
            Edit(
                file="runtime/cluster/tenure.py",
                old="        return now_ns < self._lease_until_ns\n",
                new="        return True\n",
            ),
        ),
        signs=frozenset({"rule owners"}),
        seeds=4,
        ground="fencing",
    ),
    Defect(
        name="a disabled policy allows",
        edits=(
            Edit(
                file="actors/policy/snapshot.py",
                old="self.plain = not (policy.disabled or conditions.all",
                new="self.plain = not (conditions.all",
            ),
            Edit(
                file="actors/policy/snapshot.py",
                old="        if policy.disabled:\n",
                new="        if False:\n",
            ),
        ),
        signs=frozenset({"rule policy"}),
    ),
    defect(
        "a sending counter is used for two messages",
        "tunnel/wireguard/peer.py",
        "        self.counter += len(padded)",
        "        self.counter += len(padded) // 2",
        "rule nonces", "check reach",
    ),
    defect(
        "packets leave unsealed",
        "tunnel/wireguard/peer.py",
        "messages.append(head + counter + encrypt(_NONCE_PREFIX + counter, packet, None))",
        "messages.append(head + counter + packet + bytes(16))",
        "rule plaintext",
    ),
    defect(
        "an authorisation is not written",
        "actors/requests.py",
        "            await self._write(row)\n        except Unavailable:  # the store may",
        "            pass\n        except Unavailable:  # the store may",
        "rule written",
    ),
)  # fmt: skip


@contextmanager
def mutated(edits: tuple[Edit, ...]) -> Iterator[Path]:
    """A copy of the source with the edits in it, removed at the end."""
    with TemporaryDirectory(prefix="holloway-defect-") as directory:
        copy = Path(directory)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package)  # with what is compiled: it is kept
        for edit in edits:
            file = copy / edit.file
            text = file.read_text()
            assert text.count(edit.old) == 1, f"{edit.file} is not as it was: {edit.old!r}"
            file.write_text(text.replace(edit.old, edit.new))
        yield copy
