"""A VM comes back as an EC2 instance: the only place with boto3 beside the S3 store. It knows AWS, not the log.

aws.py         one session: clients for a region, timeouts, the one retry layer
aws_errors.py  what boto3 raises, in the words of drsync's error tree
tags.py        how drsync knows its own in AWS
snapshot.py    a disk's blocks become an EBS snapshot
images.py      snapshots become an AMI
instances.py   an AMI becomes an instance
sizing.py      of which type
network.py     and where

Clients raise boto3's own exceptions; whoever calls them stands in `Aws.translated(operation)`,
so that nothing foreign leaves this package.

Whatever can be carried out twice is sent with something that AWS knows it by: a client token
(StartSnapshot, RunInstances, import tasks), a name that is unique (RegisterImage), a checksum of
its content (PutSnapshotBlock). A reply that got lost is then harmless, and a run that was killed
finds in AWS itself what it had made (tags.py names it).

What is AWS's word and what is a guess: AWS's are the shapes and limits of requests (botocore's
models, the API reference), block size and checksums of EBS direct, that a snapshot may "not exist"
for a while after StartSnapshot, that zeros which replace data must be written in a child snapshot.
Guesses are which error code goes with which mistake: where it matters, more than one is understood.
"""
