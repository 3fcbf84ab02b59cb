"""Which worker holds which expert: pure decisions over plain tables.

space.py          experts of a model, and the units (experts or routing groups) they are placed in
replan.py         workers come and go: the smallest change that covers every expert
unit_board.py     units on workers while such a plan is made; replica_order.py  who is copied next
rebalance.py      the load is uneven: a bounded step towards even load
slot_board.py     units in slots while such a step is made; relief.py  which change pays
eplb.py           DeepSeek's planner for known loads on a fixed grid of GPUs: the reference planner
                  that tests and benchmarks compare with

`replan.initial_table`, a first plan in one call, is for tests and benchmarks, too; the directory
calls `replan` with what its workers hold.
"""
