"""The directory: who lives, who holds which expert, who shall hold it.

server.py       the server side: threads, a lock and time around the roster
roster.py       its state machine; member.py, publication.py  one member, the next snapshot;
                journal.py  what is logged of it
rebalancer.py   when a step towards even load is made
reports.py      what the members reported last; samples.py  the directory's own numbers
commands.py     drain, replicate, rebalance, scale, chaos
member_line.py  the directory's end of a connection
client.py       a member's line to it

The messages are in experts/messages.py.
"""
