"""NVRAM as libvirt keeps it (edk2's variable store) becomes the UefiData of an image.

What is in it: boot entries (those by partition, as installers write them, mean the same on EC2; those by device path
do not, and are passed over by the firmware), the keys of secure boot, the guest's own variables. The conversion is
AWS's own library, python-uefivars; it is optional, since most guests boot from their fallback path just as well.
"""

import warnings
from typing import Final

MAX_UEFI_DATA: Final = 64000
"""Characters that RegisterImage takes (its API reference)."""


class NotConverted(ValueError):
    """The NVRAM can't be taken along; the message says why."""


def uefi_data(nvram: bytes) -> str:
    """The UefiData of an image, of the guest's NVRAM.

    Raises:
        NotConverted: it is no variable store of edk2's, too large, or the library is not installed.
    """
    try:
        from pyuefivars.aws import AWSUEFIVarStore  # noqa: PLC0415 - optional, and slow to load
        from pyuefivars.edk2 import EDK2UEFIVarStore  # noqa: PLC0415 - as above
    except ImportError as err:
        raise NotConverted("that needs: pip install 'drsync[ec2]'") from err
    data, problem = "", ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves temporary files to the garbage collector
        try:
            writer = AWSUEFIVarStore.__new__(AWSUEFIVarStore)  # its __init__ reads one
            writer.vars = EDK2UEFIVarStore(nvram).vars
            data = bytes(writer).decode("ascii")
        except Exception as err:  # noqa: BLE001 - whatever bytes that are no variable store lead to
            problem = str(err)  # not chained: its frames hold those files
    if problem or not data:
        raise NotConverted(f"it is no variable store of edk2's ({problem})"[:200])
    if len(data) > MAX_UEFI_DATA:
        raise NotConverted(f"it has {len(data)} characters, and EC2 takes {MAX_UEFI_DATA}")
    return data
