"""The reference of scenario files, as docs/simulator.md has it: made from the schema.

`python -m simulations.scenario.reference FILE` writes it anew between the two marks of that file; a
test sees to it that this was done, and that every field is told of.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import attrs

from simulations.scenario import schema
from simulations.scenario.kinds import CHECKS, FAULTS, SUBJECTS, Kind
from simulations.scenario.population import mixes
from simulations.scenario.structure import hints, quantity_reader
from simulations.scenario.units import (
    duration_ns,
    rate_bit_per_s,
    share_ppm,
    signed_duration_ns,
    size_bytes,
)

BEGIN: Final = "<!-- the reference begins: python -m simulations.scenario.reference -->"
END: Final = "<!-- the reference ends -->"

TABLES: Final[tuple[tuple[str, type], ...]] = (
    ("the file", schema.Scenario),
    ("networks", schema.Network),
    ("nat", schema.NatBehaviour),
    ("firewall", schema.Firewall),
    ("uplink, lan, quality", schema.LinkQuality),
    ("links", schema.Link),
    ("portals", schema.Portal),
    ("relays", schema.Relay),
    ("gateways", schema.Gateway),
    ("clients", schema.Client),
    ("services", schema.Service),
    ("account", schema.Account),
    ("account.users", schema.User),
    ("account.resources", schema.Resource),
    ("account.policies", schema.Policy),
    ("populations", schema.Population),
    ("traffic", schema.Traffic),
    ("faults", schema.Fault),
    ("checks", schema.Check),
    ("chaos", schema.Chaos),
)

COMMON: Final[dict[str, str]] = {
    "name": "Lower-case letters, digits, `-` and `_`.",
    "network": "Where it stands.",
    "starts": "Whether it runs from the beginning, or waits for a fault `start`.",
    "hostile": "How it lies; empty: it is honest.",
    "groups": "The user's, besides `everyone`.",
    "at": "Instant, counted from when all are online.",
    "until": "Instant; empty: the end of the run.",
    "source": "Clients or populations; empty: all.",
    "to": "Resources; empty: all that the client may reach.",
    "targets": "Whom it befalls, or what is looked at; see the kinds below.",
    "prefix": "IPv4; empty: of the network outside, or behind a NAT 192.168.1.0/24.",
    "prefix6": "IPv6, such as 2001:db8:1::/64; empty: there is none.",
}

NOTES: Final[dict[tuple[type, str], str]] = {
    (schema.Scenario, "format"): "Of this file format.",
    (schema.Scenario, "name"): "Any text; reports are compared by it.",
    (schema.Scenario, "description"): "What it shows.",
    (schema.Scenario, "sources"): "Where figures in it come from.",
    (schema.Scenario, "duration"): "How long the run takes, from when all are online.",
    (schema.Scenario, "settle"): "How long all have to come online; the run begins then.",
    (schema.Scenario, "seed"): "Of a saved failure; `--seed` names another.",
    (schema.Scenario, "networks"): "Places with hosts.",
    (schema.Scenario, "links"): "Further ways between networks.",
    (schema.Scenario, "portals"): "Nodes of the control plane: one cluster.",
    (schema.Scenario, "relays"): "Relays.",
    (schema.Scenario, "gateways"): "Gateways.",
    (schema.Scenario, "clients"): "Devices of people.",
    (schema.Scenario, "services"): "What stands behind gateways, and echoes.",
    (schema.Scenario, "account"): "Who may reach what.",
    (schema.Scenario, "populations"): "Many clients, drawn.",
    (schema.Scenario, "traffic"): "Who asks what, when.",
    (schema.Scenario, "faults"): "What goes wrong when.",
    (schema.Scenario, "checks"): "What must hold.",
    (schema.Scenario, "chaos"): "Faults that are drawn from the seed.",
    (schema.Network, "behind"): "The network to which it is attached.",
    (schema.Network, "nat"): "Between it and the one outside; left out: there is none.",
    (schema.Network, "firewall"): "What passes, beside the NAT.",
    (schema.Network, "uplink"): "The way to the network outside.",
    (schema.Network, "lan"): "The way between its hosts.",
    (schema.Network, "country"): "ISO 3166, for policies that ask for it.",
    (schema.NatBehaviour, "mapping"): "When a flow keeps its outside port (RFC 4787, 4.1).",
    (schema.NatBehaviour, "filtering"): "Who may answer (RFC 4787, 5).",
    (schema.NatBehaviour, "ports"): "Which outside port a flow gets.",
    (schema.NatBehaviour, "hairpinning"): "Whether inside hosts reach one another by outside "
    "addresses, and as whom.",
    (schema.NatBehaviour, "timeout"): "A binding is forgotten after so long without traffic.",
    (schema.NatBehaviour, "inbound_refresh"): "Traffic from outside keeps a binding too.",
    (
        schema.NatBehaviour,
        "inbound_binding",
    ): "A packet from outside that is dropped takes the port "
    "that the flow would have had (the race of Linux' masquerade).",
    (
        schema.NatBehaviour,
        "reply_binding",
    ): "What goes to a peer leaves from where that peer came in, whatever the mapping of other "
    "packets is (connection tracking).",
    (schema.NatBehaviour, "addresses"): "Public addresses; each inside host keeps one.",
    (schema.Firewall, "udp"): "What becomes of UDP to the outside.",
    (schema.Firewall, "udp_ports"): "If any: UDP goes out to these ports only.",
    (schema.Firewall, "tcp_ports"): "If any: TCP goes out to these ports only.",
    (schema.Firewall, "ipv6_inbound"): "Unasked IPv6 packets come in.",
    (schema.LinkQuality, "latency"): "In each direction.",
    (schema.LinkQuality, "jitter"): "Added at random, up to so much; packets may overtake.",
    (schema.LinkQuality, "loss"): "Of packets.",
    (schema.LinkQuality, "burst"): "Mean length of a burst of losses; 1: each by itself.",
    (schema.LinkQuality, "duplication"): "Of packets.",
    (schema.LinkQuality, "reordering"): "Of packets.",
    (schema.LinkQuality, "corruption"): "Of packets: a bit is flipped.",
    (schema.LinkQuality, "bandwidth"): "Empty: no limit.",
    (schema.LinkQuality, "queue"): "Before a limited link; drops at its tail.",
    (schema.LinkQuality, "mtu"): "Larger packets are dropped, and the sender is told.",
    (schema.Link, "between"): "Two networks without a NAT between them.",
    (schema.Link, "quality"): "Of the way.",
    (schema.Relay, "region"): "As the portal knows it.",
    (schema.Gateway, "site"): "The site that it serves.",
    (schema.Client, "user"): "Whose it is.",
    (schema.Service, "address"): "On its network; empty: the next free one.",
    (schema.Account, "users"): "People.",
    (schema.Account, "sites"): "Places with gateways and resources.",
    (schema.Account, "resources"): "What is protected.",
    (schema.Account, "policies"): "Which group may reach what.",
    (schema.Resource, "sites"): "Whose gateways serve it.",
    (schema.Resource, "service"): "It is this service; or",
    (schema.Resource, "address"): "this address or prefix.",
    (schema.Resource, "filters"): "As in the API: protocol, `port_start`, `port_end`.",
    (schema.Policy, "group"): "A group of users, or `everyone`.",
    (schema.Policy, "resource"): "What they may reach.",
    (schema.Policy, "conditions"): "As in the API ([policy.md](policy.md)).",
    (schema.Policy, "lease"): "1min to 24h; empty: 24h.",
    (schema.Policy, "expires_in"): "After the start of the run; empty: never.",
    (schema.Policy, "disabled"): "Until a fault `change` enables it.",
    (schema.Population, "count"): "How many clients.",
    (schema.Population, "mix"): "Where they stand; see the mixes below.",
    (schema.Population, "roaming"): "Which share moves about between home and a phone.",
    (schema.Traffic, "every"): "Between two questions.",
    (schema.Traffic, "size"): "Bytes of a question, and of its answer.",
    (schema.Fault, "kind"): "See the kinds below.",
    (schema.Fault, "others"): "From whom `targets` part; empty: from all others.",
    (schema.Fault, "to"): "The network to move to.",
    (schema.Fault, "duration"): "How long; empty: for good.",
    (schema.Fault, "quality"): "What uplinks are like meanwhile.",
    (schema.Fault, "renumber"): "The NAT gets another public address.",
    (schema.Fault, "offset"): "Of the wall clock; may be negative.",
    (schema.Fault, "drift_ppm"): "Of the clock's speed.",
    (schema.Fault, "slow"): "How long answers of the database take; empty: there are none.",
    (schema.Fault, "every"): "Between two restarts.",
    (schema.Fault, "change"): "What an admin does; see below.",
    (schema.Fault, "subject"): "To whom or what.",
    (schema.Fault, "share"): "Of the users.",
    (schema.Check, "kind"): "See the kinds below.",
    (schema.Check, "path"): "`none`: no access, or silence.",
    (schema.Check, "within"): "The bound; empty: it is not looked at.",
    (schema.Check, "paths"): "Outcomes that count.",
    (schema.Check, "least"): "Of all pairs that may.",
    (schema.Chaos, "faults"): "How many are drawn; fewer where there is no room.",
    (schema.Chaos, "kinds"): "Of which kinds; empty: all that the topology permits.",
    (schema.Chaos, "longest"): "How long one lasts at most.",
    (schema.Chaos, "at_once"): "How many at the same time.",
    (schema.Chaos, "heals"): "Everything has healed so long before the end.",
    (schema.Chaos, "worst_loss"): "Of links that are made worse.",
    (schema.Chaos, "worst_latency"): "Of links that are made worse.",
}


def reference() -> str:
    """All tables of the file, its kinds of faults and checks, and the mixes, as Markdown."""
    parts = [_table(title, each) for title, each in TABLES]
    parts.append(_kinds("Kinds of faults", FAULTS))
    rows = [f"| `{name}` | {' and a '.join(kinds)} |" for name, kinds in SUBJECTS.items()]
    parts.append("#### Changes by an admin\n\n| `change` | `subject`: names of a |\n|---|---|\n")
    parts[-1] += "\n".join(rows)
    parts.append(
        "A token is the user's: with that of one client go all devices of the same user. The name "
        "of a population stands for each of its clients, and their users."
    )
    parts.append(_kinds("Kinds of checks", CHECKS))
    parts.append(
        "#### Mixes of populations\n\n| mix | what it is | figures in it |\n|---|---|---|\n"
    )
    parts[-1] += "\n".join(
        f"| `{name}` | {mix.description} | {'; '.join(mix.figures) or 'none: all assumed'} |"
        for name, mix in sorted(mixes().items())
    )
    return "\n\n".join(parts)


def note(owner: type, field: str) -> str:
    """What is told of a field. Raises KeyError."""
    return NOTES.get((owner, field)) or COMMON[field]


def renewed(document: str) -> str:
    """The document with its reference as it has to be. Raises ValueError without the marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the marks of the reference are missing")
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{after}"


