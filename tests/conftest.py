"""What every test may rely on, however the tests were started."""

import signal

# A job in the background (`make test &`, nohup, some CI runners) starts with signals ignored, and its children inherit
# that: the tests that send them would wait for nothing. What a shell in the foreground gives is restored.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
