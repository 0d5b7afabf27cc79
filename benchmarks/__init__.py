"""What a request costs, beside the peers and the limit, in one run: `make bench`, or `python -m benchmarks --help`.

article   the data, the same for everyone
peers     who is measured, and what each row asks of them
backends  every kind of storage on real servers, beside raw clients and specstar; servers and workers are what it
stands on
load      wrk against a pinned server, CPU time beside requests
report    medians, ratios and the page
scripts/  what runs in a process of its own: the servers, the engines without HTTP, cold starts
"""
