"""Settings of all tests."""

import os
import signal

from pipeline import host

# a tenth of a user's, since no test asks which engine is fastest; processes that tests start inherit it
os.environ.setdefault(host.MEASURE_S, "0.1")

# a script that starts the tests with `&` makes them ignore Ctrl-C, and all processes that they start, which are sent it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
