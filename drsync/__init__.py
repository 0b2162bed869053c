"""drsync: disaster recovery for KVM/QEMU virtual machines.

The way of the data, which is also the way through this package:

    guest writes → QEMU's dirty bitmap → source (capture) → spool/*.qcow2 (layers)
      → format (frames in segments and packs) → store (S3 or a directory)
      → log (points, numbered) → image (block map of one point) → restore → target
"""

__version__ = "0.1.0"
