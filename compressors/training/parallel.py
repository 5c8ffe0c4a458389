"""How several processes share a model: each has a copy (DDP, by accelerate) or a part (FSDP2, by torch).

FSDP cuts every parameter along its first dimension, so groups of N:M along `in` stay whole on one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kick.blocks import largest_block_list

from .objective import Objective


def shard(objective: Objective) -> None:
    """Leave each process its part of the parameters of `objective`, block by block; its companions' as well."""
    everything = [objective, *objective.companions()]
    for tensor in (t for module in everything for t in (*module.parameters(), *module.buffers())):
        dist.broadcast(tensor.detach(), 0)  # parts of one model, not of several that nearly agree
    mesh = init_device_mesh(next(objective.parameters()).device.type, (dist.get_world_size(),))
    apart = set(objective.unshared())
    for model in (objective.model, *objective.companions()):
        for block in largest_block_list(model)[1]:
            fully_shard(block, mesh=mesh)
    for companion in objective.companions():
        fully_shard(companion, mesh=mesh)
    fully_shard(objective, mesh=mesh, ignored_params=apart)


@torch.no_grad()
def unshard(objective: Objective) -> None:
    """All of every parameter on each process again, and modules as they were before `shard`."""
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a last pass without gradients leaves parts gathered, to be shared out when one saves
    whole: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in objective.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    whole[id(parameter)] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                module._parameters[name] = whole[id(parameter)]
    for module in list(objective.modules()):
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            module.__class__ = type(module).__mro__[2]  # type(module) is a mixture of FSDPModule and this


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Of `whole`, which every process has, the part that goes with this process's part of `like`."""
    if not isinstance(like, DTensor):
        return whole
    parts = whole.chunk(like.device_mesh.size(), dim=0)
    rank = like.device_mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """Every process's parts put together, where `like` is shared out. Comes back on all of them."""
    if not isinstance(like, DTensor):
        return part
    sent = part.to(torch.uint8) if part.dtype == torch.bool else part  # not every backend sends truth values
    shared = DTensor.from_local(sent, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return shared.full_tensor().to(part.dtype)


def local(tensor: Tensor) -> Tensor:
    """This process's part, as an ordinary tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_number(tensor: Tensor) -> float:
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
