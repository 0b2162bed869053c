"""A point comes back as an EC2 instance; or waits in AWS as EBS snapshots until it has to.

blocks.py     a point's disk as EBS sees it: which 512 KiB blocks hold data, or differ from an earlier point
"""
