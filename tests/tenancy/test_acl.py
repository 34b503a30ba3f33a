"""Access control lists on real files."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.tenancy import acl
from agentvoicebox.tenancy.acl import Entry

OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
PERMISSIONS = st.integers(0, 7)


def rights(entries: list[Entry]) -> dict[tuple[int, int], int]:
    """What each entry really allows."""
    mask = next((entry.permission for entry in entries if entry.tag == MASK), 7)
    return {
        (e.tag, e.id): e.permission & (mask if e.tag in (USER, OWNING_GROUP, GROUP) else 7)
        for e in entries
        if e.tag != MASK
    }


def test_a_closed_directory_opens_for_one_user_only() -> None:
    closed = [Entry(OWNER, 7), Entry(OWNING_GROUP, 0), Entry(OTHER, 0)]
    assert acl.admit(closed, 999, acl.SEARCH) == [
        Entry(OWNER, 7),
        Entry(USER, 1, 999),
        Entry(OWNING_GROUP, 0),
        Entry(MASK, 1),
        Entry(OTHER, 0),
    ]


@given(
    owner=PERMISSIONS,
    group=PERMISSIONS,
    other=PERMISSIONS,
    mask=st.none() | PERMISSIONS,
    users=st.dictionaries(st.integers(1, 50), PERMISSIONS, max_size=4),
    groups=st.dictionaries(st.integers(1, 50), PERMISSIONS, max_size=4),
    uid=st.integers(1, 50),
    permission=st.sampled_from([acl.SEARCH, acl.READ, acl.READ | acl.SEARCH]),
)
def test_nobody_else_gains_or_loses(
    owner: int,
    group: int,
    other: int,
    mask: int | None,
    users: dict[int, int],
    groups: dict[int, int],
    uid: int,
    permission: int,
) -> None:
    entries = [Entry(OWNER, owner), *(Entry(USER, p, i) for i, p in sorted(users.items())), Entry(OWNING_GROUP, group)]
    entries += [Entry(GROUP, p, i) for i, p in sorted(groups.items())]
    if mask is not None or users or groups:
        entries.append(Entry(MASK, 7 if mask is None else mask))
    entries.append(Entry(OTHER, other))
    before, after = rights(entries), rights(acl.admit(entries, uid, permission))
    assert after[(USER, uid)] == before.get((USER, uid), 0) | permission
    assert {who: what for who, what in after.items() if who != (USER, uid)} == {
        who: what for who, what in before.items() if who != (USER, uid)
    }


def test_the_kernel_takes_and_gives_back_the_list(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    acl.grant(tmp_path, 12345, acl.SEARCH)
    acl.grant(tmp_path, 12346, acl.READ)
    assert Entry(USER, 1, 12345) in acl.read(tmp_path)
    assert Entry(USER, 4, 12346) in acl.read(tmp_path)
    assert os.stat(tmp_path).st_mode & 0o007 == 0
