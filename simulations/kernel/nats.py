"""NATs of every behaviour of RFC 4787, made of nftables rules on a NAT of a lab.

Connection tracking alone maps and filters by endpoint. What makes the other behaviours:

- `eim`, a map from each public port to the inside endpoint that it stands for. It learns after the
  translation of what leaves, and a packet that nothing is known of is translated back by it.
- `sent`, a set of who was sent to by which inside endpoint (or through which public port, where the
  filter is of one mapping). In `forward`, where a packet has its inside address already, it says
  whether a new flow from outside may pass.
- `assigned`, a map from what a mapping depends on to its public port: a flow for which there is one
  gets that. Any other gets a new port: the inside's own, a random one, or the next one.

What is not let in is dropped before it is confirmed, so connection tracking never holds it: no own
entry takes the place of a binding (`inbound_binding` is false; `RACING` is the NAT that has it).
What is let in makes an entry, and its answers leave by it, whatever the mapping of other packets is
(`reply_binding` of the oracle is true). Inbound traffic keeps a binding alive.

Not to be had of the kernel (`unsupported` says so): kept ports where one inside endpoint has
several mappings, blocks of ports, and hairpinning but for endpoint-independent mapping that keeps
the port. Random ports are drawn without a look at those of other mappings: two of them meet by
chance, and the older one is forgotten then. In sequence they do not, for the first 2,048.
"""

from __future__ import annotations

from typing import Final, Literal

import attrs

from simulations.kernel.lab import Host, LabError

Behaviour = Literal["endpoint_independent", "address_dependent", "address_and_port_dependent"]
Ports = Literal["preserve", "random", "sequential"]
Hairpinning = Literal["none", "internal_source", "external_source"]

FIRST_PORT: Final = 40_000
SEQUENTIAL_PORTS: Final = 2_048

_TABLE: Final = "nat_of_lab"
_NATURAL_PORTS: Final[dict[Behaviour, Ports]] = {
    "endpoint_independent": "preserve",
    "address_dependent": "random",
    "address_and_port_dependent": "random",
}


@attrs.frozen(kw_only=True)
class KernelNat:
    """How a NAT of a lab behaves. `ports` None: as suits the mapping. `timeout_s` without traffic,
    `stream_timeout_s` once packets went both ways for 2 s. `udp`: what becomes of UDP from inside.
    `filters_per`: "endpoint" is how RFC 4787 words it, "mapping" what symmetric NATs are known for.
    `racing`: plain masquerade, which lets what comes too early take the place of a binding."""

    mapping: Behaviour = "endpoint_independent"
    filtering: Behaviour = "address_and_port_dependent"
    ports: Ports | None = None
    filters_per: Literal["endpoint", "mapping"] = "mapping"
    hairpinning: Hairpinning = "none"
    udp: Literal["pass", "drop", "reject"] = "pass"
    timeout_s: int = 30
    stream_timeout_s: int = 120
    racing: bool = False

    @property
    def assigned(self) -> Ports:
        return self.ports or _NATURAL_PORTS[self.mapping]


RACING: Final = KernelNat(racing=True)


def unsupported(nat: KernelNat) -> str | None:
    """Why the kernel cannot be made to behave so; None if it can."""
    if nat.mapping != "endpoint_independent" and nat.assigned == "preserve":
        return "several mappings of one inside endpoint cannot all keep its port"
    if nat.hairpinning != "none" and (nat.mapping, nat.assigned) != (
        "endpoint_independent",
        "preserve",
    ):
        return "hairpinning is for endpoint-independent mapping that keeps the port"
    if nat.racing and nat != attrs.evolve(RACING, udp=nat.udp, timeout_s=nat.timeout_s,
                                          stream_timeout_s=nat.stream_timeout_s):  # fmt: skip
        return "plain masquerade has one behaviour"
    return None


def install(host: Host, nat: KernelNat) -> None:
    """Make a NAT of a lab behave so from now on, and forget every binding.

    Raises LabError where the kernel cannot.
    """
    if reason := unsupported(nat):
        raise LabError(f"{host.short_name}: {reason}")
    host.nft(rules(nat, host.wan_address))
    host.run(
        "sysctl",
        "-qw",
        "net.bridge.bridge-nf-call-iptables=0",
        # hairpinned packets must not be answered by "go there directly"
        "net.ipv4.conf.all.send_redirects=0",
        "net.ipv4.conf.lan.send_redirects=0",
        f"net.netfilter.nf_conntrack_udp_timeout={nat.timeout_s}",
        f"net.netfilter.nf_conntrack_udp_timeout_stream={nat.stream_timeout_s}",
    )
    host.flush_bindings()


