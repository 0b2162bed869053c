"""A domain's XML for another host than the one it was captured on. Pure: no libvirt, no I/O.

    XML of a point ─▶ platform ─▶ cpu ─▶ firmware ─▶ disks ─▶ networks ─▶ devices ─▶ XML for the target
                         │         │        │          │         │           │
                         └─────────┴────────┴── notes ─┴─────────┴───────────┘

    values.py        what is asked for, what a host offers, what a note is
    tree.py          XML in and out: bounded, no entities
    capabilities.py  what libvirt says of a host, as values
    platform.py      hypervisor, machine type, emulator, memory, processors and where they are pinned
    cpu.py           the processor that the guest sees
    firmware.py      loader, NVRAM, TPM
    disks.py  networks.py  devices.py
    plain.py         a domain for a VM that had none
    rewrite.py       all of it, in order

Rules, checked by tests/unit/target/domain:

- D1  what the target can run as it is stays as it is.
- D2  whatever was changed has a note; nothing is dropped without a word.
- D3  what would keep the domain from being defined or started is a problem, told before anything is written.
"""
