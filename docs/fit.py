"""A fit that several processes share: torchrun --nproc-per-node 2 fit.py."""

import torch.distributed as processes

from pyro_nf.guides import AutoFlow
from pyro_nf.inference import FlowSVI
from pyro_nf.models import eight_schools

processes.init_process_group("gloo")  # on GPUs "nccl", after torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
guide = AutoFlow(eight_schools.noncentered)
result = FlowSVI(eight_schools.noncentered, guide, seed=0).run(*eight_schools.data())
if processes.get_rank() == 0:
    print(result)
processes.destroy_process_group()  # without it a process may be aborted as it exits
