"""What runs inside the fence: reads hostile disks, knows nothing of the repository.

source.py       the bytes of a disk or a part of it
partitions.py   MBR and GPT; boot_code.py: what a BIOS would run
signatures.py   what a volume holds, by its first bytes
files.py        a file system's files: the contract, and a guest's whole tree over several of them
dissect_files.py, guestfs_files.py    its two implementations; nbd_export.py brings the second one its disks
initramfs.py    which drivers an initramfs brings
linux.py, network.py, windows.py      a system's facts, from its tree
survey.py       all of it, in order; __main__.py: the process
"""
