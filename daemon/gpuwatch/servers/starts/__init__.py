"""What a server's log says of each of its starts, as records; decides nothing about what to do.

| to find …                         | look in        |
|-----------------------------------|----------------|
| what a line of vLLM's log says    | `lines.py`     |
| which arguments it was given      | `arguments.py` |
| why a start or a life failed      | `failures.py`  |
| where the lines come from         | `log.py`       |
| when they are read, how it ended  | `watch.py`     |
"""
