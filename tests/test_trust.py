"""Attacks by whoever made a results folder, a data set or an archive, through the commands that read them.

SECURITY.md says what is promised, and against whom.
"""

# Code: `resume` and the file that a study names

# Where things are sent

# Links

# Secrets

# Archives and pictures

# Numbers, depths and sizes

# What other programs make of our output

# Ray's door

# Folders, sockets and logs of a run

# A ledger that is a program
