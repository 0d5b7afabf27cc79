"""The resources of the process that the engine uses: threads, time, files and disk space.

deadline    the time that a request has left, and the work that fits into it
disk_space  full disks, and room for local copies at the cost of caches
drivers     optional packages
files       directories that survive a power cut, and locks between processes
moments     ages that are correct after a sleep or a restored snapshot
temporary   directories of one process, and the removal of abandoned ones
threads     threads for blocking reads and for heavy work
"""
