"""The last collectives of ranks that timed out are kept in the run."""

from pathlib import Path

from raybert.storage.folder import Folder
from raybert.train.ray.flight_recorder import keep_recordings, recorder_environment


def test_recordings_of_a_node_are_moved_to_the_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in recorder_environment("demo-pretrain-1").items():
        monkeypatch.setenv(name, value)
    others = recorder_environment("demo-pretrain-2")["TORCH_FR_DUMP_TEMP_FILE"]
    own = recorder_environment("demo-pretrain-1")["TORCH_FR_DUMP_TEMP_FILE"]
    for prefix, rank in ((own, 3), (own, 11), (others, 3)):
        Path(f"{prefix}{rank}").write_bytes(f"rank {rank}".encode())
    run = Folder(tmp_path / "run")
    assert keep_recordings(run, attempt=4) == 2
    kept = run / "collectives" / "3"
    assert {name: kept.read_bytes(name) for name in kept.names()} == {
        "rank-3": b"rank 3",
        "rank-11": b"rank 11",
    }
    assert keep_recordings(run, attempt=5) == 0
    assert Path(f"{others}3").exists()


def test_without_nccl_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    assert keep_recordings(Folder(tmp_path), attempt=2) == 0
