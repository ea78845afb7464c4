"""What a run's report draws: each plot is a file.

Owns what is drawn where, and how much of it: of 50,000 trials and as many faults a plot has a bounded number of marks, each of
which says for how many it stands. Pure; knows nothing of the page around it.
"""
