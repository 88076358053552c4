"""What happens when disks fill up, fail and are slow, and when clocks are wrong: shown, not assumed.

    injury        what is done to a disk: small and full (tmpfs), syncs that fail or last (strace)
    accounts      the bank that is robbed meanwhile, and what must be true of it in the end
    client        a process that transfers for ever and says what became of it; `clients` sees it from outside
    scenes        what all scenes share: two such processes, and the judgement
    on_sqlite  on_cassandra  on_kafka      one scene for each thing that goes wrong
    clocks        processes with a wrong clock (libfaketime)
    command       all of them, one after the other: `python -m scripts.proof disks`

Tests play the same scenes in small (`tests/faults_on_disk`).
"""
