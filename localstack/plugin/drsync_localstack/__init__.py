"""EBS direct and VM Import for LocalStack 4.12: what it lacks for bringing a VM up in EC2.

    plugins    what LocalStack loads
    ebs, ec2   the two services, as far as LocalStack has to do with them
    instances, images   what RunInstances and RegisterImage keep and honour
    import_tasks   VM Import's tasks and their states
    disk_format    RAW, VMDK and VHD, read as AWS would have to
    catalog    snapshots and volumes: who has which blocks, in which state
    blocks     the blocks, on disk
    faults     what a test can switch on
    control    the HTTP endpoints that AWS doesn't have: faults, contents of volumes
    volume_files   those endpoints' client: a volume as a raw or qcow2 file, and back

Only plugins, ebs, ec2, instances, images and control import LocalStack; all else is plain Python, tested without it.

**What is known and what is a guess.** Each module says which of its rules are AWS's own words or were seen there
("known"), and which are a guess. A guess is written so that code which passes here fails safely there. The whole list
is in README.md.
"""