def _table(title: str, owner: Any) -> str:
    rows = [
        f"| `{field.name}` | {_kind_of(owner, field)} | {_default(field)} | "
        f"{note(owner, field.name)} |"
        for field in attrs.fields(owner)
    ]
    names = ", ".join(f"`{name}`" for name in title.split(", ")) if title != "the file" else title
    return f"#### {names}\n\n| key | value | default | |\n|---|---|---|---|\n" + "\n".join(rows)


def _kinds(title: str, kinds: dict[str, Kind]) -> str:
    rows = [
        f"| `{name}` | {kind.text} | {_keys(kind.needs)} | {_keys(kind.takes)} | "
        f"{', '.join(kind.targets) if 'targets' in (*kind.needs, *kind.takes) else ''} |"
        for name, kind in kinds.items()
    ]
    head = "| kind | what happens | needs | takes | `targets` are |\n|---|---|---|---|---|\n"
    if kinds is CHECKS:
        head = head.replace("what happens", "what must hold")
    return f"#### {title}\n\n{head}" + "\n".join(rows)


def _keys(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


_QUANTITIES: Final[dict[Any, str]] = {
    duration_ns: "duration",
    signed_duration_ns: "duration",
    rate_bit_per_s: "rate",
    size_bytes: "size",
    share_ppm: "share",
}


def _kind_of(owner: type, field: Any) -> str:
    hint = hints(owner)[field.name]
    reader = quantity_reader(field.name, hint)
    return _QUANTITIES[reader] if reader is not None else _type(hint)


def _type(hint: Any) -> str:
    if hint == schema.Name:
        return "name"
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" if each != "" else "empty" for each in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        some = [each for each in get_args(hint) if each not in (NoneType, Literal[""])]
        return " or ".join(_type(each) for each in some)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"list of {_plural(_type(inner[0]))}"
    if attrs.has(hint):
        title = next(title for title, each in TABLES if each is hint)
        return f"table `{title.split(', ')[-1]}`"
    return {str: "text", int: "number", float: "number", bool: "true, false"}.get(hint, "table")


def _plural(word: str) -> str:
    return word + "s" if word in ("name", "number", "table") else word.replace("table ", "tables ")


def _default(field: Any) -> str:
    default = field.default
    if default is attrs.NOTHING:
        return "required"
    if default in (None, "", ()) or isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return ""
    if isinstance(default, schema.LinkQuality):
        return f"latency {default.latency}"
    if attrs.has(type(default)):
        return ""
    if isinstance(default, tuple):
        return _keys(default)
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


def main() -> None:
    """Renew the reference in a file."""
    file = Path(sys.argv[1])
    file.write_text(renewed(file.read_text()))


if __name__ == "__main__":
    main()
