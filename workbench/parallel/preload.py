"""All of torch that a rank may want, imported once by the server from which ranks are forked.

Nothing here starts a thread: to fork after that is not safe.
"""

import torch._dynamo
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
import torch.nn.parallel  # noqa: F401

import workbench.data
import workbench.models
import workbench.parallel.data_parallel
import workbench.parallel.worker
import workbench.training  # noqa: F401
