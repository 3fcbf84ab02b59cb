"""What `bench_balance.py` is made of.

imbalance.py  how uneven workers are; steps of rebalancing, judged on rows they have not seen. Pure
traces.py     pools and skewed traffic over them. Pure
domains.py    rows by expert of the default model, from real prompts of each domain
cost.py       what counting, reporting and planning take from throughput
report.py     Markdown
"""
