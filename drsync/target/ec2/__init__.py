"""A VM as an EC2 instance: what AWS is told, and what it answers."""
