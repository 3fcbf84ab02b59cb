"""How many workers a tier has: Ray Serve asks, these answer from what the workers report.

stats.py           what a worker reports each second: at most 16 plain floats
settings.py        targets, delays and bounds of a tier
policy.py          what each tier's reports mean: pure, time and state come in as arguments
sizing.py          from a load to a size: bounds, delays, steps; what both tiers share
pool.py            what goes into a decision and comes out of it
serve_policies.py  the form in which Ray Serve calls it

Serve averages the reports of each replica over `window_s`, calls the policy about ten times a
second in its controller, and starts or stops replicas until their number is the target.
"""
