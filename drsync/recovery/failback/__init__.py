"""The way home from EC2: what an instance has changed becomes a point of its VM's log.

    recovery point ── the snapshots that its instance was made from ─┐
                                                                     ├ ListChangedBlocks ▶ only these are read
    instance ▶ volumes ▶ fresh snapshots, of one instant ────────────┘        │
                                                                              ▼
    log:  … ─ newest point ─ fence ─────────────────────────────────── new point ▶ drsync restore --to libvirt

The log is fenced first: a daemon that still protects the VM somewhere stops for it. Each 64 KiB of what is read is
compared with the newest point by its keyed hash, and only what differs is sent, as in a resync; so the new point is
right also where more was read than was changed, as after a conversion of the guest, when the whole volume is.

request.py    what is asked for, the plan of it, what became of it
planning.py   which instance, which volumes, compared with what; everything that would refuse it; makes nothing
view.py       snapshots as disks that are read live (source.LiveView)
reading.py    which blocks of each disk have to be read
run.py        does it: one pass, or one more after the instance was stopped

A run that was killed: the journal in the spool (journal.py, as of a seed) has what was sent, tags in AWS say which
snapshots it was read from. The next run goes on, and then takes fresh snapshots for what has changed since: what it
ends with is never older than its beginning.
"""
