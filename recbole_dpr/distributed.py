"""Several processes on one run, started by RecBole's launch settings: gloo between CPUs, NCCL between GPUs.

Every process does the whole run; what differs is which rows of a batch it trains on and which queries it ranks, and that
the first one alone writes and speaks. Without a process group all this is the plain run.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recbole_dpr.errors import UserError

_MEETING = timedelta(minutes=10)  # until all processes have come
_PATIENCE = timedelta(hours=24)  # while the first process embeds the prompts, the others wait
LAUNCH_KEYS = ("nproc", "world_size", "ip", "port", "group_offset")


def launch_settings(config_dict):
    """Take RecBole's launch settings out of a dict of settings.

    Returns:
        None for a run of one process, else dict: nproc, processes on this machine; world_size, on all machines (which
        share the folder of the run); ip and port of the first machine; group_offset, processes on the machines before.

    Raises:
        UserError: numbers that make no group.
    """
    given = {key: config_dict.pop(key) for key in LAUNCH_KEYS if key in config_dict}
    nproc, port, offset = (given.get(key, default) for key, default in (("nproc", 1), ("port", 5678), ("group_offset", 0)))
    world_size = given.get("world_size", -1)
    for key, value, least in (("nproc", nproc, 1), ("world_size", world_size, -1), ("port", port, 1), ("group_offset", offset, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key}={value}: a whole number from {least} is needed")
    if world_size <= 0:  # as RecBole has it: this machine alone
        world_size = nproc
    if offset + nproc > world_size:
        raise UserError(f"world_size={world_size}: group_offset={offset} and nproc={nproc} need {offset + nproc} processes at least")
    if world_size == 1:
        return None
    return {"nproc": nproc, "world_size": world_size, "ip": str(given.get("ip", "localhost")), "port": port, "group_offset": offset}


def launch(run, arguments, nproc, world_size, ip, port, group_offset):
    """Run `run(*arguments)` in processes of one group.

    Args:
        run: a function of a module, which the processes import; its value has to go through a pipe.
        arguments: tuple; others: as from `launch_settings`.

    Returns:
        what `run` gave in this machine's first process.

    Raises:
        UserError: raised in one of the processes; the others are stopped.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < nproc:
        raise UserError(f"nproc={nproc}: this machine has {torch.cuda.device_count()} GPUs; give at most as many processes")
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(_process, (run, arguments, nproc, world_size, ip, port, group_offset, results), nprocs=nproc, join=False)
    try:
        while not processes.join():
            pass
    except mp.ProcessExitedException:
        if results.empty():
            raise
    kind, value = results.get()
    if kind == "refused":
        raise UserError(value)
    return value


def _process(local_rank, run, arguments, nproc, world_size, ip, port, group_offset, results):
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // nproc))
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            number = group_offset + local_rank
            meeting = dist.TCPStore(ip, port, world_size, is_master=number == 0, timeout=_MEETING)
            dist.init_process_group(backend, store=meeting, rank=number, world_size=world_size, timeout=_PATIENCE)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"no process group at {ip}:{port} ({str(error).splitlines()[0][:120]}); see --ip= and --port=") from error
        result = run(*arguments)
        dist.barrier()
        if local_rank == 0:
            results.put(("done", result))
        dist.destroy_process_group()
    except UserError as error:
        results.put(("refused", str(error)))
        os._exit(2)  # not waiting for processes that wait for this one


def rank():
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_goes_first():
    """A block that the first process goes through before the others: they find on the disk what it made."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def from_first(value):
    """The first process's value, in all processes."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def summed(tensor):
    """The sum over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Each parameter's gradient becomes the sum over processes; None stays None where no process has one."""
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    has = summed(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device))
    used = [p for p, n in zip(parameters, has.tolist()) if n]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).ravel() for p in used])
    for p, part in zip(used, summed(flat).split([p.numel() for p in used])):
        p.grad = part.view_as(p)
