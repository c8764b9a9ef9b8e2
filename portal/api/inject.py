"""What handlers are given by name: short names for Litestar's long ones."""

from __future__ import annotations

from typing import Any, TypeAlias
from uuid import UUID

from litestar.di import NamedDependency
from litestar.params import FromPath

from portal.api.authentication import Caller
from portal.api.call import Call
from portal.api.office import Desk, Office
from portal.api.pagination import PageRequest

TheDesk: TypeAlias = NamedDependency[Desk]
TheOffice: TypeAlias = NamedDependency[Office]
TheCaller: TypeAlias = NamedDependency[Caller]
TheCall: TypeAlias = NamedDependency[Call]
TheFilters: TypeAlias = NamedDependency[dict[str, Any]]
ThePage: TypeAlias = NamedDependency[PageRequest]
PathId: TypeAlias = FromPath[UUID]
