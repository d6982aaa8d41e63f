"""Settings of all tests."""

import os

from pipeline import host

# a tenth of a user's, since no test asks which engine is fastest; processes that tests start inherit it
os.environ.setdefault(host.MEASURE_S, "0.1")
