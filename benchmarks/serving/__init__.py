"""What `bench_serving.py` is made of.

`plan.py` what is measured · `drive.py` load with time stamps · `summary.py` percentiles ·
`systems.py`, `batch.py` what is measured · `over_http.py`, `sse.py` load over HTTP · `session.py`
one system in a process of its own · `processes.py` starting and ending those · `memory.py` ·
`model.py` bytes of a checkpoint · `results.py` medians and ratios · `goals.py` · `report.py`.

All but `systems.py` and `batch.py` need the standard library only: peers run them with their own
interpreters.
"""
