"""Limits of control groups, on files as the kernel shows them."""

import torch

from kick import cgroup
from kick.cgroup import Grant, grants
from kick.lm import memory

GB = 1 << 30


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def own(tmp_path, *lines):
    file = tmp_path / "own"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_a_slurm_job_is_bound_by_the_group_above_it(tmp_path):
    mount = tmp_path / "mount"
    group(mount / "slurm/job_7", max=64 * GB, current=10 * GB, stat=f"anon 5\nactive_file {GB}\ninactive_file {3 * GB}")
    group(mount / "slurm/job_7/step_0", max="max", current=9 * GB)
    assert grants(mount, own(tmp_path, "0::/slurm/job_7/step_0")) == [Grant(64 * GB, 6 * GB)]


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    mount = tmp_path / "mount"
    group(mount, max=8 * GB, current=1 * GB)
    assert grants(mount, own(tmp_path, "0::/")) == [Grant(8 * GB, 1 * GB)]
    assert grants(mount, own(tmp_path, "0::/not/seen/from/here")) == [Grant(8 * GB, 1 * GB)]


def test_version_one(tmp_path):
    mount = tmp_path / "mount"
    group(mount / "memory", limit_in_bytes=9223372036854771712, usage_in_bytes=70 * GB)
    group(mount / "memory/docker/abc", limit_in_bytes=2 * GB, usage_in_bytes=GB, stat=f"total_inactive_file {GB // 2}")
    lines = "12:cpu,cpuacct:/docker/abc", "5:memory:/docker/abc", "0::/system"
    assert grants(mount, own(tmp_path, *lines)) == [Grant(2 * GB, GB // 2)]


def test_no_limit_and_no_groups(tmp_path):
    group(tmp_path / "mount", max="max", current=GB)
    assert grants(tmp_path / "mount", own(tmp_path, "0::/")) == []
    assert grants(tmp_path / "mount", tmp_path / "nothing") == []


def test_memory_is_what_is_granted(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(memory, "grants", list)
    total, free = memory.total_bytes(device), memory.free_bytes(device)
    monkeypatch.setattr(memory, "grants", lambda: [Grant(total // 4, total // 8), Grant(total // 2, 0)])
    assert memory.total_bytes(device) == total // 4
    assert memory.free_bytes(device) == min(free, total // 4 - total // 8)
    monkeypatch.setattr(memory, "grants", lambda: [Grant(1000, 5000)])
    assert memory.free_bytes(device) == 0
    assert cgroup.grants() == [] or all(grant.limit > 0 for grant in cgroup.grants())
