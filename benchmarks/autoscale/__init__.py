"""What `bench_autoscale.py` is made of.

trace.py          a day of requests: how many when, of which domain. Pure
prompts.py        prompts and lengths of answers of the default model's domains
provisioning.py   the ways to size the expert tier, as settings of the application
replay.py         sends a trace, notes when each token came
watch.py          samples workers, CPU and pressure while it runs
figures.py        worker-seconds, service levels, windows of time. Pure
plot.py           the picture
report.py         Markdown
"""
