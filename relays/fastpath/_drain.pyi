VERSION: int

Address = tuple[str, int]

class Drain:
    """See the head of `_drain.c`. Routes of a channel are named by the descriptors of the listener
    and of the allocation's socket, the client, the channel number and the peer."""

    def __new__(cls, seed: int) -> Drain: ...
    def watch(self, descriptor: int, number: int, is_listener: bool) -> None: ...
    def forget(self, descriptor: int) -> None: ...
    def put(
        self,
        listener: int,
        client: Address,
        channel: int,
        socket: int,
        peer: Address,
        expires_ns: int,
    ) -> bool: ...
    def drop(
        self,
        listener: int,
        client: Address,
        channel: int,
        socket: int,
        peer: Address,
        expires_ns: int,
    ) -> None: ...
    def turn(
        self, epoll: int, now: int
    ) -> tuple[int, list[tuple[int, bytes, Address, int]], list[int]]: ...
    def datagrams(self) -> dict[str, int]: ...
    def relayed(self) -> tuple[int, int]: ...
    def routes(self) -> int: ...
