"""Where training computes: on the processors, or on one GPU for each process."""

from __future__ import annotations

import os

import torch

from nightstream.errors import MachineError


def choose(setting: str, gpus: int, processes: int) -> str:
    """The kind of device that all training processes use: "cpu" or "cuda".

    Args:
        setting: auto (GPUs where there is one for each process), cpu or cuda.
        gpus: how many there are for training.
        processes: of one encoder's training.

    Returns:
        "cpu" or "cuda".

    Raises:
        MachineError: cuda is set, and there are fewer GPUs than processes.
    """
    if setting == "cpu" or (setting == "auto" and gpus < processes):
        return "cpu"
    if gpus == 0:
        raise MachineError("training.device is cuda, and there is no GPU to train on here; set it to auto or cpu")
    if gpus < processes:
        raise MachineError(
            f"training.device is cuda, and there are {gpus} GPUs for {processes} processes; "
            "lower training.processes or set training.device to cpu"
        )
    return "cuda"


def of_process(kind: str) -> torch.device:
    """This process's device: the CPU, or the GPU of its LOCAL_RANK. Raises MachineError where that is missing."""
    if kind == "cpu":
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if place >= torch.cuda.device_count():
        raise MachineError(f"the training process {place} finds no GPU of its own; set training.device to cpu")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
