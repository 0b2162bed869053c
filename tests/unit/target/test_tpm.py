"""A TPM's state is put where libvirt looks for it, or not at all; what is no such state is refused."""

import io
import tarfile
from pathlib import Path

import pytest

from drsync.errors import TargetUnusable, VolumeExists
from drsync.target.tpm import TpmState

UUID = "6a0f3b1e-9b9f-4d0b-8a44-0f5b6f3a2c11"
STATE = {"tpm2/tpm2-00.permall": b"keys"}


def tar_of(files: dict[str, bytes], **changes: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in changes.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def state_at(root: Path) -> TpmState:
    return TpmState(UUID, vm="web", root=root)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "version", "place"),
    [
        ("tpm2/tpm2-00.permall", "tpm2", "tpm2/tpm2-00.permall"),
        (f"./{UUID}/tpm2/tpm2-00.permall", "tpm2", "tpm2/tpm2-00.permall"),
        ("tpm1.2/tpm-00.permall", "tpm2", "tpm1.2/tpm-00.permall"),
        ("tpm2-00.permall", "tpm2", "tpm2/tpm2-00.permall"),
        ("tpm-00.permall", "tpm1.2", "tpm1.2/tpm-00.permall"),
    ],
)
def test_the_state_lies_where_libvirt_looks_for_it(tmp_path: Path, name: str, version: str, place: str) -> None:
    state_at(tmp_path).put(tar_of({name: b"keys"}), version=version, replace=False)
    assert files_of(tmp_path) == {f"{UUID}/{place}": b"keys"}
    assert (tmp_path / UUID / place).stat().st_mode & 0o777 == 0o600


def test_a_state_that_is_there_is_refused_and_not_removed_by_the_clean_up(tmp_path: Path) -> None:
    state_at(tmp_path).put(tar_of(STATE), version="tpm2", replace=False)
    second = state_at(tmp_path)
    with pytest.raises(VolumeExists):
        second.put(tar_of({"tpm2/tpm2-00.permall": b"other"}), version="tpm2", replace=False)
    second.put_back()
    assert files_of(tmp_path) == {f"{UUID}/tpm2/tpm2-00.permall": b"keys"}


def test_a_replaced_state_comes_back_or_is_forgotten(tmp_path: Path) -> None:
    state_at(tmp_path).put(tar_of(STATE), version="tpm2", replace=False)
    newer = {"tpm2/tpm2-00.permall": b"newer"}
    state = state_at(tmp_path)
    state.put(tar_of(newer), version="tpm2", replace=True)
    assert (tmp_path / UUID / "tpm2/tpm2-00.permall").read_bytes() == b"newer"
    state.put_back()
    assert files_of(tmp_path) == {f"{UUID}/tpm2/tpm2-00.permall": b"keys"}
    state = state_at(tmp_path)
    state.put(tar_of(newer), version="tpm2", replace=True)
    state.forget_old()
    assert files_of(tmp_path) == {f"{UUID}/tpm2/tpm2-00.permall": b"newer"}


@pytest.mark.parametrize(
    "tar",
    [
        pytest.param(b"not a tar", id="garbage"),
        pytest.param(tar_of({"tpm2/../../../etc/passwd": b"x"}), id="climbs-out"),
        pytest.param(tar_of({"tpm2/link": b""}, type=tarfile.SYMTYPE, linkname="/etc"), id="link"),
        pytest.param(tar_of({"tpm2/device": b""}, type=tarfile.CHRTYPE), id="device"),
        pytest.param(tar_of({f"tpm2/{n}": b"" for n in range(100)}), id="many"),
        pytest.param(tar_of(STATE)[:600], id="cut"),
    ],
)
def test_what_is_no_tpms_state_is_refused_and_writes_nothing(tmp_path: Path, tar: bytes) -> None:
    root = tmp_path / "swtpm"
    state = state_at(root)
    with pytest.raises(TargetUnusable, match="the TPM's state in the point can't be used"):
        state.put(tar, version="tpm2", replace=False)
    state.put_back()
    assert not root.exists()
