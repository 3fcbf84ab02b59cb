"""What operators see: metrics, logs, live views.

```
catalog.py           every metric: name, kind, help, labels, bounds, who tells it
member_samples.py    what each kind of worker tells, from the counters that it keeps anyway
request_metrics.py   what an ingress counts of its requests
shared.py            one computation for everybody who asks meanwhile
cluster_metrics.py   everybody's newest samples, asked of the directory
exposition.py        samples as Prometheus' text: /metrics
ray_metrics.py       samples in Ray's own metrics
rates.py             counters that only grow -> rates
status.py            what /status tells of workers and tiers
logs.py              one line an event; request_log.py  one a request
follow_logs.py       the log files of replicas as one stream
traces.py            whether spans can be made
text_log.py          prompts and answers in the log, for who asks for it
```
"""
