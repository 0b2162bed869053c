"""A point comes back as a domain of a libvirt host; a plan brings back many.

point ─▶ plan: where its disks go, its XML for the host, everything that would refuse it
           │
           ▼ run
disks (parallel, authenticated) ─▶ NVRAM, TPM ─▶ define ─▶ autostart ─▶ start

request.py   what is asked for, and what a plan of it is
origin.py    what the point knows of its VM
planning.py  from the one to the other; writes nothing
recover.py   does what was planned, or undoes it
waves.py     several VMs in order, each until it is up, on a site
site.py      the contract of a site; libvirt_site.py is a host, cloud/site.py a region
cloud/       a point comes up as an EC2 instance instead
report.py    what came up, when, and how much was lost
"""
