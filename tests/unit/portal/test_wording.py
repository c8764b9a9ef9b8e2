"""What is refused is told in words that say what to write instead, never in those of a library."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from portal.api.accounts import AccountCreate
from portal.api.conditions import ConditionsBody
from portal.api.policies import PolicyCreate
from portal.api.problems import Problem
from portal.api.questions import ExplainRequest
from portal.api.requests import decode_body
from portal.api.tokens import TokenCreate

ID = "01a20a28-2cd1-787e-b012-023ea85ce247"
POLICY = {"group_id": ID, "resource_id": ID}
TOKEN = {"kind": "api", "name": "t"}


@pytest.mark.parametrize(
    ("body_type", "body", "field", "message"),
    [
        (PolicyCreate, POLICY | {"lease_s": 5}, "lease_s", "must be at least 60"),
        (PolicyCreate, POLICY | {"lease_s": 10**6}, "lease_s", "must be at most 86400"),
        (PolicyCreate, POLICY | {"group_id": "Staff"}, "group_id", "must be an id (a UUID)"),
        (PolicyCreate, POLICY | {"expires_at": "tomorrow"}, "expires_at", "2027-01-31T09:00:00Z"),
        (PolicyCreate, POLICY | {"expires_at": "2027-01-31T09:00"}, "expires_at", "offset"),
        (TokenCreate, TOKEN | {"name": ""}, "name", "must have at least 1 character"),
        (TokenCreate, TOKEN | {"name": "a" * 256}, "name", "must have at most 255 characters"),
        (TokenCreate, TOKEN | {"name": "a\tb"}, "name", "must not have control characters"),
        (TokenCreate, TOKEN | {"scopes": []}, "scopes", "must have at least 1 entry"),
        (TokenCreate, TOKEN | {"scopes": ["all"]}, "scopes[0]", "such as sites:read"),
        (AccountCreate, {"name": "a", "slug": "A"}, "slug", "of a-z, 0-9 and -"),
        (
            ExplainRequest,
            {"resource_id": ID, "posture": [{"name": "OS", "value": 1}]},
            "posture[0].name",
            "such as os_version",
        ),
        (
            ConditionsBody,
            {"remote_ip_location_region": {"operator": "is_in", "values": ["Germany"]}},
            "remote_ip_location_region.values[0]",
            "such as DE",
        ),
        (
            ConditionsBody,
            {
                "current_time": {
                    "zone": "UTC",
                    "windows": [{"day": 0, "ranges": [{"start": "8", "end": "09:00:00"}]}],
                }
            },
            "current_time.windows[0].ranges[0].start",
            "such as 09:30:00",
        ),
    ],
)
def test_a_refusal_says_what_to_write(
    body_type: Any, body: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(Problem) as caught:
        decode_body(msgspec.json.encode(body), body_type)
    (error,) = caught.value.errors
    assert error.field == field
    assert message in error.message
    assert not any(word in error.message for word in ("regex", "RFC3339", "Expected", "(?!"))
