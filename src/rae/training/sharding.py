"""Weights, averages and moments spread over the processes, each of which holds its rows (FSDP2).

Blocks are put together one at a time, when they run; a gradient's rows go to the process that holds them. torch's
`fully_shard` does it, which accelerate calls for GPUs alone: on a CPU it leaves its plugin out without a word. What is
saved is whole, so that any number of processes, with or without sharding, goes on from it.

What torch has for it is imported where it is used: it takes most of a second, which no other command should pay.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from rae.diffusion.dit import Block


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process its rows of every parameter, in place; on the mesh's device, block by block.

    Args:
        network: with the same weights in every process. Its parameters become others: optimisers are made afterwards.
        mesh: the processes, in one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    # the output is a view, which the loss does not write to
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def compiled(network: nn.Module) -> nn.Module:
    """`torch.compile` of a network; of one that is spread, of each block by itself, in place.

    Processes talk before and after a block, where no graph can go on; with `recompute` one of the whole network would
    leave the blocks, which is all that counts, as they are.
    """
    if not is_sharded(network):
        return torch.compile(network)
    for block in _blocks(network):
        block.compile()
    return network


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Spread tensors -> whole ones on the CPU; the others stay as they are. Every process must take part.

    Args:
        tensors: the same names in every process.
        keep: whether this process wants them; otherwise it gets none.
    """
    from torch.distributed.tensor import DTensor

    kept = {}
    for name in sorted(tensors):  # all must ask for the same one at a time, and a dictionary may be in any order
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            kept[name] = tensor
    return kept


def part_for(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor [of the parameter's shape] -> what this process holds of it, as it does of the parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _blocks(network: nn.Module) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]
