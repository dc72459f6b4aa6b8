from __future__ import annotations

import pytest

from subnet_ft.errors import SubnetError
from subnet_ft.training.one_process import refuse_many_devices, refuse_many_processes


@pytest.mark.parametrize("count", ["2", "16"])
def test_refuse_many_processes_refuses_a_launcher(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(SubnetError, match=f"WORLD_SIZE={count}"):
        refuse_many_processes()


@pytest.mark.parametrize("count", [None, "1", "", "x"])
def test_refuse_many_processes_allows_one(count: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count is not None:
        monkeypatch.setenv("WORLD_SIZE", count)
    refuse_many_processes()


@pytest.mark.parametrize(("devices", "local_rank", "refused"), [(2, None, True), (1, None, False), (2, "0", False)])
def test_refuse_many_devices_where_the_trainer_would_use_them_all(
    devices: int, local_rank: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    if refused:
        with pytest.raises(SubnetError, match="CUDA_VISIBLE_DEVICES=0"):
            refuse_many_devices()
    else:
        refuse_many_devices()
