"""What `bench_observability.py` is made of.

arms.py       what each arm runs: lines of the product that another arm runs without
hook/         put on the path of a server: its processes change their arm when they are told to
server.py     a server under test: its arm, its processor time
statistics.py paired differences and their intervals. Pure
"""
