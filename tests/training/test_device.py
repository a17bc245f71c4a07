"""training.device, and that every tensor of a training lies where it says; no GPU is needed for either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_data import ring_sequences
from nightstream.errors import MachineError
from nightstream.models.array_files import save_item_features, save_sequences
from nightstream.models.arrays import RANK, TRAIN, VALID, ItemFeatures, UserFeatures
from nightstream.models.encoders import ItemEncoder, build_sequence_encoder
from nightstream.models.encoders.factory import ENCODERS
from nightstream.models.encoders.tensors import item_batch, sequence_batch
from nightstream.runtime import settings
from nightstream.training import device, spark_job
from nightstream.training.hyperparameters import encoder_sizes, item_sizes
from nightstream.training.recommender import padded
from nightstream.training.trainer import Trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

BASE = Path(__file__).parents[2] / "conf" / "base.yaml"
OPTIONS = {"width": 8, "window": 6, "positions": 256, "epochs": 1}


def items(count: int = 30) -> ItemFeatures:
    """Items with everything that an item can have."""
    tokens = np.stack([np.arange(count) % 7 + 1, np.arange(count) % 3], 1).astype(np.int32)
    kinds = (np.arange(count, dtype=np.int32)[:, None] % 4,)
    return ItemFeatures(np.ones((count, 2), np.float32), kinds, (4,), tokens, 9)


def users(count: int) -> UserFeatures:
    return UserFeatures(np.ones((count, 2), np.float32), (np.ones((count, 1), np.int32),), (3,))


class DeviceNamed(TorchFunctionMode):
    """Refuses every new tensor whose device is not named, and keeps those that are."""

    def __init__(self) -> None:
        self.devices: list[torch.device] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors():
            assert kwargs.get("device") is not None, f"{func.__name__} makes a tensor on whatever device is the default"
            self.devices.append(torch.device(kwargs["device"]))
        return func(*args, **kwargs)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceNamed]:
    def refused(array: np.ndarray) -> None:
        raise AssertionError("from_numpy makes a tensor on the CPU")

    monkeypatch.setattr(torch, "from_numpy", refused)
    mode = DeviceNamed()
    with mode:
        yield mode


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("options", [{"text": "cnn"}, {"text": "rnn", "negatives": 9}], ids=["full", "sampled"])
def test_no_tensor_of_a_training_is_made_without_a_device(
    encoder: str, options: dict[str, Any], tmp_path: Path, named: DeviceNamed
) -> None:
    sequences = ring_sequences(users=20)
    save_sequences(tmp_path / "s", replace(sequences, users=users(20)))
    save_item_features(tmp_path / "i", items())
    spec = {
        "encoder": encoder, "sequences": str(tmp_path / "s"), "items": str(tmp_path / "i"), "seed": 1, "event_types": 2,
        "output": str(tmp_path / "out"), "roles": [TRAIN, RANK, VALID], "options": OPTIONS | options,
    }  # fmt: skip
    torch.set_num_threads(1)
    with torch._C.DisableTorchFunction():
        # Parameters are drawn on the CPU and then moved, so that a seed gives the same ones on every device.
        run = Trainer(spec)
    before = len(named.devices)
    run.run()
    assert len(named.devices) > before + 20
    assert (tmp_path / "out" / "weights.safetensors").exists()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_mix_no_tensor_of_another_device(encoder: str) -> None:
    """FakeTensorMode computes shapes and devices without a GPU, and refuses an operation over two devices."""
    sequences, gpu = replace(ring_sequences(users=4), users=users(4)), torch.device("cuda")
    options = {"encoder": encoder, "width": 8, "window": 6, "text": "rnn"}
    # Without cuDNN, which asks for a driver before it computes anything.
    with torch.backends.cudnn.flags(enabled=False), FakeTensorMode():
        with gpu:
            item_encoder = ItemEncoder(item_sizes(options, items()))
            encode = build_sequence_encoder(encoder_sizes(options, sequences, 2))
        table = padded(item_encoder(item_batch(items(), np.arange(30), gpu)))
        rows = np.arange(24).reshape(4, 6)
        values = np.ones((4, 6), np.float32)
        batch = sequence_batch(
            table[torch.as_tensor(rows, device=gpu)], rows % 3, rows * 1_000_000, values, rows > 0, users(4)
        )
        assert (encode(batch).device.type, encode.last(batch).device.type) == ("cuda", "cuda")
        elsewhere = replace(batch, values=torch.as_tensor(values, device="cpu"))
        with pytest.raises(Exception, match="cpu"):
            encode(elsewhere)


@pytest.mark.parametrize(
    ("setting", "gpus", "processes", "chosen"),
    [
        ("cpu", 4, 1, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("cuda", 1, 1, "cuda"),
    ],
)
def test_the_device_follows_the_setting_and_the_gpus(setting: str, gpus: int, processes: int, chosen: str) -> None:
    assert device.choose(setting, gpus, processes) == chosen


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (1, 2)])
def test_cuda_without_a_gpu_for_each_process_is_one_sentence(gpus: int, processes: int) -> None:
    with pytest.raises(MachineError, match=r"^training\.device is cuda, and there .*; .*set .* to ") as raised:
        device.choose("cuda", gpus, processes)
    assert raised.value.exit_code == 2


def test_a_process_takes_the_gpu_of_its_rank_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (device.of_process("cuda"), taken) == (torch.device("cuda", 1), [1])
    assert device.of_process("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match="process 2"):
        device.of_process("cuda")


class Session:
    """A Spark session of which the configuration alone is asked."""

    def __init__(self, **gpus: str) -> None:
        self.gpus = {f"spark.{owner}.resource.gpu.amount": amount for owner, amount in gpus.items()}
        self.conf = self

    def get(self, key: str, default: str) -> str:
        return self.gpus.get(key, default)


@pytest.mark.parametrize(
    ("local", "gpus", "on_machine", "expected"),
    [
        ("true", {}, 0, ("cpu", False)),
        ("true", {}, 2, ("cuda", False)),
        ("true", {"driver": "2"}, 2, ("cuda", True)),
        ("true", {"driver": "1"}, 2, ("cpu", False)),
        ("false", {}, 2, ("cpu", False)),
        ("false", {"task": "1"}, 0, ("cuda", True)),
        ("false", {"task": "0.5"}, 0, ("cpu", False)),
    ],
)
def test_spark_hands_out_the_gpus_that_it_has(
    local: str, gpus: dict[str, str], on_machine: int, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: on_machine)
    loaded = settings.load([BASE], ["training.processes=2", f"training.local_mode={local}"])
    spark: Any = Session(**gpus)
    chosen = spark_job._device(loaded, spark)
    assert (chosen, spark_job._uses_spark_gpus(loaded, chosen, spark)) == expected


@pytest.mark.parametrize("local", ["true", "false"])
def test_cuda_is_refused_where_neither_the_machine_nor_spark_has_a_gpu(
    local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    spark: Any = Session()
    with pytest.raises(MachineError, match="there is no GPU to train on here; set it to auto or cpu"):
        spark_job._device(settings.load([BASE], ["training.device=cuda", f"training.local_mode={local}"]), spark)
