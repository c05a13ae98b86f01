"""Hours of samples as compressed columns: how a row and a frame are written, and the process that seals.

It imports nothing that is slow to load, since sealing is a new process each hour. numpy is loaded by
`frame` and `sealing` alone, and never by the daemon.
"""
