"""A SQLite index whose durable home is S3.

    head           HEAD, records, segments: what stands in the bucket
    local_copy     the SQLite file that reads are served from
    fork           how a process notices that the history in the bucket is not the one that it knows
    fork_report    which transactions a fork lost: the log, and the record in the data directory
    race           the race of conditional writes, before a storage is trusted
    creation       HEAD and BORN are created once, and the probe of conditions
    replica        a local copy kept up with HEAD: check, catch-up
    committer      the swap: group commit, unknown outcomes, rejections
    housekeeping   snapshots, merges, collection

The promise: what was acknowledged is in S3 and nobody overwrites it; per model, operations are linearizable; a quiet write is one swap and a
strong read one conditional GET. The invariants stand where they are kept:

- I1 HEAD's ver and seq grow without gaps, and each HEAD is derived from the one whose ETag it named (head.Head.next, committer)
- I2 everything HEAD refers to exists: it is put before the swap that names it, and collected only when no HEAD can name it (housekeeping)
- I3 acknowledged: the txid is in the history exactly once; answered with a conflict: it is not in it (committer)
- I4 replay is unconditional, deterministic and cannot fail (local_copy)
- I5 store, seq, ver and ETag commit with the rows (local_copy)
- I6 no clock decides; `bounded` reads alone look at one, for the staleness they allow
- I7 no two HEADs have equal bytes (head: the nonce)
- I8 a HEAD is accepted only if it continues every HEAD that the process knows (fork, replica)
"""
