"""Consensus Commit: ACID transactions over any storage with linearizable conditional writes of single records.

Every record carries its own transaction metadata and the image it had before; one row of the state table, written
once, decides a transaction. The columns, states and conditions are ScalarDB 3.19's, so that both may share tables.

    participant side (own records only)            coordinator side (state rows only)
    ───────────────────────────────────            ──────────────────────────────────
    participant.py   reads, writes, four phases    coordinator.py  the state table: who writes first decides
    snapshot.py      what was read and written     intents.py      what is under way, for whoever restarts
    compose.py       snapshot -> storage writes
    grouping.py      writes -> atomic batches      both, in one process
    validation.py    is what was read still so?    ────────────────────────────
    recovery.py      brings found records to rest  commit.py     the protocol, to be read aloud
    record_cache.py  what need not be read again   transaction.py  manager.py
                                                   two_phase.py  participants with storages of their own
    hot_records.py   who waits for whom            journal.py    the manager's intents

    cleaning up                                    tables
    ───────────                                    ──────
    sweeper.py       what nobody reads             schema.py     declared against stored, and the steps between
    write_set.py     what Java programs logged

`states.py` and `metadata.py` are the format on disk, `errors.py` what a caller may meet, `retry.py` when to try again.
What is guaranteed on which storage, with examples: `README.md`.

Nothing here knows of Kafka, Ray, pydantic or any domain: these files, `infra/storage`, `infra/clock.py`,
`infra/failpoints.py` and `infra/recent.py` are a library of their own.
"""
