"""A SQLite index whose durable home is S3.

The bucket holds the data of one model below one key: the store. The object HEAD names the current state of the store,
and a transaction is committed when a conditional PUT replaces HEAD. Each process serves reads from a local copy, a
SQLite file that is rebuilt from the bucket whenever it is lost. The protocol is explained in
docs/design/commit-on-s3.md.

From bottom to top:

    head              HEAD, log records, segments and snapshots: the objects in the bucket
    copy_files        the files of local copies in a directory
    copy_directory    the directory of local copies, shared or private, and what to do if its disk is full
    write_requests    one transaction, and the attempt to write it to the tables of a local copy
    local_copy        LocalCopy: one SQLite file, at the state of one HEAD
    fork              the rules by which a process notices that history has forked
    fork_report       which transactions a fork lost: in the log, and in the directory of the local copy
    fork_detector     compares each HEAD that is read with those that the process knows
    current_copy      CurrentCopy: the LocalCopy that a process uses now, replaced if it is damaged or locked
    log_reader        reads records and snapshots that a HEAD refers to
    creation          creates HEAD and BORN once, and checks that the storage honours conditions
    race_check        races conditional writes, before a storage is trusted
    coalesced_checks  one check of HEAD for all callers that wait for one
    replica           Replica: keeps the current copy up to date with HEAD
    committer         S3Committer: group commit, unknown outcomes, rejections
    housekeeping      snapshots, merges of segments, garbage collection

The guarantees: An acknowledged commit is in S3, and no writer overwrites it. The operations on a model are
linearizable. A write without contention is one swap, and a strong read is one conditional GET.

The invariants, and the modules that keep them:

- I1 The version and the record number of HEAD grow without gaps, and each HEAD is derived from the HEAD whose ETag its
  PUT named (head, committer).
- I2 Every object that HEAD refers to exists. It is put before the swap that names it, and deleted only when no HEAD can
  name it any more (committer, housekeeping).
- I3 The id of an acknowledged transaction is in the history exactly once. The id of a transaction that was answered
  with a conflict is not in the history (committer).
- I4 Replay of a record is unconditional and deterministic, and cannot fail (local_copy).
- I5 The id of the store, record number, version and ETag are committed together with the rows (local_copy).
- I6 No clock decides. Only reads with `consistency="bounded"` use a clock, for the staleness that they allow.
- I7 No two HEADs have equal bytes, because each has a random nonce (head).
- I8 A HEAD is accepted only if it continues every HEAD that the process knows, or if they continue it (fork, replica).
"""
