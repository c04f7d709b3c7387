import os

# All figures go to files. The kernel of a notebook names a backend that may not be installed here.
os.environ["MPLBACKEND"] = "agg"
