#!/usr/bin/env bash
# torch 2.13.0, FSDP2: behind a forward pass without gradients, such as an evaluation, not all new
# weights reach the next pass. Write into the parameters that an optimizer holds: the layers have
# the new values, the outermost module computes with its old ones. Loading a state dict fails.
#
# Input: two linear layers of unit matrices on two gloo workers, "layer" wrapped by fully_shard, and
# the whole; a pass without gradients; all weights become ten times as large; another pass of ones.
# Seen with torch 2.13.0 (CPU):
#   fully_shard(module)                               10, where 100 is right
#   fully_shard(module, reshard_after_forward=True)   100
#   set_model_state_dict in place of the writing      RuntimeError, and 100
# Source: FSDPParamGroup.reshard in torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py keeps
# gathered weights behind a forward pass unless reshard_after_forward is set, and for the root it is
# not by default: a backward pass would need them first. Where none comes they stay, as plain
# parameters of the module, and unshard() of the next pass finds them there and gathers nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > run.py <<'PYTHON'
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.last = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.last(self.layer(x))


def after_evaluation(mesh, change, **options):
    model = Two()
    for parameter in model.parameters():
        parameter.data.copy_(torch.eye(2))
    for module in (model.layer, model):
        fully_shard(module, mesh=mesh, **options)
    held = list(model.parameters())
    with torch.no_grad():
        model(torch.ones(1, 2))
        try:
            change(model, held)
        except RuntimeError as error:
            return type(error).__name__
        return model(torch.ones(1, 2))[0, 0].item()


def write(model, held):
    for parameter in held:
        parameter.mul_(10)


def load(model, held):
    weights = {name: 10 * torch.eye(2) for name in ("layer.weight", "last.weight")}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def worker(rank):
    group = f"file://{os.getcwd()}/group"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for change in (write, load):
        by_default = after_evaluation(mesh, change)
        resharded = after_evaluation(mesh, change, reshard_after_forward=True)
        if rank == 0:
            print(change.__name__, by_default, resharded, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, nprocs=2)
PYTHON
"$folder/venv/bin/python" run.py | tee seen
grep -q "^write 10.0 100.0$" seen && grep -q "^load RuntimeError 100.0$" seen
