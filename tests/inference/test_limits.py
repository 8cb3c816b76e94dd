"""Control groups of both versions, as files that look like theirs; and what follows for a scan."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from inference import limits

Groups = Callable[[str, dict[str, str]], None]
MACHINE_MIB = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
ALLOWED = len(os.sched_getaffinity(0))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch) -> Groups:
    """Puts /proc/self/cgroup and files below /sys/fs/cgroup in place."""

    def put(own: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(own)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(limits, "CGROUPS", tmp_path)

    return put


def test_version_2(groups: Groups) -> None:
    groups(
        "0::/pod/box\n", {"pod/box/memory.max": "max", "pod/memory.max": str(900 * 2**20), "cpu.max": "50000 100000"}
    )
    assert limits.memory_mib() == 900
    assert limits.cores() == 1


def test_version_1_where_the_container_sees_its_own_group_as_the_root(groups: Groups) -> None:
    groups(
        "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
        {
            "memory/memory.limit_in_bytes": str(700 * 2**20),
            "cpu/cpu.cfs_quota_us": "150000",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert limits.memory_mib() == 700
    assert limits.cores() == min(2, ALLOWED)  # a core and a half


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"memory.max": "max", "cpu.max": "max 100000"}),
        ("4:memory:/\n2:cpu:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096), "cpu/cpu.cfs_quota_us": "-1",
                                   "cpu/cpu.cfs_period_us": "100000"}),
        ("", {}),
        ("nonsense\n\n0::relative\n4:memory\n", {"memory.max": "1"}),
        ("0::/\n", {"memory.max": "?", "cpu.max": "200000", "pids.max": "max"}),
        ("0::/\n", {"cpu.max": "200000 0"}),
    ],
)  # fmt: skip
def test_no_limit_is_the_machine(groups: Groups, own: str, files: dict[str, str]) -> None:
    groups(own, files)
    assert limits.memory_mib() == MACHINE_MIB
    assert limits.cores() == ALLOWED


def test_room_by_hand(groups: Groups) -> None:
    """512×512×100 voxels are 75 MiB while networks run, which need 200 at least, 350 being there before."""
    groups("0::/\n", {"memory.max": str(1000 * 2**20)})
    assert limits.room_mib(Path("x"), (100, 512, 512)) == 575
    assert limits.room_mib(Path("x"), (100, 512, 512), beside_mib=7) == 568


@pytest.mark.parametrize(
    ("slices", "beside_mib", "needed"),
    [
        (100, 0, 350 + 75 + 200),  # the networks decide
        (100, 30, 350 + 30 + 75 + 200),
        (300, 0, 350 + 450),  # fusion does: 6 bytes a voxel, but no network beside it
        (300, 30, 350 + 30 + 450),
    ],
)
def test_too_little_room(groups: Groups, slices: int, beside_mib: int, needed: int) -> None:
    groups("0::/\n", {"memory.max": str(needed * 2**20 - 1)})
    said = f"in/x_0000.nii.gz: its 512×512×{slices} voxels need {needed} MiB of memory, {needed - 1} are there"
    with pytest.raises(ValueError, match=said):
        limits.room_mib(Path("in/x_0000.nii.gz"), (slices, 512, 512), beside_mib)


def test_threads_leave_room_in_the_number_of_processes(groups: Groups) -> None:
    groups("0::/\n", {"pids.max": "4"})
    assert limits.cores() == 1


def test_a_group_whose_name_is_no_text(groups: Groups, tmp_path: Path) -> None:
    groups("", {"memory.max": str(300 * 2**20)})
    (tmp_path / "cgroup").write_bytes(b"0::/\xff\n")
    assert limits.memory_mib() == 300
