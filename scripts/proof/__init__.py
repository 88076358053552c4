"""Proof of the whole: a real system, driven and killed from outside, judged by what is on its topics and in its tables.

    running     `concord up` in a process of its own: start, stop, kill, and what its processes are
    witness     an independent consumer that sees every message of every topic
    judge       whether a history of messages keeps the promises; pure, and shares no code with the system
    tables      committed rows, made comparable between two runs
    histories   random transactions on the engine alone, under faults, and a checker of what they saw
    on_stack    the system on Kafka and Cassandra under load and faults: chaos, recovery times, soak
    scenarios   the long proofs; `python -m scripts.proof --help` lists them

The end-to-end tests use the same parts on small data.
"""
