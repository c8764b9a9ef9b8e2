"""The kernel beside virtual time: the same file, pair by pair.

Only outcomes decide. Times are shown, and are those of this machine and its load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import attrs
from rich.console import Group
from rich.table import Table
from rich.text import Text

from admin.safety import printable
from simulations.result import Pair, Result


@attrs.frozen(kw_only=True)
class Row:
    """One pair in both worlds; `None` where it was not asked for. Of a client that lies nothing is
    expected."""

    client: str
    resource: str
    virtual: Pair | None
    kernel: Pair | None
    lies: bool = False

    @property
    def agrees(self) -> bool:
        """Whether it had the same outcome in both."""
        return self.lies or _outcome(self.virtual) == _outcome(self.kernel)


@attrs.frozen(kw_only=True)
class Comparison:
    """`virtual` is the run of the networks as they are on the kernel (`obstacles.as_built`)."""

    seed: int
    rows: tuple[Row, ...]
    errors: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    """Checks that held in one of the two alone."""

    @property
    def agrees(self) -> bool:
        """Whether every pair had the same outcome in both, and both ran to their end."""
        return not self.errors and all(row.agrees for row in self.rows)


def compare(virtual: Result, kernel: Result, lying: Collection[str] = ()) -> Comparison:
    """Two results of one scenario and seed, of which these clients are hostile."""
    before, after = ({(p.client, p.resource): p for p in each.pairs} for each in (virtual, kernel))
    return Comparison(
        seed=kernel.seed,
        rows=tuple(
            Row(
                client=key[0],
                resource=key[1],
                virtual=before.get(key),
                kernel=after.get(key),
                lies=key[0] in lying,
            )
            for key in {**before, **after}
        ),
        errors=tuple(
            f"{each.backend}: {each.error.splitlines()[0]}"
            for each in (virtual, kernel)
            if each.error
        ),
        checks=tuple(_one_sided(virtual, kernel)),
    )


def _one_sided(virtual: Result, kernel: Result) -> Iterator[str]:
    for before, after in zip(virtual.checks, kernel.checks, strict=False):
        if before.held != after.held:
            where, other = ("on the kernel", before) if after.held else ("in virtual time", after)
            yield f"held {where} alone: {before.text} ({other.detail})"


def shown(comparison: Comparison) -> Group:
    """For a terminal."""
    table = Table(box=None, pad_edge=False)
    for name in ("client", "resource", "oracle", "virtual", "kernel", "first answer", ""):
        table.add_column(name, no_wrap=True)
    for row in comparison.rows:
        told = row.kernel or row.virtual
        assert told is not None
        table.add_row(
            Text(printable(row.client)),
            Text(printable(row.resource)),
            told.expected or "-",
            _outcome(row.virtual),
            _outcome(row.kernel),
            f"{_first(row.virtual)} / {_first(row.kernel)}",
            "lies" if row.lies else "" if row.agrees else "differs",
        )
    word = "agree" if comparison.agrees else "differ"
    head = f"virtual time and the kernel {word}, seed {comparison.seed}:"
    lines = [Text(printable(line)) for line in (*comparison.errors, *comparison.checks)]
    return Group(Text(head), table, *lines)


def _outcome(pair: Pair | None) -> str:
    return "unasked" if pair is None else pair.outcome


def _first(pair: Pair | None) -> str:
    if pair is None or pair.first_answer_ns is None:
        return "-"
    return f"{pair.first_answer_ns / 10**6:.0f} ms"
