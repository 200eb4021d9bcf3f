"""Process groups: the ranks of a call, and a group of them for messages between CPUs."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from msa.checks import kind

Group = dist.ProcessGroup | DeviceMesh
"""A process group, or a mesh of one dimension such as `mesh["context"]`."""

_host_groups: dict[str, dist.ProcessGroup] = {}


def process_group(group: Group | None) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension, or as it is given; None means all processes.

    Raises:
        TypeError, ValueError: no group, a mesh of several dimensions, a rank outside of the group.
    """
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "group must be a group of processes that were connected, got None and no default "
                "group: start with torchrun, and call torch.distributed.init_process_group"
            )
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a mesh of one dimension, got {group.ndim} dimensions "
                f"{group.mesh_dim_names}: give one of them, as in mesh['context']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must contain this rank, got a group of other ranks")
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or a DeviceMesh, got {kind(group)}"
        )
    return group


def rank_and_count(group: Group | None) -> tuple[int, int]:
    """This process's rank in the group, and the number of ranks."""
    group = process_group(group)
    return group.rank(), group.size()


def host_group(group: Group | None) -> dist.ProcessGroup:
    """The same ranks, with messages between CPUs: gloo.

    It is made at the first call for a group, and kept. NCCL carries tensors of GPUs only, and a
    check through it would make the host wait for all work on the GPU.
    """
    group = process_group(group)
    if "gloo" in dist.get_backend(group):
        return group
    name = group.group_name
    if name not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        made: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _host_groups[name] = made
    return _host_groups[name]
