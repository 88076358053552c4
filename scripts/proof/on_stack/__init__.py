"""The system on Kafka and Cassandra while both, and everything of its own, are killed, stopped and lied to.

faults      what may happen, as a table; and which of it happens when, drawn from a seed
injecting   how each of it is done to a running system, and how one knows that it is over
load        what the system is asked to do meanwhile, drawn from the same seed
ledger      whether money, versions and the order in time are exact; pure, from topics and tables alone
standing    the servers, the proxies in front of them, and the system behind these
chaos       all of that for some minutes, and the judgement
recovery    how soon a killed part serves again, measured
soak        memory, descriptors and tables over an hour
"""
