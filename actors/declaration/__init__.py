"""The declaration of an account: one document of all that its admins decide.

`export` makes it from an account, `plan` says what has to be done for an account to be as it
declares. Things refer to each other by names instead of ids, so that the document can be read,
kept under version control, and applied to another account. A section that is left out is left
alone. See docs/admin.md.

A core: nothing here waits, reads a clock or makes an id.
"""

from actors.declaration.exporting import SECTIONS, export
from actors.declaration.form import Declaration
from actors.declaration.matching import Fault, Undeclarable
from actors.declaration.planning import FieldChange, Plan, Step, Vault, plan

__all__ = [
    "SECTIONS",
    "Declaration",
    "Fault",
    "FieldChange",
    "Plan",
    "Step",
    "Undeclarable",
    "Vault",
    "export",
    "plan",
]
