"""Several processes as one run: they start together, agree, and end together.

join.py       start of a process as one of several
peers.py      connections between the processes, by which all end when one does
agreement.py  comparison of values between the processes
stop.py       the step after which all stop when one receives a signal
"""
