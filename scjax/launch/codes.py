"""Exit codes by which a run speaks to what started it."""

# The run saved itself and wants to be started again: it was preempted, or its time was up. EX_TEMPFAIL of
# sysexits.h; schedulers know it as "requeue" (RequeueExit=75 of Slurm).
REQUEUE = 75

# Another process of the run was lost: killed, stuck or out of reach. As for one that was itself killed by
# SIGKILL, the run is started again, a limited number of times.
LOST = 137