def rules(nat: KernelNat, public_ip: str) -> str:
    """The nftables file of a NAT between the devices `lan` and `wan`."""
    if nat.racing:
        chains = [_source_nat(nat, public_ip), _udp_policy(nat), _unasked_dropped()]
    else:
        chains = [
            _memory(nat),
            _source_nat(nat, public_ip),
            _learning(nat),
            _destination_nat(nat, public_ip),
            _udp_policy(nat),
            _filter(nat),
            _own_doors_shut(),
        ]
    body = "\n".join(chains)
    return f"table ip {_TABLE}\ndelete table ip {_TABLE}\ntable ip {_TABLE} {{\n{body}\n}}\n"


# --- mapping --------------------------------------------------------------------------------------


def _source_nat(nat: KernelNat, public_ip: str) -> str:
    hairpin = ""
    if nat.hairpinning == "external_source":
        hairpin = f'iifname "lan" oifname "lan" ct status dnat snat to {public_ip}'
    known = ""
    if remembered := _assignment(nat, "ip saddr . udp sport"):
        translated = f"snat ip to {public_ip} : {remembered} map @assigned"
        known = "" if nat.racing else f'oifname "wan" meta l4proto udp {translated}'
    return f"""
  chain source_nat {{
    type nat hook postrouting priority srcnat;
    {hairpin}
    {known}
    oifname "wan" meta l4proto udp {_new_port(nat, public_ip)}
    oifname "wan" masquerade
  }}"""


def _new_port(nat: KernelNat, public_ip: str) -> str:
    match nat.assigned:
        case "preserve":
            return "masquerade"
        case "random":
            return "masquerade random,fully-random"
    ports = ", ".join(f"{n} : {FIRST_PORT + n}" for n in range(SEQUENTIAL_PORTS))
    return f"snat ip to {public_ip} : numgen inc mod {SEQUENTIAL_PORTS} map {{ {ports} }}"


def _assignment(nat: KernelNat, inside: str) -> str | None:
    """What the port of a mapping is remembered by; None where each flow has a new one."""
    match nat.mapping:
        case "endpoint_independent":
            return inside
        case "address_dependent":
            return f"{inside} . ip daddr"
    return None


def _memory(nat: KernelNat) -> str:
    lasting = f"flags dynamic,timeout; timeout {nat.stream_timeout_s}s; size 65535;"
    assigned = ""
    if remembered := _assignment(nat, "ip saddr . udp sport"):
        assigned = f"map assigned {{ typeof {remembered} : udp sport; {lasting} }}"
    return f"""
  {assigned}
  map eim {{ typeof udp dport : ip saddr . udp sport; {lasting} }}
  set sent {{ {_sent_type(nat)}; {lasting} }}"""


def _learning(nat: KernelNat) -> str:
    """After the translation. What answers a flow from outside has the inside end as its reply's
    source, everything else as its original source."""
    rules = []
    for direction in ("original", "reply"):
        inside = f"ct {direction} ip saddr . ct {direction} proto-src"
        sent = _peer(nat, "ip daddr", "udp dport") + _self(nat, inside=inside, port="udp sport")
        updates = [f"update @eim {{ udp sport : {inside} }}", f"update @sent {{ {sent} }}"]
        # an answer leaves by where it was reached, which says nothing of mappings by endpoint
        decides = direction == "original" or nat.mapping == "endpoint_independent"
        if decides and (remembered := _assignment(nat, inside)):
            updates.append(f"update @assigned {{ {remembered} : udp sport }}")
        flow = f'oifname "wan" meta l4proto udp ct direction {direction}'
        rules.append(" ".join([flow, *updates]))
    return f"""
  chain learning {{
    type filter hook postrouting priority 110;
    {rules[0]}
    {rules[1]}
  }}"""


def _destination_nat(nat: KernelNat, public_ip: str) -> str:
    translated = f"ip daddr {public_ip} meta l4proto udp dnat ip to udp dport map @eim"
    hairpin = ""
    if nat.hairpinning != "none":
        hairpin = (
            f'iifname "lan" ip daddr {public_ip} meta l4proto udp dnat ip to udp dport map @eim'
        )
    return f"""
  chain destination_nat {{
    type nat hook prerouting priority dstnat;
    iifname "wan" {translated}
    {hairpin}
  }}"""


# --- filtering ------------------------------------------------------------------------------------


def _sent_type(nat: KernelNat) -> str:
    inside = "udp dport" if nat.filters_per == "mapping" else "ip saddr . udp sport"
    return f"typeof {_peer(nat, 'ip daddr', 'udp dport')}{inside}"


def _peer(nat: KernelNat, address: str, port: str) -> str:
    """What of a peer the filter looks at, as the first part of an element of `sent`."""
    return f"{address} . " if nat.filtering == "address_dependent" else f"{address} . {port} . "


