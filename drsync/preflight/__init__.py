"""Would this point boot in EC2? Asked before the disaster, answered from the repository, nothing restored.

    point ─▶ disk.py        any range of a disk, block by block, authenticated; cached, and counted
               │
               │ fence.py ═══ a process of its own: no keys, no credentials, no network, little memory, little time
               ▼
             inside/         partitions, file systems, the guest's files ─▶ facts
               │
               ▼
             facts.py        what was found: values, bounded and plain
               │
             checks/         facts ─▶ findings: pure functions
               ▼
             report.py       ok / warning / fails / unknown, the reason, what to do

All that is on a guest's disk is hostile: it may have been written by whoever took the VM over. So nothing of it is
parsed in the process that holds the repository's key. The process inside the fence gets bytes through a pipe and hands
back one document; if it hangs, grows or dies, what it had found by then counts, and the report says what is not known.
A path that was found in a guest is only ever looked up in that guest.
"""
