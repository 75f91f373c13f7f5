"""One of the processes that `helpers.torchrun` starts: it runs a script, or `-m` and a module, with their arguments.

PyTorch joins gloo's threads while it holds the GIL. A thread that still has a tensor to drop waits for the GIL, and both
wait forever (pytorch/pytorch#190489). On a busy machine one training in ten ended so. So gloo's threads get a second to
finish before PyTorch joins them.
"""

import runpy
import sys
import time

import torch.distributed as dist

destroy = dist.destroy_process_group


def destroy_later(*args, **kwargs):
    time.sleep(1)
    destroy(*args, **kwargs)


if __name__ == "__main__":
    dist.destroy_process_group = destroy_later
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