def _self(nat: KernelNat, *, inside: str, port: str) -> str:
    return port if nat.filters_per == "mapping" else inside


def _filter(nat: KernelNat) -> str:
    """Of new flows from outside; what belongs to a known flow passes."""
    self = _self(nat, inside="ip daddr . udp dport", port="ct original proto-dst")
    hairpin = ""
    if nat.hairpinning != "none":
        own = "ct original ip saddr . ct original proto-src"
        sent = _peer(nat, "ct original ip daddr", "ct original proto-dst")
        hairpin = f"""
    iifname "lan" oifname "lan" meta l4proto udp ct status dnat ct direction original \
update @sent {{ {sent}{_self(nat, inside=own, port="udp sport")} }}
    iifname "lan" oifname "lan" meta l4proto udp ct status dnat ct state new \
{_allowed(nat, "ct original ip daddr", self)}
    iifname "lan" oifname "lan" ct status dnat ct state new drop"""
    return f"""
  chain filter_of_flows {{
    type filter hook forward priority filter;
    iifname "wan" meta l4proto udp ct state new ct status dnat {_allowed(nat, "ip saddr", self)}
    iifname "wan" ct state new,invalid drop{hairpin}
  }}"""


def _allowed(nat: KernelNat, source: str, self: str) -> str:
    if nat.filtering == "endpoint_independent":
        return "accept"
    return f"{_peer(nat, source, 'udp sport')}{self} @sent accept"


def _udp_policy(nat: KernelNat) -> str:
    verdict = {
        "pass": "accept",
        "drop": "drop",
        "reject": "reject with icmp type admin-prohibited",
    }[nat.udp]
    return f"""
  chain udp_policy {{
    type filter hook forward priority filter - 10;
    oifname "wan" meta l4proto udp {verdict}
    iifname "wan" meta l4proto udp {"accept" if nat.udp == "pass" else "drop"}
  }}"""


def _own_doors_shut() -> str:
    """Else connection tracking would take what comes too early for a flow to the NAT itself."""
    return """
  chain own_doors {
    type filter hook input priority filter;
    iifname { "wan", "lan" } meta l4proto udp drop
  }"""


def _unasked_dropped() -> str:
    return """
  chain filter_of_flows {
    type filter hook forward priority filter;
    iifname "wan" ct state new,invalid drop
  }"""


# --- firewalls ------------------------------------------------------------------------------------


def install_firewall(
    host: Host,
    *,
    udp: Literal["pass", "drop", "reject"] = "pass",
    udp_ports: tuple[int, ...] = (),
    tcp_ports: tuple[int, ...] = (),
    ipv6_inbound: bool = True,
) -> None:
    """What a router of a lab with `lan` and `wan` lets out, beside its NAT, from now on. `udp` is
    of all UDP, both ways; lists of ports are those to which it goes out alone, if there are any.
    Without `ipv6_inbound` no IPv6 comes in that nobody asked for."""
    lines = []
    refused = "reject with icmpx type admin-prohibited" if udp == "reject" else "drop"
    if udp != "pass":
        lines.append(f'oifname "wan" meta l4proto udp {refused}')
        lines.append('iifname "wan" meta l4proto udp drop')
    for protocol, ports in (("udp", udp_ports), ("tcp", tcp_ports)):
        if ports:
            those = ", ".join(map(str, ports))
            new = f'oifname "wan" ct direction original {protocol} dport'
            lines.append(f"{new} != {{ {those} }} drop")
    if not ipv6_inbound:
        lines.append('iifname "wan" meta nfproto ipv6 ct state new,invalid drop')
    body = "\n    ".join(lines)
    host.nft(f"""
table inet firewall_of_lab
delete table inet firewall_of_lab
table inet firewall_of_lab {{
  chain forward {{
    type filter hook forward priority filter - 20;
    {body}
  }}
}}
""")


# --- IPv6 -----------------------------------------------------------------------------------------


def install_ipv6_firewall(host: Host, *, inbound: bool = False, udp: bool = True) -> None:
    """A stateful firewall without translation on a router of a lab with `lan` and `wan`. `inbound`:
    what nobody asked for comes in too. Not `udp`: no UDP goes through."""
    unasked = "" if inbound else 'iifname "wan" ct state new,invalid drop'
    blocked = "" if udp else "meta l4proto udp drop"
    host.nft(f"""
table ip6 firewall_of_lab
delete table ip6 firewall_of_lab
table ip6 firewall_of_lab {{
  chain forward {{
    type filter hook forward priority filter;
    {blocked}
    ct state established,related accept
    {unasked}
  }}
}}
""")
