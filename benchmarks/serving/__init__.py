"""What `bench_serving.py` is made of.

options.py    command line               plan.py       scenarios of seeded prompts
drive.py      load with time stamps      summary.py    percentiles of a scenario
systems.py    our systems                batch.py      transformers
over_http.py  a server as a system       sse.py        the lean HTTP client
session.py    one system in a process    processes.py  starting and ending those
memory.py     PSS and RSS from /proc     model.py      bytes of a checkpoint
results.py    medians and ratios         goals.py      what is to be reached
report.py     Markdown

All but `options.py`, `systems.py` and `batch.py` need the standard library only: peers run them
with their own interpreters.
"""
