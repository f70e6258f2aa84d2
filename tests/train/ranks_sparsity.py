"""Trains the same model in two processes, and writes what each ends with: ranks_sparsity.py RANK FILE OUT RUN..."""

import sys

import slow_sparsity as slow
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

rank, file, out, runs = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
result = {}
for run in runs:
    model = slow.net()
    s = slow.start(run, model)
    wrapped = DistributedDataParallel(model)
    optimizer = slow.adam(s)
    for i in range(10):
        x, y = (half.chunk(2)[rank] for half in slow.batch(i))
        loss = (wrapped(x) - y).square().mean() + s.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        s.step()
        if i % 3 == 2:
            s.epoch()
    masks = s.masks()
    s.finalize()
    result[run] = {"masks": masks, "weights": {n: p.detach() for n, p in model.named_parameters()}}
torch.save(result, out)
distributed.destroy_process_group()
