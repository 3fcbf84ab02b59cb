"""`shoal top`: what a running server does, in a terminal.

reading.py    what the server says at one moment, and a thread that asks it again and again
history.py    what followed from one reading to the next: who came and went, the rate of tokens
heat_map.py   rows of layers x experts as text of any width (pure)
layout.py     how many lines each part of a screen has, which layers show (pure)
view.py       everything on one screen, or on one line (pure)
keyboard.py   single keys of a terminal
"""
