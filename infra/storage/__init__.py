"""Storage: single records and conditional writes, atomic within one unit of the storage.

`port.py` is the contract, `operations.py` its vocabulary, `errors.py` what can go wrong.
Adapters are siblings. Nothing here knows transactions.
"""
