"""A process of `torch.distributed.run`: steps of a small model that accelerate shards by FSDP2,
beside the same steps without it. Arguments: "auto" or "none" for kernels, "yes" for checkpointing.
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from helpers.transformers_models import ids, wrapped
from torch.distributed.tensor import DTensor


def main() -> None:
    kernels, checkpointing = (None if a == "none" else a for a in sys.argv[1:])
    accelerator = Accelerator(cpu=True)
    # accelerate takes FSDP for accelerators alone: told so after the processes found each other,
    # it prepares a model on gloo as it does there.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        activation_checkpointing=checkpointing == "yes", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    model, whole = wrapped(kernels).train(), wrapped(None).train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    plain = torch.optim.SGD(whole.parameters(), lr=0.5)
    for step in range(3):
        rows = ids(4, 12, seed=step)
        own = rows[2 * dist.get_rank() :][:2]
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = whole(input_ids=rows, labels=rows).loss
        expected.backward()
        plain.step()
        plain.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected.detach(), rtol=1e-4, atol=1e-5)
    wanted = dict(whole.named_parameters())
    for name, p in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        torch.testing.assert_close(p.full_tensor(), wanted[name], rtol=1e-3, atol=1e-5)
    if dist.get_rank() == 0:
        print("equal to one process:", len(wanted), "parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
