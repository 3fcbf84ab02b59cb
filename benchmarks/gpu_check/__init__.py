"""What `gpu_check.py` is made of.

rows.py        what a run finds: ceilings, checks, benchmarks; the schema of the JSON
accounting.py  bytes and FLOPs of the kernels       shapes.py   V2-Lite, V2, V3 and odd ones
goals.py       shares of the ceilings, goals        report.py   Markdown
timing.py      CUDA events, flushed caches          compare.py  poison, errors, what is allowed
sections.py    their names                          plan.py     units of work
child.py       runs them in a process of its own    environment.py  device, versions, commit
supervise.py   starts that process, again after a kernel took it down
ceilings.py    section 1: what the device can do
kernel_checks.py, check_*.py    section 2: kernels against their twins
kernel_times.py, bench_*.py     section 3: kernels against ceilings and against torch
decode.py, greedy.py, model.py, hops.py, on_ray.py    section 4: the engine end to end
*_data.py      seeded arguments of the kernels

Importing a section imports what it measures and nothing else, so that a machine that lacks a
package loses that section only.
"""
