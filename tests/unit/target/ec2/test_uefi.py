"""NVRAM becomes UefiData: the same variables, as AWS's own library reads them."""

import sys
import warnings
from pathlib import Path

import pytest

from drsync.target.ec2.uefi import MAX_UEFI_DATA, NotConverted, uefi_data

STORES = Path("/usr/share/OVMF")


@pytest.mark.parametrize("name", ["OVMF_VARS_4M.fd", "OVMF_VARS_4M.ms.fd"])
def test_the_variables_of_a_store_are_taken_along(name: str) -> None:
    from pyuefivars.aws import AWSUEFIVarStore
    from pyuefivars.edk2 import EDK2UEFIVarStore

    content = (STORES / name).read_bytes()
    data = uefi_data(content)
    assert len(data) <= MAX_UEFI_DATA
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves files open
        wanted = {v.name: v.data for v in EDK2UEFIVarStore(content).vars}
        assert {v.name: v.data for v in AWSUEFIVarStore(data.encode()).vars} == wanted
    assert ("PK" in wanted) == (".ms." in name)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb" + bytes(1000), bytes(540672)])
def test_what_is_no_variable_store_is_not_converted(content: bytes) -> None:
    with pytest.raises(NotConverted, match="no variable store"):
        uefi_data(content)


def test_without_the_library_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyuefivars.aws", None)
    with pytest.raises(NotConverted, match=r"pip install 'drsync\[ec2\]'"):
        uefi_data(b"")
