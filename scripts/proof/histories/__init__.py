"""Histories: random transactions on hot records under faults, written down, and judged by whoever was not there.

    history        what a client saw of its transactions
    dependencies   who depends on whom, and what is wrong without looking further
    cycles         cycles of dependencies, classified and explained
    checker        which of them an isolation level forbids

These four are pure and know nothing of the engine; the tests plant every anomaly and see it found.

    workloads      what the clients do: lists, registers, transfers
    weather        storage that fails, loses answers, delivers late; processes that die
    running        one run from the first transaction to the judgement
    command        `python -m scripts.proof histories`
"""
