"""What a device says of itself, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from channel.frames import AGENT_FRAME_LIMIT, FrameDecoder, encode_frame
from channel.messages import FROM_CLIENT, Posture, ReportedFact
from clients.agent import SURVEY_INTERVAL_NS
from clients.posture import is_disk_encrypted, survey

from .stage import SECOND, Stage

CRYPT = "CRYPT-LUKS2-00112233445566778899aabbccddeeff-root"
VOLUME = "LVM-aabbccddeeff"


class Disks:
    """A /sys of block devices: `of` says what a device lies upon."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self, number: str, name: str, *, uuid: str | None = None, of: tuple[str, ...] = ()
    ) -> None:
        device = self.root / "sys" / "devices" / name
        (device / "slaves").mkdir(parents=True)
        if uuid is not None:
            (device / "dm").mkdir()
            (device / "dm" / "uuid").write_text(uuid + "\n")
        for below in of:
            (device / "slaves" / below).symlink_to(self.root / "sys" / "devices" / below)
        link = self.root / "sys" / "dev" / "block" / number
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(device)


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    made = Disks(tmp_path)
    made.add("8:1", "sda1")
    made.add("8:17", "sdb1")
    made.add("254:0", "dm-0", uuid=CRYPT, of=("sda1",))
    made.add("254:1", "dm-1", uuid=VOLUME, of=("dm-0",))
    made.add("254:2", "dm-2", uuid=VOLUME, of=("dm-0", "sdb1"))
    made.add("254:3", "dm-3", uuid=VOLUME, of=("sdb1",))
    made.add("254:4", "dm-4", uuid="mpath-1")
    made.add("7:0", "loop0")
    made.add("9:0", "md0", of=("dm-0", "loop0"))
    return made


@pytest.mark.parametrize(
    ("device", "encrypted"),
    [
        ("254:0", True),  # dm-crypt
        ("254:1", True),  # a volume upon it
        ("254:2", False),  # a volume upon it, and upon another disk
        ("254:3", False),  # a volume without
        ("8:1", False),  # a partition
        ("254:4", None),  # mapped to nothing that is seen
        ("7:0", None),  # a loop device
        ("9:0", None),  # a RAID partly upon a loop device
        ("0:42", None),  # no block device
        ("8:99", None),  # not there
        ("../..", None),
    ],
)
def test_a_disk_is_called_encrypted_only_if_all_of_it_is(
    disks: Disks, device: str, encrypted: bool | None
) -> None:
    assert is_disk_encrypted(disks.root, device) is encrypted


def test_devices_that_lie_upon_themselves_are_not_followed_for_ever(tmp_path: Path) -> None:
    disks = Disks(tmp_path)
    disks.add("254:0", "dm-0", uuid=VOLUME, of=("dm-0",))
    assert is_disk_encrypted(disks.root, "254:0") is None


def test_facts_come_from_os_release(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_text(
        '# a comment\nID=debian\nVERSION_ID="12"\nNAME="a=b"\n\nbroken\n'
    )
    facts = {each.name: each.value for each in survey(tmp_path)}
    assert (facts["os_name"], facts["os_version"]) == ("debian", "12")
    assert "disk_encrypted" not in facts  # no such /sys


def test_what_cannot_be_known_or_told_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "os-release").write_bytes(b"ID=\x1b[31m\nVERSION_ID=" + b"9" * 300)
    assert {each.name for each in survey(tmp_path)} == {"agent_version", "kernel_version"}


def test_the_facts_of_this_machine_pass_the_channel() -> None:
    message = Posture(facts=survey())
    decoder = FrameDecoder(FROM_CLIENT, AGENT_FRAME_LIMIT)
    (frame,) = decoder.feed(encode_frame(message, limit=AGENT_FRAME_LIMIT))
    assert frame.message == message


def test_a_client_reports_after_each_join_and_when_something_is_another() -> None:
    facts = [ReportedFact(name="os_version", value="12")]
    stage = Stage(survey=lambda: tuple(facts))
    assert stage.postures == [Posture(facts=tuple(facts))]
    stage.advance(2 * SURVEY_INTERVAL_NS // SECOND + 1)
    assert len(stage.postures) == 1
    facts.append(ReportedFact(name="disk_encrypted", value=True))
    stage.advance(SURVEY_INTERVAL_NS // SECOND)
    assert stage.postures[1:] == [Posture(facts=tuple(facts))]
    stage.client.channel_lost(stage.now)
    stage.advance(2 * SURVEY_INTERVAL_NS // SECOND)
    assert len(stage.postures) == 2
    stage.tell(stage.client, stage.client_init())
    stage.settle()
    assert stage.postures[2:] == [Posture(facts=tuple(facts))]
