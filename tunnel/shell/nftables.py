"""Tables of our own in nftables: one for each TUN device, gone with it or at the next start."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tunnel.shell.commands import run_command, try_command


async def replace_table(name: str, body: str) -> None:
    """Put the table `name` (family inet) with this content in the place of what it was, at once.
    Raises CommandFailed."""
    # Naming a table makes it, so that it can be deleted where it was not there.
    rules = f"table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n{body}\n}}\n"
    await run_command(["nft", "-f", "-"], given=rules)


async def remove_table(name: str) -> None:
    """Nothing happens if there is none. Raises CommandFailed without `nft`."""
    await try_command(["nft", "delete", "table", "inet", name])


async def remove_dead_tables(prefix: str) -> None:
    """Remove tables that are called `prefix` and a TUN device that is gone: what a killed
    predecessor left. Raises CommandFailed."""
    shown = await run_command(["nft", "-j", "list", "tables"])
    for entry in msgspec.json.decode(shown).get("nftables", ()):
        name = entry.get("table", {}).get("name", "")
        device = name.removeprefix(prefix)
        if name.startswith(prefix) and not Path(f"/proc/sys/net/ipv4/conf/{device}").exists():
            await remove_table(name)
