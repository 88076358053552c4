"""Deterministic simulation of the real engine: one thread, virtual time, and everything that can go wrong.

    weather.py    what may go wrong in one seed, and how often: one record of probabilities
    loop.py       an event loop without a clock or sockets, whose order a seed decides; processes that die and pause
    network.py    between processes and storage: calls that are slow, lost, late, applied but not answered
    witness.py    sees every write at the instant it is applied, and knows what the engine never tells
    workloads.py  transfers, list appends, inserts, deletes, scans, index reads: what clients do
    world.py      one seed: processes, clients, faults, healing, the end
    judge.py      what must hold at the end
    probes.py     rare paths that a run must have taken
    mutations.py  bugs planted into the engine, which a run must find
    exhaustive.py no chance at all: every single fault, and every pair with a crash of the one who cleans up
    running.py    many seeds in several worker processes, and the report

The engine under test is `infra/consensus_commit` as it is: it gets a storage, a clock, ids and a `sleep` as in any
program. Nothing of it is replaced except by a mutation; only the failpoints it passes are watched.
"""
