"""What operators see: metrics, logs, live views.

```
catalog.py      every metric: name, kind, help, labels, buckets
```
"""
