"""What the actors of different nodes say to each other, as kinds of the links between nodes.

Numbers belong to the protocol between nodes: never give one to another class, and leave a gap where
one is not used any more. Nodes of different versions skip kinds that they do not know; a field that
is added needs a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from actors import messages
from actors.model import Client, Gateway
from actors.store.codec import read_value, write_value
from channel import messages as told
from runtime.cluster.envelopes import make_codec
from runtime.cluster.frames import MessageCodec

KINDS: Final[Mapping[int, type]] = {
    # an admission or the owner of a channel, to the account
    64: messages.EnrolDevice,
    65: Client,
    66: Gateway,
    67: told.Disconnect,
    68: messages.AttachClient,
    69: messages.AttachGateway,
    70: messages.ClientTruth,
    71: messages.GatewayTruth,
    72: messages.Occupied,
    73: messages.Probe,
    74: messages.AgentMoved,
    75: messages.GatewayLoad,
    76: messages.CandidatesFrom,
    77: messages.PostureReported,
    78: messages.FlowsFrom,
    # a request for access, to the account and to a gateway
    80: messages.DecideAccess,
    81: messages.Grant,
    82: messages.Acknowledge,
    83: messages.GiveUp,
    84: told.AuthorizationDenied,
    85: told.Ack,
    86: messages.CarryOrder,
    # the account, to the owners of channels: each within a FromOwner
    90: messages.FromOwner,
    92: messages.End,
    93: told.AuthorizationCreated,
    94: told.AuthorizationRenewed,
    95: told.AuthorizationRevoked,
    96: told.Authorize,
    97: told.Revoke,
    98: told.ResourceUpdated,
    99: told.Candidates,
    100: messages.ViewChanged,
    101: told.ConfigChanged,
    # the API, to the account
    110: messages.ListPresence,
    111: messages.Presence,
    112: messages.PresenceChanged,
    113: messages.AskExposure,
    114: messages.Exposures,
    # relays, and the directory of each node
    120: messages.RelayOnline,
    121: messages.RelayRegistered,
    122: messages.RelayLoad,
    123: messages.RevokeRelayUse,
    124: told.RevokeUser,
    125: messages.CheckToken,
}


def node_codec() -> MessageCodec:
    """The codec of the links between portal nodes."""
    return make_codec(KINDS, write=write_value, read=read_value)
