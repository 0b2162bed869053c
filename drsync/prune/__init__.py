"""Takes dropped points out of a log, without touching what stays (docs/decisions/0006-prune.md).

    retention ─▶ which points are dropped
    liveness   which of their blocks the next point that stays still shows      pure
    planning   which objects are worth to be taken out, and what that brings    pure
    copying    new packs and merged segments, read back
    horizon    one create: from now on the log reads as it says                 horizon.py
    inventory  what the store lists, checked against what is known
    sweeping   a grace time later: deletes what that horizon took out of use
    run        all of it for one VM

It needs the root key and a role that may create and delete; hosts need neither for it.
"""
