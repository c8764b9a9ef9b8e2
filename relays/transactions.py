"""The requests of a TURN client that are under way: credentials, repetition, responses (a core).

Requests go again after 100 ms, 200 ms, 400 ms and so on (RFC 8489, section 6.2.1, from a shorter
start), seven times in all. Over a reliable transport (TCP, TLS, a QUIC stream) a request is sent
once and waited for as long as over UDP, 79 initial timeouts: RFC 8489, section 6.2.2, has 39.5 s,
which is the same with its start of 500 ms, but whoever waits for a relay has another one to go to,
and 7.9 s leave room for three retransmissions of TCP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from relays.authentication import ClientCredentials
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    xor_address_value,
)
from runtime.net.address import Address
from runtime.randomness import Randomness

INITIAL_RTO_NS: Final = 100 * 10**6
MAX_SENDS: Final = 7
LAST_WAIT_RTOS: Final = 16
RELIABLE_WAIT_RTOS: Final = 79
MAX_CHALLENGES: Final = 3


@attrs.define(kw_only=True)
class Transaction:
    """A request that has no answer yet; `peer` is whom it is about."""

    method: Method
    attributes: tuple[tuple[int, bytes], ...]
    peer: Address | None
    challenges: int
    key: bytes | None = attrs.field(repr=False)
    datagram: bytes
    rto_ns: int
    sends: int
    resend_at_ns: int


class Unacceptable(Exception):
    """A challenge that cannot be answered; `code` is that of the response."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Transactions:
    """See the head of this file. What is to be sent is appended to `datagrams`."""

    def __init__(
        self,
        *,
        credentials: ClientCredentials,
        randomness: Randomness,
        initial_rto_ns: int,
        reliable: bool,
    ) -> None:
        self.datagrams: list[bytes] = []
        self._credentials = credentials
        self._randomness = randomness
        self._initial_rto_ns = initial_rto_ns
        self._reliable = reliable
        self._max_sends = 1 if reliable else MAX_SENDS
        self._last_wait_ns = initial_rto_ns * (RELIABLE_WAIT_RTOS if reliable else LAST_WAIT_RTOS)
        self._transaction_by_id: dict[bytes, Transaction] = {}

    def __len__(self) -> int:
        return len(self._transaction_by_id)

    def __contains__(self, transaction_id: bytes) -> bool:
        return transaction_id in self._transaction_by_id

    def clear(self) -> None:
        self._transaction_by_id.clear()

    def begin(
        self,
        method: Method,
        attributes: Iterable[tuple[int, bytes]],
        now: int,
        peer: Address | None = None,
        challenges: int = 0,
    ) -> None:
        """Start a transaction. An empty XOR-PEER-ADDRESS is filled in with `peer`."""
        attributes = tuple(attributes)
        transaction_id = self._randomness.bytes(12)
        body = [
            (kind, xor_address_value(peer, transaction_id))
            if peer is not None and kind == Attribute.XOR_PEER_ADDRESS
            else (kind, value)
            for kind, value in attributes
        ]
        body += self._credentials.attributes()
        message = StunMessage(
            method=method,
            message_class=MessageClass.REQUEST,
            transaction_id=transaction_id,
            attributes=tuple(body),
        )
        transaction = Transaction(
            method=method,
            attributes=attributes,
            peer=peer,
            challenges=challenges,
            key=self._credentials.key,
            datagram=message.encode(
                key=self._credentials.key, integrity=self._credentials.integrity
            ),
            rto_ns=self._initial_rto_ns,
            sends=0,
            resend_at_ns=0,
        )
        self._transaction_by_id[transaction_id] = transaction
        self._transmit(transaction, now)

    def begin_again(self, method: Method, now: int) -> bool:
        """Repeat a request of this method that waits already, as if it were new; False: there is
        none. Over a reliable transport it is waited for as it was."""
        for transaction in self._transaction_by_id.values():
            if transaction.method is method:
                if not self._reliable:
                    transaction.sends, transaction.rto_ns = 0, self._initial_rto_ns
                    self._transmit(transaction, now)
                return True
        return False

    def answered(self, message: StunMessage, now: int) -> Transaction | None:
        """The transaction that this response ends. None: it ends none; it is no response, or a
        challenge that was answered by a new request. Raises Unacceptable, and StunError for a
        response that is malformed or forged."""
        transaction = self._transaction_by_id.get(message.transaction_id)
        is_response = message.message_class in (MessageClass.SUCCESS, MessageClass.ERROR)
        if transaction is None or not is_response or message.method != transaction.method:
            return None
        error = message.error() if message.message_class is MessageClass.ERROR else None
        if message.message_class is MessageClass.ERROR and error is None:
            raise StunError("an error response without ERROR-CODE")
        code = 0 if error is None else error[0]
        if code in (401, 438):
            self._answer_challenge(message, transaction, code, now)
            return None
        if transaction.key is not None and not message.verify(
            transaction.key, self._credentials.integrity
        ):
            raise StunError("a response that is not of the relay")
        return transaction

    def end(self, message: StunMessage) -> None:
        del self._transaction_by_id[message.transaction_id]

    def next_deadline(self) -> int | None:
        return min((one.resend_at_ns for one in self._transaction_by_id.values()), default=None)

    def handle_timeout(self, now: int) -> bool:
        """Send again what is due. False: one was sent often enough, and nobody answers."""
        for transaction_id, transaction in list(self._transaction_by_id.items()):
            if transaction.resend_at_ns > now:
                continue
            if transaction.sends >= self._max_sends:
                del self._transaction_by_id[transaction_id]
                return False
            self._transmit(transaction, now)
        return True

    def _answer_challenge(
        self, message: StunMessage, transaction: Transaction, code: int, now: int
    ) -> None:
        accepted = self._credentials.learn(message)
        self.end(message)
        repeated = code == 401 and transaction.key is not None
        if repeated or transaction.challenges >= MAX_CHALLENGES:
            raise Unacceptable(code, "the relay does not accept the credentials")
        if not accepted:
            raise Unacceptable(code, "the relay offers no password algorithm, or not its realm")
        self.begin(
            transaction.method,
            transaction.attributes,
            now,
            peer=transaction.peer,
            challenges=transaction.challenges + 1,
        )

    def _transmit(self, transaction: Transaction, now: int) -> None:
        self.datagrams.append(transaction.datagram)
        transaction.sends += 1
        last = transaction.sends >= self._max_sends
        wait_ns = self._last_wait_ns if last else transaction.rto_ns
        transaction.resend_at_ns = now + wait_ns
        transaction.rto_ns *= 2
