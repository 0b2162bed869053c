"""A point comes up as an EC2 instance; or waits in AWS as EBS snapshots until it has to.

point ─▶ plan: what EC2 needs to know of the guest, its disks, everything that would refuse it
           │
           ▼ run
disks ▶ snapshots (only what AWS lacks) ▶ image ▶ instance ▶ report

request.py    what is asked for, the plan of it, what became of it
guest.py      what EC2 has to know of a VM, as far as its point tells
blocks.py     a point's disk as EBS sees it: which 512 KiB blocks hold data, or differ from an earlier point
disks.py      what of a disk is in AWS already; the rest is written
fixing.py     the guest is prepared for EC2 on the way (--fix-guest)
planning.py   from the request to the plan; makes nothing
recover.py    does what was planned, or removes what it made (made.py)
cost.py       what that costs
site.py       a region as the site of a plan
pilot.py      the newest points wait in AWS; keeper.py does that all the time
"""
