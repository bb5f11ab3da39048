"""Replay of golden cases: does the library compute what a published implementation computed?

``python -m nextscale.parity FOLDER`` replays every case of a folder. A case is one ``.npz`` file that holds a
configuration, weights (as names and shapes to draw them from), inputs and the expected outputs with their
tolerances. One module per system (``nextscale/parity/SYSTEM.py``) maps a case's operation onto the library.
"""
